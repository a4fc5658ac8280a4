"""Folders with one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

import torch

from robust_peft.data.sets import EncodedImages

PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
PART_NAMES = {name for names in PARTS.values() for name in names}


def open_folder(folder: Path) -> EncodedImages:
    """The images below a folder of class folders, by class and path; classes are numbered by name, as text.

    Raises:
        FileNotFoundError: If there is no such folder, no class folder, or none of the images of a class.
        ValueError: If the folder holds parts of a dataset (train, test) instead of classes.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; it should hold one folder of images for each class.")
    try:
        classes, numbers = find_classes(folder)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} should hold one folder of images for each class. Found none.") from None
    parts = [name for name in classes if name.lower() in PART_NAMES]
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


def find_parts(root: Path) -> dict[str, Path]:
    """The folders of "train", "validation" and "test" in ``root``; ``root`` itself as "train" where it holds classes.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If one part is there twice (val and dev), or test without train.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder; it should hold train and test, each with a folder for each class."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    found: dict[str, list[Path]] = {
        part: [path for path in folders if path.name.lower() in names] for part, names in PARTS.items()
    }
    named = [path.name for paths in found.values() for path in paths]
    if not found["train"]:
        if len(named) > 1 or (named and len(named) == len(folders)):
            raise ValueError(f"{root} should hold a folder train beside {', '.join(named)}. Found none.")
        return {"train": root}
    if len(named) == 1 < len(folders):  # a class called train, beside others
        return {"train": root}
    for part, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(f"{root} should hold one folder of {part} images. Found {names}.")
    return {part: paths[0] for part, paths in found.items() if paths}
