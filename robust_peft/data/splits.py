"""A dataset's three parts: how they are cut, limited and prepared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from robust_peft.data.preparation import PreparedImages, has_size, prepare
from robust_peft.data.sets import EncodedImages, ImageSet

Images = ImageSet | EncodedImages | PreparedImages
T = TypeVar("T", ImageSet, EncodedImages)
Kind = TypeVar("Kind", bound=Images, covariant=True)

SPLIT_SEED = 20240711  # fixed, so that every run and every method sees the same split


@dataclass(frozen=True)
class Splits(Generic[Kind]):
    """A dataset's three parts. ``validation`` is cut from the training images; ``test`` is seen once.

    ``skipped`` counts the pictures that were left out because they cannot be decoded.
    """

    train: Kind
    validation: Kind | None
    test: Kind | None
    skipped: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def limited(self, limit: int | None) -> Splits[Kind]:
        """At most ``limit`` images of each part, drawn with a fixed seed (files are often sorted by class)."""

        def cut(part: Any) -> Any:
            if part is None or limit is None or limit >= len(part):
                return part
            return part.subset(shuffled(len(part))[:limit].sort().values)

        return replace(self, train=cut(self.train), validation=cut(self.validation), test=cut(self.test))

    def prepared(
        self, image_size: int | None = None, *, resize: int | None = None, crop: bool = True, seed: int = 0
    ) -> Splits[Any]:
        """The images at the size that a model wants, made when they are asked for.

        The shorter side is resized (bicubic, with antialiasing); then training images are cut at a random place, which
        belongs to seed, epoch and sample, validation and test images in the centre. Where all images have the size
        already, they are left as they are, training images too, unless ``resize`` is given. The training part has
        ``set_epoch(epoch)``, which `robust_peft.Trainer` calls.

        Args:
            image_size: Pixels on each side; None: the images stay as they are.
            resize: Pixels of the shorter side before the cut; None: 256/224 of ``image_size``.
            crop: Whether training images are cut at a random place; otherwise in the centre, too.
            seed: The run's seed.

        Raises:
            ValueError: For sizes that cannot be, or if the images are prepared already.
        """
        for name, value in (("image_size", image_size), ("resize", resize)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
        if image_size is None:
            if resize is not None:
                raise ValueError(f"resize needs image_size, the size that is cut out. Found resize = {resize} alone.")
            return self
        if resize is not None and resize < image_size:
            raise ValueError(f"resize should be at least image_size = {image_size}. Found resize = {resize}.")

        def part(images: Images | None, random_crop: bool) -> PreparedImages | None:
            if images is None:
                return None
            if isinstance(images, PreparedImages):
                raise ValueError(f"{images.name} is prepared already, for images of {images.image_size} pixels.")
            if as_stored:
                return PreparedImages(images, image_size, None)
            return prepare(images, image_size, resize, random_crop=random_crop, seed=seed)

        stored = [images for images in (self.train, self.validation, self.test) if images is not None]
        # All or none: enlarging the training images alone would change the scale of what they show.
        as_stored = resize is None and all(
            not isinstance(images, PreparedImages) and has_size(images, image_size) for images in stored
        )
        train = part(self.train, crop)
        assert train is not None
        return replace(self, train=train, validation=part(self.validation, False), test=part(self.test, False))


def shuffled(count: int) -> Tensor:
    """The numbers 0..count-1 in an order that is the same each time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def split_indices(count: int, share: float, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Indices of the samples that are kept and of those held out, each in order.

    What is held out is rounded up: 10 % of the 5,994 training images of CUB-200 are 600, as published.

    Raises:
        ValueError: If none would be kept.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = math.ceil(share * count - 1e-6)  # 0.1 * 30 is a little more than 3 in floating point
    if held_out >= count:
        raise ValueError(f"Holding out a share of {share} of {count} samples leaves none to train on.")
    return order[held_out:].sort().values, order[:held_out].sort().values


def split_off(images: T, share: float, seed: int, names: tuple[str, str]) -> tuple[T, T | None]:
    """Hold out a share of the samples, drawn with a fixed seed; None where the share is nothing."""
    kept, held_out = split_indices(len(images), share, seed)
    if len(held_out) == 0:
        return images, None
    return images.subset(kept, names[0]), images.subset(held_out, names[1])
