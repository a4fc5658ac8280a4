"""Images to measure a model on, from wherever they are: a name, a parquet or safetensors file, a folder of folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from robust_peft.data.digits import digits
from robust_peft.data.folders import open_folder
from robust_peft.data.preparation import default_resize
from robust_peft.data.sets import EncodedImages, ImageSet
from robust_peft.data.splits import shuffled
from robust_peft.data.tables import read_parquet

ACCEPTED = '"digits", a .parquet or .safetensors file, or a folder with one folder of images for each class'


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
        assert isinstance(test, ImageSet)
        return _resized(test, image_size)
    if not path.exists() and (path.suffix or len(path.parts) > 1):
        raise FileNotFoundError(f"{path} does not exist; data should be {ACCEPTED}.")
    if path.suffix == ".safetensors" and path.is_file():
        images = _read_safetensors(path)
        if limit is not None and limit < len(images):
            images = images.subset(_drawn(len(images), limit), images.name)
        return _resized(images, image_size)
    if path.suffix == ".parquet" and path.is_file():
        encoded = read_parquet(path)
        if limit is not None and limit < len(encoded):
            encoded = encoded.subset(_drawn(len(encoded), limit))
    elif path.is_dir():
        encoded = open_folder(path)
        encoded = encoded.subset(shuffled(len(encoded))[:limit])
    else:
        raise ValueError(f"data should be {ACCEPTED}. Found data = {str(source)!r}.")
    return _prepared(encoded, image_size)


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

    resize = v2.Resize(default_resize(image_size), interpolation=v2.InterpolationMode.BICUBIC)
    return replace(images, transform=v2.Compose([resize, v2.CenterCrop(image_size)]))


def _resized(images: ImageSet, image_size: int | None) -> ImageSet:
    """The same for images in memory."""
    if image_size is None or images.images.shape[2:] == (image_size, image_size):
        return images
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    length = [default_resize(image_size)]
    pixels = functional.resize(images.images, length, interpolation=v2.InterpolationMode.BICUBIC)
    if pixels.is_floating_point():
        pixels = pixels.clamp(0, 1)  # bicubic interpolation overshoots
    return replace(images, images=functional.center_crop(pixels, [image_size, image_size]).contiguous())
