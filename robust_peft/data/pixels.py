"""Encoded pictures decoded once: small ones into memory, others to find the broken ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm import tqdm

from robust_peft.data.decoding import decode
from robust_peft.data.sets import EncodedImages, ImageSet, TableRow, broken_picture, opened

SMALL_SIDE = 64  # pixels; larger pictures stay encoded
SMALL_TOTAL = 2**31  # bytes


def is_small(images: EncodedImages) -> bool:
    """Whether the images are to be kept in memory, going by the first one that can be read."""
    for index in range(min(len(images), 100)):
        try:
            height, width = images.size(index)
        except ValueError:
            continue
        return max(height, width) <= SMALL_SIDE and 3 * height * width * len(images) <= SMALL_TOTAL
    return False


def in_memory(images: EncodedImages, *, skip_broken: bool = False) -> tuple[ImageSet, dict[int, str]]:
    """The images decoded, uint8, and which of them are broken: index -> what is wrong with it.

    With ``skip_broken`` a broken image is black and listed, otherwise it is an error.

    Raises:
        ValueError: If an image is broken (file and row are named), all are, or their sizes differ.
    """
    pixels: Any = None
    broken: dict[int, str] = {}
    for index, value in enumerate(_cells(images)):
        try:
            picture = numpy.asarray(decode(value if isinstance(value, Path) else opened(value)))
        except Exception as error:  # Pillow's decoders raise what they like
            named = broken_picture(images.files[index], error)
            if not skip_broken:
                raise named from error
            broken[index] = str(named)
            continue
        if pixels is None:
            pixels = numpy.zeros((len(images), *picture.shape), numpy.uint8)
        if picture.shape != pixels.shape[1:]:
            sizes = [f"{height} x {width}" for height, width in (pixels.shape[1:3], picture.shape[:2])]
            raise DifferentSizes(
                f"{images.files[index]}: images should have one size. Found 2 sizes, {' and '.join(sizes)}."
            )
        pixels[index] = picture
    if pixels is None:
        raise ValueError(f"None of the {len(images)} images can be decoded: {broken[0]}")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(tensor, images.labels, images.classes, images.name), broken


def find_broken(images: EncodedImages, *, progress: bool = True) -> dict[int, str]:
    """Decode every image once, in threads, and say which ones are broken: index -> what is wrong with it."""

    def problem(index: int) -> str | None:
        try:
            images.picture(index)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = pool.map(problem, range(len(images)))
        shown = tqdm(checked, f"Decoding {images.name}", len(images), disable=None if progress else True)
        return {index: said for index, said in enumerate(shown) if said is not None}


class DifferentSizes(ValueError):
    """Images in memory should have one size."""


def _cells(images: EncodedImages) -> Iterator[Any]:
    """What is stored of each image. A table's rows are read in bulk, which takes a tenth of the time."""
    files = images.files
    for column, group in itertools.groupby(files, lambda f: f.column if isinstance(f, TableRow) else None):
        rows = list(group)
        if column is not None and [row.row for row in rows] == list(range(len(column))):  # type: ignore[union-attr]
            yield from column
        else:
            yield from (row.column[row.row] if isinstance(row, TableRow) else row for row in rows)
