"""Pictures as a model wants them: resized, then cut out at a random place or in the centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from robust_peft import keyed_random
from robust_peft.data.sets import EncodedImages, ImageSet

CROP = keyed_random.name_key("crop")  # tells these draws from others of the same seed, epoch and sample


@dataclass(eq=False)
class PreparedImages(Dataset):
    """Images of one size, resized and cut when they are asked for.

    The shorter side becomes ``resize`` (bicubic, with antialiasing), then a square of ``image_size`` is cut out. Where,
    depends on seed, epoch and the sample's index alone: no batch, worker or process changes it.

    Args:
        source: The images as they are stored.
        image_size: Pixels on each side.
        resize: Pixels of the shorter side before the cut; None: the images have the size already and stay as they are.
        random_crop: Whether the place is drawn; otherwise it is the centre.
        seed: The run's seed.
        epoch: The epoch that is drawn for, see `set_epoch`.
    """

    source: ImageSet | EncodedImages
    image_size: int
    resize: int | None
    random_crop: bool = False
    seed: int = 0
    epoch: int = 0

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def name(self) -> str:
        return self.source.name

    def set_epoch(self, epoch: int) -> None:
        """Draw other places from now on: those of this epoch."""
        self.epoch = epoch

    def subset(self, indices: Tensor, name: str | None = None) -> PreparedImages:
        """The samples of these indices as a set of their own, with indices of its own."""
        return replace(self, source=self.source.subset(indices, name))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One sample: image of shape `[C, image_size, image_size]`, label and index."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int, int]]:
        """Several samples; images in memory are resized together."""
        resized: Any
        if isinstance(self.source, ImageSet):
            resized = self._resized(self.source.images[torch.as_tensor(indices)])
        else:
            resized = (functional.pil_to_tensor(self._resized(self.source.picture(i))) for i in indices)
        places = self._places(indices)
        return [
            (self._cut(image, place), int(self.source.labels[index]), int(index))
            for image, place, index in zip(resized, places, indices, strict=True)
        ]

    def _resized(self, pixels: Any) -> Any:
        """A batch of shape `[B, C, H, W]` or a picture, its shorter side resized."""
        if self.resize is None:
            return pixels
        resized = functional.resize(pixels, [self.resize], interpolation=InterpolationMode.BICUBIC, antialias=True)
        if isinstance(resized, Tensor) and resized.is_floating_point():
            return resized.clamp(0, 1)  # bicubic interpolation overshoots
        return resized

    def _places(self, indices: Sequence[int]) -> list[list[float]]:
        """Two numbers in [0, 1) for each sample, of which its crop's place is made."""
        keys = keyed_random.sample_keys(self.seed, self.epoch, torch.as_tensor(indices))
        return keyed_random.uniform(keyed_random.derive(keys, CROP), (2,)).tolist()

    def _cut(self, image: Tensor, place: list[float]) -> Tensor:
        size = self.image_size
        if not self.random_crop:
            return functional.center_crop(image, [size, size]).contiguous()
        top, left = (int(u * (length - size + 1)) for u, length in zip(place, image.shape[1:], strict=True))
        return image[:, top : top + size, left : left + size].contiguous()


def prepare(
    images: ImageSet | EncodedImages, image_size: int, resize: int | None, *, random_crop: bool, seed: int = 0
) -> PreparedImages:
    """One part of a dataset at the size that a model wants; see `robust_peft.data.Splits.prepared`."""
    resize = default_resize(image_size) if resize is None else resize
    return PreparedImages(images, image_size, resize, random_crop, seed)


def default_resize(image_size: int) -> int:
    """Length of the shorter side before the cut: 256 for 224."""
    return round(image_size * 256 / 224)


def has_size(images: ImageSet | EncodedImages, image_size: int) -> bool:
    """Whether every image is a square of this size; of encoded ones the heads are read up to the first that is not."""
    if isinstance(images, ImageSet):
        return tuple(images.images.shape[2:]) == (image_size, image_size)
    return all(images.size(i) == (image_size, image_size) for i in range(len(images)))
