"""MNIST and its relatives in their own format, IDX (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from robust_peft.data.sets import ImageSet

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LAYOUT = f"the IDX files {', '.join(name for names in FILES.values() for name in names)}, plain or .gz"
BELOW = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # the last two are torchvision's


def find_idx(root: Path) -> Path | None:
    """The folder in or below ``root`` that holds IDX files, if there is one."""
    return next((root / below for below in BELOW if _find(root / below, FILES["train"][0])), None)


def read_idx_parts(folder: Path, name: str, classes: tuple[str, ...]) -> tuple[ImageSet, ImageSet]:
    """Training and test images of MNIST or Fashion-MNIST, grey in three equal channels.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If one is no IDX file or incomplete, or images and labels do not belong together.
    """
    parts = []
    for part, names in FILES.items():
        paths = []
        for file in names:
            path = _find(folder, file)
            if path is None:
                raise FileNotFoundError(f"{folder} should hold {LAYOUT}. Found no {file}.")
            paths.append(path)
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{paths[1]} should have {len(images)} labels, as {paths[0].name} images. Found {len(labels)}."
            )
        try:
            # Expanded, not repeated: three views of one channel take the memory of one.
            pixels = images.unsqueeze(1).expand(-1, 3, -1, -1)
            parts.append(ImageSet(pixels, labels.to(torch.int64), classes, f"{name} {part}"))
        except ValueError as error:
            raise ValueError(f"{paths[1]}: {error}") from error
    return parts[0], parts[1]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file of so many dimensions, uint8; ``.gz`` is unpacked on the way."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); is it complete?") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):  # 8: unsigned bytes
        raise ValueError(f"{path} should begin as IDX with {dimensions} dimensions. Found {content[:4].hex(' ')}.")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, head, 4)]
    if len(content) != head + math.prod(shape):
        raise ValueError(
            f"{path} should have {math.prod(shape)} values, as its head says. Found {len(content) - head}."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    # Some copies have a dot before "idx".
    names = [f"{stem}{suffix}" for stem in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)
