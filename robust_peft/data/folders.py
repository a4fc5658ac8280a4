"""Images to measure a model on, from wherever they are: a name, a parquet or safetensors file, a folder of folders."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from robust_peft.data.catalog import decode, digits, open_parquet, shuffled
from robust_peft.data.loaders import ImageSet, check_labels

ACCEPTED = '"digits", a .parquet or .safetensors file, or a folder with one folder of images for each class'
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class ParquetRow:
    """One encoded image in a parquet file, read when it is opened."""

    path: Path
    column: Any
    row: int

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"


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
        ValueError: If a label is outside the classes.
    """

    files: Sequence[Path | ParquetRow]
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "images"
    transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.classes))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One sample: image of shape `[3, H, W]` in uint8, label and index. ValueError that names a broken image."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            picture = decode(self._opened(index))
        except Exception as error:  # Pillow's decoders raise what they like
            raise self._broken(index, error) from error
        if self.transform is not None:
            picture = self.transform(picture)
        return pil_to_tensor(picture), int(self.labels[index]), int(index)

    def subset(self, indices: Tensor) -> EncodedImages:
        """The samples of these indices as a set of their own."""
        return replace(self, files=[self.files[i] for i in indices.tolist()], labels=self.labels[indices])

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
        return io.BytesIO(file.column[file.row]["bytes"]) if isinstance(file, ParquetRow) else file

    def _broken(self, index: int, error: Exception) -> ValueError:
        return ValueError(f"{self.files[index]}: the image cannot be decoded ({str(error) or type(error).__name__}).")


def load_images(
    source: str | Path, *, image_size: int | None = None, limit: int | None = None
) -> ImageSet | EncodedImages:
    """Labelled images for an evaluation.

    Args:
        source: "digits" (its test images); a .parquet file with columns ``img`` or ``image`` (encoded) and ``label``; a
            .safetensors file with tensors ``images`` (of shape `[N, C, H, W]`, uint8, or floats in [0, 1]) and
            ``labels`` (of shape `[N]`, integers); or a folder with one folder of images for each class. Its classes
            are numbered as torchvision's ImageFolder does, by their names sorted as text ("10" before "2"), and its
            images are shuffled, the same way each time, so that the first so many are a fair sample.
        image_size: Pixels on each side: the shorter side is resized to 256/224 of it (bicubic, with antialiasing), then
            the centre is cut out, as pretrained classifiers are usually evaluated. Where all images have that size
            already, they are left as they are. None: images as they are, which then need to be of one size.
        limit: At most so many images, drawn with a fixed seed (files are often sorted by class).

    Returns:
        A dataset of ``(image, label, index)``, the image uint8 of shape `[3, H, W]` (from safetensors: as stored), with
        ``classes`` and ``name``.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no images in it.
        ValueError: For an unknown name, a source that does not hold what it should, images of several sizes without
            image_size, or a broken image, now or when it is asked for; files are named.
        ImportError: Where a package is missing that reads the source; names it.
    """
    for name, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
    path = Path(source)
    if source == "digits":
        test = digits().limited(limit).test
        assert test is not None
        return _resized(test, image_size)
    if not path.exists() and (path.suffix or len(path.parts) > 1):
        raise FileNotFoundError(f"{path} does not exist; data should be {ACCEPTED}.")
    if path.suffix == ".safetensors" and path.is_file():
        images = _read_safetensors(path)
        if limit is not None and limit < len(images):
            images = images.subset(_drawn(len(images), limit), images.name)
        return _resized(images, image_size)
    if path.suffix == ".parquet" and path.is_file():
        encoded = _open_parquet(path)
        if limit is not None and limit < len(encoded):
            encoded = encoded.subset(_drawn(len(encoded), limit))
    elif path.is_dir():
        encoded = _open_folder(path)
        encoded = encoded.subset(shuffled(len(encoded))[:limit])
    else:
        raise ValueError(f"data should be {ACCEPTED}. Found data = {str(source)!r}.")
    return _prepared(encoded, image_size)


def _open_folder(folder: Path) -> EncodedImages:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, numbers = find_classes(folder)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} should hold one folder of images for each class. Found none.") from None
    parts = [name for name in classes if name.lower() in PARTS]
    if len(parts) > 1 or parts == classes:  # one among others may be a class: trains
        raise ValueError(f"{folder} holds parts of a dataset ({', '.join(parts)}), not classes; name one of them.")
    samples = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    present = {number for _, number in samples}
    empty = [name for name, number in numbers.items() if number not in present]
    if empty:
        raise FileNotFoundError(
            f"{folder}: no image in {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''} "
            f"(names that end in {', '.join(IMG_EXTENSIONS)})."
        )
    labels = torch.tensor([number for _, number in samples], dtype=torch.int64)
    return EncodedImages([Path(file) for file, _ in samples], labels, tuple(classes), folder.resolve().name)


def _open_parquet(path: Path) -> EncodedImages:
    column, labels, classes = open_parquet(path, ("img", "image"))
    rows = [ParquetRow(path, column, row) for row in range(len(labels))]
    try:
        return EncodedImages(rows, labels, classes, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> ImageSet:
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}).") from error
    missing = {"images", "labels"} - set(found)
    if missing:
        there = ", ".join(sorted(found)[:5]) or "nothing"
        raise ValueError(f"{path} has no tensor {', '.join(sorted(missing))}. Found {there}.")
    images, labels = found["images"], found["labels"]
    try:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise ValueError(f"labels should be integers. Found {labels.dtype}.")
        labels = labels.to(torch.int64)
        count = int(labels.max()) + 1 if labels.numel() else 0
        return ImageSet(images, labels, tuple(str(label) for label in range(count)), path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _drawn(count: int, limit: int) -> Tensor:
    return shuffled(count)[:limit].sort().values


def _resize_to(image_size: int) -> int:
    """Length of the shorter side before the centre is cut out: 256 for 224."""
    return round(image_size * 256 / 224)


def _prepared(images: EncodedImages, image_size: int | None) -> EncodedImages:
    """Images of one size: as they are, or by a transform where they are not all of ``image_size`` already."""
    first = images.size(0)
    other = next((i for i in range(1, len(images)) if images.size(i) != first), None)
    if image_size is None:
        if other is not None:
            sizes = [f"{images.size(i)[0]} x {images.size(i)[1]} ({images.files[i]})" for i in (0, other)]
            raise ValueError(f"The images have several sizes, {' and '.join(sizes)}; give image_size.")
        return images
    if other is None and first == (image_size, image_size):
        return images
    from torchvision.transforms import v2

    resize = v2.Resize(_resize_to(image_size), interpolation=v2.InterpolationMode.BICUBIC)
    return replace(images, transform=v2.Compose([resize, v2.CenterCrop(image_size)]))


def _resized(images: ImageSet, image_size: int | None) -> ImageSet:
    """The same for images in memory."""
    if image_size is None or images.images.shape[2:] == (image_size, image_size):
        return images
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    length = [_resize_to(image_size)]
    pixels = functional.resize(images.images, length, interpolation=v2.InterpolationMode.BICUBIC)
    if pixels.is_floating_point():
        pixels = pixels.clamp(0, 1)  # bicubic interpolation overshoots
    return replace(images, images=functional.center_crop(pixels, [image_size, image_size]).contiguous())
