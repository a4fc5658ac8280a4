"""Tiny datasets laid out as the official ones are: real JPEG and PNG pictures of several sizes, lists and all.

Plain functions, so that tests of other folders can load this file by its path.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani")
BREEDS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog", "n02102040-English_springer")
SIZES = ((80, 100), (96, 72), (75, 75), (110, 68))  # height and width, one after the other


def draw(index: int, label: int, size: tuple[int, int]) -> numpy.ndarray:
    """A picture of shape `[H, W, 3]`: smooth, its main colour says the class, with a little noise of its own."""
    height, width = size
    rows, columns = numpy.mgrid[0:height, 0:width]
    noise = numpy.random.default_rng(index).normal(0, 6, (height, width, 3))
    colour = numpy.array([(60 + 70 * label) % 200, (200 - 50 * label) % 200, (30 + 90 * label) % 200])
    wave = 30 * numpy.sin(rows / 9 + label) * numpy.cos(columns / 7 - index)
    return (colour + wave[..., None] + noise + 25).clip(0, 255).astype(numpy.uint8)


def encode(pixels: numpy.ndarray, kind: str = "JPEG") -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def pack(archive: Path, folder: Path, names: Sequence[str]) -> Path:
    """Put these members of a folder into a tar archive, compressed as its name says, and remove the folder."""
    mode = "w:gz" if archive.name.endswith(("gz", "tgz")) else "w"
    with tarfile.open(archive, mode) as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    shutil.rmtree(folder)
    return archive


def make_cub(folder: Path, *, classes: int = 3, train: int = 6, test: int = 3, packed: bool = False) -> Path:
    """CUB-200-2011 with so many images of each class: the folder ``CUB_200_2011``, or ``CUB_200_2011.tgz``."""
    top = folder / "unpacked" if packed else folder
    root = top / "CUB_200_2011"
    (root / "images").mkdir(parents=True)
    images, labels, flags = [], [], []
    number = 0
    for label, bird in enumerate(BIRDS[:classes]):
        (root / "images" / bird).mkdir()
        for index in range(train + test):
            number += 1
            file = f"{bird}/{bird[4:]}_{number:04}_{number + 7}.jpg"
            (root / "images" / file).write_bytes(encode(draw(number, label, SIZES[number % len(SIZES)])))
            images.append(f"{number} {file}\n")
            labels.append(f"{number} {label + 1}\n")
            flags.append(f"{number} {int(index % 3 != 2 if train == 2 * test else index < train)}\n")
    (root / "images.txt").write_text("".join(images))
    (root / "image_class_labels.txt").write_text("".join(labels))
    (root / "train_test_split.txt").write_text("".join(flags))
    (root / "classes.txt").write_text("".join(f"{i} {bird}\n" for i, bird in enumerate(BIRDS[:classes], start=1)))
    (root / "bounding_boxes.txt").write_text("")
    if not packed:
        return root
    (top / "attributes.txt").write_text("")  # it lies beside the folder in the official archive
    return pack(folder / "CUB_200_2011.tgz", top, ["CUB_200_2011", "attributes.txt"])


def make_dogs(folder: Path, *, classes: int = 3, train: int = 6, test: int = 3, packed: bool = False) -> Path:
    """Stanford Dogs in ``folder``: ``Images/`` and ``lists/*.mat``, or ``images.tar`` and ``lists.tar``."""
    from scipy.io import savemat

    top = folder / "unpacked" if packed else folder
    lists = top / "lists"
    lists.mkdir(parents=True)
    listed: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    number = 0
    for label, breed in enumerate(BREEDS[:classes]):
        (top / "Images" / breed).mkdir(parents=True)
        for index in range(train + test):
            number += 1
            file = f"{breed}/{breed.split('-')[0]}_{number}.jpg"
            (top / "Images" / file).write_bytes(encode(draw(number, label, SIZES[number % len(SIZES)])))
            files, labels = listed["train" if index < train else "test"]
            files.append(file)
            labels.append(label + 1)
    for part, (files, labels) in listed.items():
        cells = numpy.array(files, dtype=object)[:, None]
        annotations = numpy.array([file.removesuffix(".jpg") for file in files], dtype=object)[:, None]
        column = numpy.array(labels, dtype=numpy.uint8)[:, None]
        savemat(lists / f"{part}_list.mat", {"file_list": cells, "annotation_list": annotations, "labels": column})
    if packed:
        for name in ("train_list.mat", "test_list.mat"):
            shutil.copy(lists / name, top / name)  # the official archive has them without a folder
        shutil.rmtree(lists)
        with tarfile.open(folder / "lists.tar", "w") as tar:
            for name in ("train_list.mat", "test_list.mat"):
                tar.add(top / name, arcname=name)
        pack(folder / "images.tar", top, ["Images"])
    return folder


def make_cifar_parquet(
    folder: Path, name: str = "cifar10", *, train: int = 24, test: int = 10, classes: int | None = None
) -> Path:
    """CIFAR-10 or CIFAR-100 as its parquet files on the Hub, in ``folder``; the pictures are PNG."""
    import datasets

    classes = classes or {"cifar10": 10, "cifar100": 100}[name]
    labels = datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
    if name == "cifar10":
        features, place = {"img": datasets.Image(), "label": labels}, folder / "plain_text"
    else:
        coarse = datasets.ClassLabel(names=[f"group {i}" for i in range(20)])
        features, place = {"img": datasets.Image(), "fine_label": labels, "coarse_label": coarse}, folder / name
    place.mkdir(parents=True)
    for offset, (part, count) in enumerate((("train", train), ("test", test))):
        pictures = [encode(draw(1000 * offset + i, i % classes, (32, 32)), "PNG") for i in range(count)]
        columns: dict[str, list] = {"img": [{"bytes": picture, "path": None} for picture in pictures]}
        for column, divisor in zip(list(features)[1:], (1, 5), strict=False):
            columns[column] = [i % classes // divisor for i in range(count)]
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(place / f"{part}-00000-of-00001.parquet"))
    return folder


def make_class_folders(
    folder: Path,
    parts: Sequence[str] = ("train", "test"),
    *,
    classes: Sequence[str] = ("heron", "kingfisher", "wren"),
    count: int = 6,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Path:
    """Folders of classes with so many pictures each, JPEG and PNG in turn, below each part."""
    number = 0
    for part in parts or ("",):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for _ in range(count):
                number += 1
                kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
                pixels = draw(number, label, tuple(sizes[number % len(sizes)]))
                (folder / part / name / f"{number:03}.{suffix}").write_bytes(encode(pixels, kind))
    return folder


def make_idx(
    folder: Path, *, train: int = 20, test: int = 10, packed: bool = True
) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    """MNIST's four files; the pixels of shape `[N, 28, 28]` and labels of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    found = {}
    for part, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        labels = (numpy.arange(count) % 10).astype(numpy.uint8)
        found[part] = images, labels
        for array, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.tobytes()
            path = folder / f"{prefix}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return found


def make_cifar_binary(folder: Path, name: str = "cifar10", *, count: int = 4) -> dict[str, numpy.ndarray]:
    """CIFAR's binary version, so many records a file; the records of each part, label bytes first."""
    place = folder / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    place.mkdir(parents=True)
    generator = numpy.random.default_rng(1)
    label_bytes, classes = (1, 10) if name == "cifar10" else (2, 100)
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "cifar10" else ["train.bin"]
    found: dict[str, list[numpy.ndarray]] = {"train": [], "test": []}
    for file in (*train, "test_batch.bin" if name == "cifar10" else "test.bin"):
        records = generator.integers(0, 256, (count, label_bytes + 3072), dtype=numpy.uint8)
        records[:, label_bytes - 1] = generator.integers(0, classes, count)
        (place / file).write_bytes(records.tobytes())
        found["test" if file.startswith("test") else "train"].append(records)
    names = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
    (place / names).write_text("".join(f"class {i}\n" for i in range(classes)) + "\n")
    return {part: numpy.concatenate(records) for part, records in found.items()}
