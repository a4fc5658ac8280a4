"""Image sets in memory and on disk, and the loaders that feed a training or an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset):
    """Labelled images in memory.

    Args:
        images: Of shape `[N, C, H, W]`, uint8 in 0..255 or floating point in [0, 1].
        labels: Of shape `[N]`, int64 in 0..len(classes)-1.
        classes: The classes' names.
        name: What the set is called in reports.

    Raises:
        ValueError: If shapes or dtypes do not fit, the set is empty, or a label is outside the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "images"

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not (self.images.dtype == torch.uint8 or self.images.is_floating_point()):
            raise ValueError(
                "images should be of shape [N, C, H, W], uint8 or floating point. "
                f"Found {list(self.images.shape)}, {self.images.dtype}."
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels should be int64 of shape [{len(self.images)}]. "
                f"Found {self.labels.dtype} of shape {list(self.labels.shape)}."
            )
        if len(self.images) == 0:
            raise ValueError(f"The dataset {self.name!r} is empty.")
        check_labels(self.labels, len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """One sample: image, label and the sample's index, which its random draws are keyed by."""
        return self.images[index], self.labels[index], int(index)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch at once, which spares a Python call for each image."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen], chosen

    def subset(self, indices: Tensor, name: str) -> ImageSet:
        """The samples of these indices as a set of their own."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes, name)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1 (on a GPU they would only show as a device assertion)."""
    if labels.numel() == 0:
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels should be in 0..{num_classes - 1}. Found labels from {lowest} to {highest}.")


def split_off(images: ImageSet, share: float, seed: int, names: tuple[str, str]) -> tuple[ImageSet, ImageSet | None]:
    """Hold out a share of the samples, drawn with a fixed seed; None where the share holds no sample."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = round(share * len(images))
    if held_out == 0:
        return images, None
    if held_out == len(images):
        raise ValueError(f"Holding out a share of {share} of {len(images)} samples leaves none to train on.")
    return images.subset(order[held_out:].sort().values, names[0]), images.subset(
        order[:held_out].sort().values, names[1]
    )


def train_loader(images: ImageSet, batch_size: int, *, seed: int = 0) -> DataLoader:
    """Shuffled batches for training; the last incomplete one is dropped, unless it is the only one."""
    return DataLoader(
        images,
        batch_size=min(batch_size, len(images)),
        shuffle=True,
        drop_last=True,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(images: ImageSet, batch_size: int) -> DataLoader:
    """Every sample once, in order."""
    return DataLoader(images, batch_size=batch_size, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
