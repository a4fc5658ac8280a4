"""Labelled images: in memory, or encoded on disk until they are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_peft.data.decoding import BrokenPicture, decode

if TYPE_CHECKING:
    from PIL import Image


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

    def subset(self, indices: Tensor, name: str | None = None) -> ImageSet:
        """The samples of these indices as a set of their own, with indices of its own."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes, name or self.name)


@dataclass(frozen=True)
class TableRow:
    """One encoded image in a table of the package datasets, read when it is opened."""

    source: str
    column: Any
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"

    def open(self) -> io.BytesIO | Path:
        """The picture's bytes, or the file that the table refers to."""
        return opened(self.column[self.row])


def opened(value: Any) -> io.BytesIO | Path:
    """What can be decoded of a table's cell ``{"bytes": ..., "path": ...}``."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError("the cell is empty")
    return Path(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])


@dataclass(frozen=True, eq=False)
class EncodedImages(Dataset):
    """Labelled images that stay encoded (JPEG, PNG, ...) on disk until they are asked for, one at a time.

    Args:
        files: Where each image is.
        labels: Of shape `[N]`, int64 in 0..len(classes)-1.
        classes: The classes' names.
        name: What the set is called in reports.
        transform: What is done to a decoded RGB picture before it becomes a tensor, if anything.

    Raises:
        ValueError: If the set is empty or a label is outside the classes.
    """

    files: Sequence[Path | TableRow]
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "images"
    transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if len(self.files) == 0:
            raise ValueError(f"The dataset {self.name!r} is empty.")
        check_labels(self.labels, len(self.classes), self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One sample: image of shape `[3, H, W]` in uint8, label and index. ValueError that names a broken image."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        return pil_to_tensor(self.picture(index)), int(self.labels[index]), int(index)

    def picture(self, index: int) -> Image.Image:
        """One image as an RGB picture, after the transform. ValueError that names a broken image."""
        try:
            picture = decode(self._opened(index))
        except Exception as error:  # Pillow's decoders raise what they like
            raise self._broken(index, error) from error
        return picture if self.transform is None else self.transform(picture)

    def subset(self, indices: Tensor, name: str | None = None) -> EncodedImages:
        """The samples of these indices as a set of their own, with indices of its own."""
        files = [self.files[i] for i in indices.tolist()]
        return replace(self, files=files, labels=self.labels[indices], name=name or self.name)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width as they are stored, from the image's head alone."""
        from PIL import Image

        try:
            with Image.open(self._opened(index)) as picture:
                return picture.height, picture.width
        except Exception as error:
            raise self._broken(index, error) from error

    def _opened(self, index: int) -> Path | io.BytesIO:
        file = self.files[index]
        return file.open() if isinstance(file, TableRow) else file

    def _broken(self, index: int, error: Exception) -> BrokenPicture:
        return broken_picture(self.files[index], error)


def broken_picture(file: Path | TableRow, error: Exception) -> BrokenPicture:
    """The error that names a picture and says why it cannot be decoded, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return BrokenPicture(f"{file}: the image cannot be decoded ({reason}).")


def check_labels(labels: Tensor, num_classes: int, files: Sequence[Any] | None = None) -> None:
    """Refuse labels outside 0..num_classes-1 (on a GPU they would only show as a device assertion).

    Args:
        labels: Of shape `[N]`.
        num_classes: How many classes there are.
        files: What the images are called, one for each label; None: their rows are named.
    """
    if labels.numel() == 0:
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        first = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        where = f"row {first}" if files is None else str(files[first])
        raise ValueError(
            f"labels should be in 0..{num_classes - 1}. Found labels from {lowest} to {highest}, "
            f"the first of them ({int(labels[first])}) at {where}."
        )
