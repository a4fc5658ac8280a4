"""CIFAR-10 and CIFAR-100 in their official binary version.

Their Python version is pickled: reading it would run whatever code is in it, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robust_peft.data.sets import ImageSet
from robust_peft.data.unpacking import unpack

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The official binary version of one of the two."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last of them is the label; CIFAR-100 has the coarse one before it
    pickled: str
    """The folder of the Python version."""


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
        "cifar-10-batches-py",
    ),
    "cifar100": Layout(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
        "cifar-100-python",
    ),
}
PICKLED_NAMES = ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "data_batch_1", "train")


def find_cifar(root: Path, name: str) -> Path | None:
    """The folder of the binary version in ``root``, unpacked if need be, or None.

    Raises:
        ValueError: If only the pickled version is there.
    """
    layout = LAYOUTS[name]
    pickled = f"is pickled, and pickles are not read, because they can run code; get {layout.archive} instead"
    if root.is_file():
        if root.name in PICKLED_NAMES:
            raise ValueError(f"{root} {pickled}.")
        root = unpack(root)
    elif (root / layout.archive).is_file():
        root = unpack(root / layout.archive)
    for folder in (root, root / layout.folder):
        if any((folder / file).is_file() for file in (*layout.train, layout.test)):
            return folder
    for folder in (root, root / layout.pickled):
        for file in PICKLED_NAMES:
            if (folder / file).is_file():
                raise ValueError(f"{folder / file} {pickled}.")
    return None


def read_cifar(folder: Path, name: str, *, partial: bool = False) -> tuple[ImageSet, ImageSet]:
    """Training and test images of the binary version; ``partial`` allows training files to be missing.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one has another length than whole records make, or a label is outside the classes.
    """
    layout = LAYOUTS[name]
    train = [file for file in layout.train if (folder / file).is_file()] if partial else list(layout.train)
    for file in (*(train or layout.train), layout.test, layout.names):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} should hold {', '.join((*layout.train, layout.test, layout.names))}. Found no {file}."
            )
    lines = (folder / layout.names).read_text(encoding="utf-8").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    train_images = _read_records([folder / file for file in train], layout.label_bytes, classes, f"{name} train")
    return train_images, _read_records([folder / layout.test], layout.label_bytes, classes, f"{name} test")


def _read_records(paths: list[Path], label_bytes: int, classes: tuple[str, ...], name: str) -> ImageSet:
    length = label_bytes + PIXELS
    parts = []
    for path in paths:
        content = bytearray(path.read_bytes())
        if len(content) == 0 or len(content) % length:
            raise ValueError(f"{path} should be whole records of {length} bytes. Found {len(content)} bytes.")
        records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, length)
        wrong = (records[:, label_bytes - 1] >= len(classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            label = int(records[row, label_bytes - 1])
            raise ValueError(f"{path}, row {row}: the label should be in 0..{len(classes) - 1}. Found {label}.")
        parts.append(records)
    whole = torch.cat(parts)
    images = whole[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous()
    return ImageSet(images, whole[:, label_bytes - 1].to(torch.int64), classes, name)
