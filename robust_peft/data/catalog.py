"""Datasets by name: train, validation and test, split once and for all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robust_peft.data import archives, cifar_binary, idx
from robust_peft.data.digits import digits
from robust_peft.data.folders import find_parts, open_folder
from robust_peft.data.hub import read_hub
from robust_peft.data.pixels import DifferentSizes, find_broken, in_memory, is_small
from robust_peft.data.sets import EncodedImages, ImageSet
from robust_peft.data.splits import SPLIT_SEED, Splits, shuffled, split_indices, split_off
from robust_peft.data.tables import find_parquet, read_parquet, read_parquet_parts

logger = logging.getLogger("robust_peft")

Part = ImageSet | EncodedImages
Parts = dict[str, Part]  # "train", and as far as there are "validation" and "test"


@dataclass(frozen=True)
class Published:
    """A dataset with a name of its own.

    Args:
        hub: Its id on the Hub.
        train: Published number of training images.
        test: Published number of test images.
        num_classes: Published number of classes.
        layout: What a local copy may be, beside parquet files of the Hub.
        read: The official archive or folder to training and test images; None where there is none.
        label_column: The column of its labels on the Hub; None: the usual names are tried.
        classes: Names for its classes where the source says them otherwise or not at all.
    """

    hub: str
    train: int
    test: int
    num_classes: int
    layout: str
    read: Callable[[Path, bool], tuple[Part, Part] | None]
    label_column: str | None = None
    classes: tuple[str, ...] | None = None


def _read_cub(root: Path, partial: bool) -> tuple[Part, Part]:
    return archives.read_cub(root)


def _read_dogs(root: Path, partial: bool) -> tuple[Part, Part]:
    return archives.read_dogs(root)


def _cifar_reader(name: str) -> Callable[[Path, bool], tuple[Part, Part] | None]:
    def read(root: Path, partial: bool) -> tuple[Part, Part] | None:
        folder = cifar_binary.find_cifar(root, name)
        return None if folder is None else cifar_binary.read_cifar(folder, name, partial=partial)

    return read


def _idx_reader(name: str, classes: tuple[str, ...]) -> Callable[[Path, bool], tuple[Part, Part] | None]:
    def read(root: Path, partial: bool) -> tuple[Part, Part] | None:
        folder = idx.find_idx(root)
        return None if folder is None else idx.read_idx_parts(folder, name, classes)

    return read


DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PUBLISHED = {
    "cub200": Published(
        "bentrevett/caltech-ucsd-birds-200-2011", 5994, 5794, 200, archives.CUB_LAYOUT, _read_cub
    ),
    "stanford_dogs": Published("Donghyun99/Stanford-Dogs", 12000, 8580, 120, archives.DOGS_LAYOUT, _read_dogs),
    "cifar10": Published(
        "uoft-cs/cifar10", 50000, 10000, 10, "cifar-10-binary.tar.gz or its folder", _cifar_reader("cifar10")
    ),
    "cifar100": Published(
        "uoft-cs/cifar100", 50000, 10000, 100, "cifar-100-binary.tar.gz or its folder", _cifar_reader("cifar100"),
        "fine_label",
    ),
    "mnist": Published("ylecun/mnist", 60000, 10000, 10, idx.LAYOUT, _idx_reader("mnist", DIGITS), None, DIGITS),
    "fashion_mnist": Published(
        "zalando-datasets/fashion_mnist", 60000, 10000, 10, idx.LAYOUT, _idx_reader("fashion_mnist", CLOTHES), None,
        CLOTHES,
    ),
}  # fmt: skip
NAMES = ("digits", *PUBLISHED, "folder", "parquet")
# Which settings belong to which names ("hub": hub/OWNER/NAME).
SETTINGS: dict[str, tuple[str, ...]] = {
    "root": (*PUBLISHED, "folder"),
    "train": ("parquet", "folder"),
    "test": ("parquet", "folder"),
    "image_column": (*PUBLISHED, "parquet", "hub"),
    "label_column": (*PUBLISHED, "parquet", "hub"),
    "skip_broken": (*PUBLISHED, "parquet", "folder", "hub"),
    "partial": tuple(PUBLISHED),
}


# Sorted by class where they come from: their test images are shuffled, so that the first so many are a fair sample.
SORTED = ("cub200", "stanford_dogs", "folder", "hub")


def load_splits(
    name: str,
    *,
    root: str | Path | None = None,
    train: str | Path | None = None,
    test: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_share: float = 0.1,
    skip_broken: bool = False,
    partial: bool = False,
) -> Splits[Part]:
    """A dataset's training, validation and test images, as they are stored.

    Small pictures (up to 64 pixels) are decoded into memory, others stay encoded on disk until they are asked for;
    `Splits.prepared` makes them the size that a model wants.

    Args:
        name: "cub200", "stanford_dogs", "cifar10", "cifar100", "mnist", "fashion_mnist" (from the Hub, or from a local
            copy in ``root``); "digits" (5,000 MNIST digits, split in itself); "folder" (class folders in ``root/train``
            and ``root/test``, with ``root/val`` if there is one); "parquet"; or "hub/OWNER/NAME" for any other dataset
            of the Hub.
        root: For a named dataset a local copy: its official archive, packed or unpacked, or parquet files of the Hub
            (``train-00000-of-00001.parquet``, ...). For "folder" the folder above train and test, or one with classes.
        train: "parquet": the training file. "folder": the folder of training classes, if it is not in ``root``.
        test: The same for the test images; None: there are none, unless ``root`` has some.
        image_column: Column of the images in parquet files and on the Hub; None: "img" or "image".
        label_column: Column of the labels, integers; None: "label", "fine_label" or "labels".
        validation_share: Part of the training images that is held out with a fixed seed, rounded up; 0 for none. Not
            used for "digits" and where the dataset brings validation images of its own.
        skip_broken: Decode every picture once and leave out the broken ones, which are counted and logged. Otherwise a
            broken picture is an error when it is reached.
        partial: Accept a named dataset with other numbers of images or classes than published.

    Raises:
        ValueError: For an unknown name, a setting that the name does not have, a layout that is not the expected one,
            counts other than published, labels that are none, or a broken picture; files and rows are named.
        FileNotFoundError: If a file or folder does not exist.
        OSError: If the Hub cannot be reached; a local copy as ``root`` needs no network.
        ImportError: Where a package is missing that reads the source; names it.
    """
    kind = "hub" if name.startswith("hub/") else name
    if kind != "hub" and name not in NAMES:
        raise ValueError(f"data should be {', '.join(NAMES)} or hub/OWNER/NAME. Found {name!r}.")
    given = {"root": root, "train": train, "test": test, "image_column": image_column, "label_column": label_column}
    set_ = {setting for setting, value in given.items() if value is not None}
    set_ |= {setting for setting, value in (("skip_broken", skip_broken), ("partial", partial)) if value}
    for setting, kinds in SETTINGS.items():
        if setting in set_ and kind not in kinds:
            raise ValueError(f"{setting} does not belong to {name!r}, but to {', '.join(kinds)}.")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share should be in [0, 1). Found validation_share = {validation_share!r}.")
    if name == "digits":
        return digits()
    columns = (image_column, label_column)
    parts: Parts
    if name in PUBLISHED:
        parts = _read_published(name, None if root is None else Path(root), columns, partial)
    elif name == "folder":
        parts = _read_folders(root, train, test)
    elif name == "parquet":
        if train is None:
            raise ValueError("parquet needs train, the path of the training file.")
        parts = {part: read_parquet(Path(p), *columns) for part, p in (("train", train), ("test", test)) if p}
    else:
        parts = dict(read_hub(name.removeprefix("hub/"), *columns))
    return _split(_agreeing(parts), validation_share, skip_broken, mix=kind in SORTED)


def parquet(train: str | Path, test: str | Path | None, validation_share: float) -> Splits[ImageSet]:
    """Parquet files whose images have one size, all in memory; see `load_splits` for more.

    Args:
        train: The training file: a column ``img`` or ``image`` (PNG or JPEG bytes) and ``label``.
        test: The test file, or None.
        validation_share: Part of the training images that is held out with a fixed seed.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a column is missing, an image is broken (file and row are named) or sizes differ.
        ImportError: Where the package datasets is missing.
    """
    parts = _agreeing({part: read_parquet(Path(p)) for part, p in (("train", train), ("test", test)) if p})
    images = {part: in_memory(p)[0] if isinstance(p, EncodedImages) else p for part, p in parts.items()}
    held_in, validation = split_off(images["train"], validation_share, SPLIT_SEED, ("train", "validation"))
    return Splits(held_in, validation, images.get("test"))


def _read_published(name: str, root: Path | None, columns: tuple[str | None, str | None], partial: bool) -> Parts:
    known = PUBLISHED[name]
    image_column, label_column = columns
    columns = image_column, label_column or known.label_column
    parts: Parts
    if root is None:
        source = known.hub
        parts = dict(read_hub(known.hub, *columns))
        parts.pop("validation", None)  # ours is cut from train with our seed, wherever the data come from
        if "test" not in parts:
            raise ValueError(f"The dataset {known.hub} has no part test.")
    else:
        source = str(root)
        parts = _read_copy(
            name, root, columns, any(column is not None for column in (image_column, label_column)), partial
        )
    if known.classes is not None:
        parts = {part: _renamed(images, known.classes) for part, images in parts.items()}
    found = len(parts["train"]), len(parts["test"]), len(parts["train"].classes)
    if found != (known.train, known.test, known.num_classes) and not partial:
        raise ValueError(
            f"{name} should have {known.train} training and {known.test} test images of {known.num_classes} classes. "
            f"Found {found[0]}, {found[1]} and {found[2]} in {source}; partial=True (--data.partial) accepts them."
        )
    return parts


def _read_copy(
    name: str, root: Path, columns: tuple[str | None, str | None], asked_for_columns: bool, partial: bool
) -> Parts:
    """A local copy of a named dataset: parquet files of the Hub, or the official archive."""
    known = PUBLISHED[name]
    if not root.exists():
        raise FileNotFoundError(
            f"{root} does not exist; {name} can be read from {known.layout}, or from parquet files."
        )
    if root.is_dir():
        files = {part: find_parquet(root, part) for part in ("train", "test")}
        if any(files.values()):
            missing = [part for part, found in files.items() if not found]
            if missing:
                raise FileNotFoundError(
                    f"{root} should hold parquet files of train and test. Found none of {missing[0]}."
                )
            return {part: read_parquet_parts(found, f"{name} {part}", *columns) for part, found in files.items()}
    if asked_for_columns:
        raise ValueError(f"image_column and label_column belong to parquet files. Found none in {root}.")
    found = known.read(root, partial)
    if found is None:
        present = sorted(path.name for path in root.iterdir()) if root.is_dir() else [root.name]
        listed = ", ".join(present[:5]) or "nothing"
        raise ValueError(
            f"{root} should hold {known.layout}, or parquet files train*.parquet and test*.parquet. Found {listed}."
        )
    return dict(zip(("train", "test"), found, strict=True))


def _read_folders(root: str | Path | None, train: str | Path | None, test: str | Path | None) -> Parts:
    if root is None and train is None:
        raise ValueError("folder needs root, a folder with train and test, or train, a folder of classes.")
    folders = {} if root is None else find_parts(Path(root))
    folders |= {part: Path(path) for part, path in (("train", train), ("test", test)) if path is not None}
    return {part: open_folder(folder) for part, folder in folders.items()}


def _renamed(images: Part, classes: tuple[str, ...]) -> Part:
    """The known names for classes that have numbers or the same names spelt otherwise; other names are left alone."""
    own = images.classes
    numbers = own == tuple(str(i) for i in range(len(own))) and len(own) <= len(classes)
    same = [_letters(name) for name in own] == [_letters(name) for name in classes]
    return replace(images, classes=classes) if numbers or same else images


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _agreeing(parts: Parts) -> Parts:
    """All parts with the classes of the training images, labels numbered alike."""
    if all(part.classes == tuple(str(i) for i in range(len(part.classes))) for part in parts.values()):
        # Plain numbers: there are as many classes as the largest says.
        classes = max((part.classes for part in parts.values()), key=len)
        parts = {name: replace(part, classes=classes) for name, part in parts.items()}
    classes = parts["train"].classes
    for name, part in parts.items():
        if part.classes == classes:
            continue
        unknown = [c for c in part.classes if c not in classes]
        if unknown:
            raise ValueError(
                f"{part.name}: the {name} images should have classes of the training images. "
                f"Found {len(unknown)} others: {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}."
            )
        numbers = torch.tensor([classes.index(c) for c in part.classes])
        parts = {**parts, name: replace(part, labels=numbers[part.labels], classes=classes)}
    counts = torch.bincount(parts["train"].labels, minlength=len(classes))
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        logger.warning(
            "%s: %d of %d classes have no training image, the first is %s (label %d). Labels count from 0.",
            parts["train"].name, len(absent), len(classes), classes[absent[0]], absent[0],
        )  # fmt: skip
    return parts


def _split(parts: Parts, validation_share: float, skip_broken: bool, mix: bool) -> Splits[Part]:
    """Validation images held out, small pictures in memory, broken ones left out.

    With ``mix``, validation and test images are shuffled. Both are drawn from all images, so that a broken one changes
    the split and the order of no other.
    """
    indices = {name: (name, torch.arange(len(images))) for name, images in parts.items()}  # part -> source, rows
    if "validation" not in parts:
        kept, held_out = split_indices(len(parts["train"]), validation_share)
        indices["train"] = ("train", kept)
        if len(held_out):
            indices["validation"] = ("train", held_out)
    decoded, broken = _decoded(parts, skip_broken)
    found: dict[str, Part] = {}
    for name, (source, rows) in indices.items():
        images = decoded[source]
        if mix and name != "train":
            rows = rows[shuffled(len(rows))]
        left = torch.tensor([i for i in rows.tolist() if i not in broken[source]], dtype=torch.int64)
        found[name] = images.subset(left, _title(images.name, source, name))
    skipped = sum(len(rows) for rows in broken.values())
    return Splits(found["train"], found.get("validation"), found.get("test"), skipped)


def _decoded(parts: Parts, skip_broken: bool) -> tuple[Parts, dict[str, dict[int, str]]]:
    """Small pictures in memory, others as they are, and what is broken in each part (with ``skip_broken``)."""
    found, broken = dict(parts), {name: {} for name in parts}
    if all(isinstance(images, ImageSet) or is_small(images) for images in parts.values()):
        try:
            for name, images in parts.items():
                if isinstance(images, EncodedImages):
                    found[name], broken[name] = in_memory(images, skip_broken=skip_broken)
        except DifferentSizes:
            found, broken = dict(parts), {name: {} for name in parts}
    for name, images in found.items():
        if skip_broken and isinstance(images, EncodedImages):
            broken[name] = find_broken(images)
        if broken[name]:
            first = " ".join(list(broken[name].values())[:3])
            logger.warning(
                "%s: %d of %d pictures are broken and left out. %s", images.name, len(broken[name]), len(images), first
            )
    return found, broken


def _title(title: str, source: str, name: str) -> str:
    """What a part is called: "cifar10 train" held out becomes "cifar10 validation"."""
    if source == name:
        return title
    return f"{title.removesuffix(source).rstrip()} {name}".strip()
