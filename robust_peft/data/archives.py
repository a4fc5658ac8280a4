"""The official archives of CUB-200-2011 and Stanford Dogs, unpacked or as tar files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from robust_peft.data.sets import EncodedImages
from robust_peft.data.unpacking import unpack

CUB_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
CUB_LAYOUT = f"CUB_200_2011.tgz, or its folder with {', '.join(CUB_LISTS)} and images/"
DOGS_LISTS = ("train_list.mat", "test_list.mat")
DOGS_LAYOUT = f"images.tar and lists.tar, or Images/ and lists/ with {' and '.join(DOGS_LISTS)}"


def read_cub(root: Path) -> tuple[EncodedImages, EncodedImages]:
    """Training and test images of Caltech-UCSD Birds-200-2011 (Wah et al. 2011), in the order of ``images.txt``.

    Args:
        root: ``CUB_200_2011.tgz``, a folder that holds it, or the folder ``CUB_200_2011`` or the one above it.

    Raises:
        FileNotFoundError: If nothing is there, or pictures of the list are missing.
        ValueError: If it is laid out otherwise, or a list is broken; the line is named.
    """
    folder = _opened(root, ("CUB_200_2011.tgz", "CUB_200_2011.tar.gz", "CUB_200_2011.tar"))
    folder = next((f for f in (folder, folder / "CUB_200_2011") if (f / CUB_LISTS[0]).is_file()), folder)
    missing = [name for name in CUB_LISTS if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{root} should be {CUB_LAYOUT}. Found no {', '.join(missing)} among {_content(folder)}.")
    images, labels, in_train, classes = (_numbered(folder / name) for name in CUB_LISTS)
    numbers = {number: place for place, number in enumerate(classes)}
    for name, found in zip(CUB_LISTS[1:3], (labels, in_train), strict=True):
        if found.keys() != images.keys():
            odd = sorted(found.keys() ^ images.keys(), key=int)
            raise ValueError(
                f"{folder / name} and images.txt should list the same images. Image {odd[0]} is in one only."
            )
    unknown = [(image, number) for image, number in labels.items() if number not in numbers]
    if unknown:
        image, number = unknown[0]
        raise ValueError(
            f"{folder / CUB_LISTS[1]}: image {image} is of class {number}, which classes.txt does not have."
        )
    names = tuple(classes.values())
    parts = {"1": "train", "0": "test"}
    odd = [image for image, flag in in_train.items() if flag not in parts]
    if odd:
        raise ValueError(f"{folder / CUB_LISTS[2]}: image {odd[0]} should be marked 0 or 1. Found {in_train[odd[0]]}.")
    train, test = (
        _listed(
            folder / "images",
            [images[image] for image in images if in_train[image] == flag],
            [numbers[labels[image]] for image in images if in_train[image] == flag],
            names,
            f"CUB-200 {part}",
        )
        for flag, part in parts.items()
    )
    return train, test


def read_dogs(root: Path) -> tuple[EncodedImages, EncodedImages]:
    """Training and test images of Stanford Dogs (Khosla et al. 2011), in the order of its lists.

    The pictures are training images of ImageNet: a backbone may have seen the test images in pretraining.

    Args:
        root: A folder with ``images.tar`` and ``lists.tar``, or with ``Images/`` and ``lists/*.mat``.

    Raises:
        FileNotFoundError: If nothing is there, or pictures of the lists are missing.
        ValueError: If it is laid out otherwise or a list is broken.
        ImportError: Where scipy is missing, which reads the lists.
    """
    root = root.parent if root.is_file() and root.name in ("images.tar", "lists.tar") else root
    folder = _opened(root, ())
    places: dict[str, Path] = {}
    for name, inside, archives in (
        ("Images", "Images", ("images.tar",)),
        ("lists", DOGS_LISTS[0], ("lists.tar",)),
    ):
        candidates = [folder, folder / "lists"]
        archive = next((folder / a for a in archives if (folder / a).is_file()), None)
        if archive is not None and not any((c / inside).exists() for c in candidates):
            candidates = [unpack(archive), unpack(archive) / "lists"]
        place = next((c for c in candidates if (c / inside).exists()), None)
        if place is None:
            raise ValueError(f"{root} should hold {DOGS_LAYOUT}. Found no {name} among {_content(folder)}.")
        places[name] = place
    if not (places["lists"] / DOGS_LISTS[1]).is_file():
        raise ValueError(f"{root} should hold {DOGS_LAYOUT}. Found no {DOGS_LISTS[1]}.")
    lists = [_read_list(places["lists"] / name) for name in DOGS_LISTS]
    folders: dict[int, str] = {}
    for list_name, (files, labels) in zip(DOGS_LISTS, lists, strict=True):
        for row, (file, label) in enumerate(zip(files, labels, strict=True)):
            breed = file.split("/")[0]
            if folders.setdefault(label, breed) != breed:
                raise ValueError(
                    f"{places['lists'] / list_name}, row {row}: label {label} is {folders[label]} elsewhere. "
                    f"Found {file}."
                )
    numbers = {label: place for place, label in enumerate(sorted(folders))}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"{places['lists']}: each label should be one breed. Found one folder under several labels.")
    classes = tuple(folders[label].partition("-")[2] or folders[label] for label in numbers)  # n02085620-Chihuahua
    train, test = (
        _listed(
            places["Images"] / "Images", files, [numbers[label] for label in labels], classes, f"Stanford Dogs {part}"
        )
        for part, (files, labels) in zip(("train", "test"), lists, strict=True)
    )
    return train, test


def _opened(root: Path, archives: Sequence[str]) -> Path:
    """A folder as it is; a tar file, or one of these names in the folder, unpacked."""
    if root.is_file():
        return unpack(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist.")
    return next((unpack(root / name) for name in archives if (root / name).is_file()), root)


def _listed(
    folder: Path, files: Sequence[str], labels: Sequence[int], classes: tuple[str, ...], name: str
) -> EncodedImages:
    paths = [folder / file for file in files]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} listed pictures do not exist, the first is {missing[0]}."
        )
    return EncodedImages(paths, torch.tensor(labels, dtype=torch.int64), classes, name)


def _numbered(path: Path) -> dict[str, str]:
    """A list of lines "NUMBER VALUE"."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not key.isdigit() or not value or key in found:
            raise ValueError(f"{path}, line {number}: should be a new number and a value. Found {line!r}.")
        found[key] = value.strip()
    return found


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Files and labels (from 1) of a list in MATLAB's format."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{path} is read with scipy: pip install scipy.") from error

    try:
        found = loadmat(path, variable_names=["file_list", "labels"])
        files = [str(cell[0]) for cell in found["file_list"].ravel()]
        labels = [int(label) for label in found["labels"].ravel()]
    except Exception as error:  # scipy raises many kinds for what is no such file
        raise ValueError(
            f"{path} should be a .mat file with file_list and labels. Found {type(error).__name__}: {error}."
        ) from error
    if len(files) != len(labels):
        raise ValueError(f"{path} should have one label for each file. Found {len(labels)} for {len(files)}.")
    return files, labels


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"
