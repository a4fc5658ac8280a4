"""Named datasets from tiny copies in the official layouts, and everything that is refused in one line."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from robust_peft.data import EncodedImages, ImageSet, Splits, catalog, load_splits
from robust_peft.data.splits import split_indices
from robust_peft.data.unpacking import unpack, unpacked_folder

spec = importlib.util.spec_from_file_location("official_layouts", Path(__file__).with_name("official_layouts.py"))
assert spec is not None and spec.loader is not None
layouts: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def refusal(name: str, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_splits(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts_of(splits: Splits[Any]) -> dict[str, Any]:
    return {
        name: getattr(splits, name) for name in ("train", "validation", "test") if getattr(splits, name) is not None
    }


def sizes(splits: Splits[Any]) -> list[int]:
    return [len(part) for part in parts_of(splits).values()]


def files_of(part: EncodedImages) -> list[str]:
    return [Path(str(file)).name for file in part.files]


# Splits


@pytest.mark.parametrize(
    ("count", "published"), [(5994, (5394, 600)), (12000, (10800, 1200)), (50000, (45000, 5000)), (30, (27, 3))]
)
def test_ten_percent_of_train_are_the_published_splits(count: int, published: tuple[int, int]) -> None:
    kept, held_out = split_indices(count, 0.1)
    assert (len(kept), len(held_out)) == published
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(count))
    assert torch.equal(held_out, split_indices(count, 0.1)[1])


@pytest.mark.parametrize(
    ("name", "counts"),
    [("cub200", (5394, 600, 5794)), ("stanford_dogs", (10800, 1200, 8580)), ("cifar100", (45000, 5000, 10000))],
)
def test_full_sized_lists_pass_the_count_check(
    name: str, counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of the official length, without the pictures."""
    known = catalog.PUBLISHED[name]
    picture = tmp_path / "one.png"
    Image.new("RGB", (80, 80)).save(picture)

    def listed(count: int) -> EncodedImages:
        classes = tuple(f"class {i}" for i in range(known.num_classes))
        return EncodedImages([picture] * count, torch.arange(count) % known.num_classes, classes, name)

    found = {"train": listed(known.train), "test": listed(known.test)}
    monkeypatch.setattr(catalog, "read_hub", lambda *_: dict(found))
    assert tuple(sizes(load_splits(name))) == counts
    found["train"] = listed(known.train - 1)
    message = refusal(name)
    assert f"{known.train} training and {known.test} test images of {known.num_classes} classes" in message
    assert f"Found {known.train - 1}, {known.test}" in message and "--data.partial" in message
    assert sum(sizes(load_splits(name, partial=True))) == known.train - 1 + known.test


# CUB and Dogs


CUB_ROOTS: dict[str, Callable[[Path], Path]] = {
    "its folder": lambda folder: layouts.make_cub(folder),
    "the folder above": lambda folder: layouts.make_cub(folder).parent,
    "the archive": lambda folder: layouts.make_cub(folder, packed=True),
    "the archive's folder": lambda folder: layouts.make_cub(folder, packed=True).parent,
}


@pytest.mark.parametrize("kind", CUB_ROOTS)
def test_cub(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    root = CUB_ROOTS[kind](tmp_path / "x")
    splits = load_splits("cub200", root=root, partial=True)
    assert sizes(splits) == [16, 2, 9] and splits.skipped == 0
    assert splits.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    assert isinstance(splits.test, EncodedImages)
    # The lists mark each third image as test; a file's number and folder say which image it is.
    for part in parts_of(splits).values():
        for file, label in zip(part.files, part.labels.tolist(), strict=True):
            number = int(file.name.split("_")[-2])
            assert file.parent.name == splits.classes[label]
            assert ((number - 1) % 9 % 3 == 2) == (part is splits.test)
    numbers = [n for part in parts_of(splits).values() for n in files_of(part)]
    assert len(set(numbers)) == 27
    image, label, index = splits.test[4]
    assert image.dtype == torch.uint8 and index == 4 and label == splits.test.labels[4]
    expected = numpy.asarray(Image.open(str(splits.test.files[4])))
    assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_dogs(packed: bool, tmp_path: Path) -> None:
    root = layouts.make_dogs(tmp_path / "dogs", packed=packed)
    splits = load_splits("stanford_dogs", root=root, partial=True, validation_share=0)
    assert splits.validation is None and sizes(splits) == [18, 9]
    assert splits.classes == ("Chihuahua", "Japanese_spaniel", "Maltese_dog")
    for part in parts_of(splits).values():
        for file, label in zip(part.files, part.labels.tolist(), strict=True):
            assert file.parent.name.split("-", 1)[1] == splits.classes[label]
    assert splits.train[0][0].shape[0] == 3


def test_archives_are_unpacked_once(tmp_path: Path) -> None:
    archive = layouts.make_cub(tmp_path, packed=True)
    folder = unpack(archive)
    assert folder == unpacked_folder(archive) and folder.parent == tmp_path / "hub" / "robust_peft" / "archives"
    (folder / "mark").touch()
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(unpack(archive))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [folder] * 3 and (folder / "mark").exists()
    os.utime(archive, ns=(1, 1))  # another file as far as one can tell
    again = unpack(archive)
    assert again != folder and not (again / "mark").exists() and (again / "CUB_200_2011" / "images.txt").exists()


def test_an_archive_that_leaves_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("../../escaped.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    message = refusal("cub200", root=archive)
    assert str(archive) in message and "refused" in message and "escaped.txt" in message
    assert not list(tmp_path.rglob("escaped.txt")) and not unpacked_folder(archive).exists()
    assert [p.name for p in unpacked_folder(archive).parent.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    archive = layouts.make_cub(tmp_path, packed=True)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>not found</html>")
    message = refusal("cub200", root=archive)
    assert str(archive) in message and "is it a tar archive, and complete?" in message
    assert not unpacked_folder(archive).exists()


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


CUB_FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "list missing": (lambda r: (r / "classes.txt").unlink(), ValueError, "Found no classes.txt among"),
    "picture missing": (
        lambda r: next((r / "images").rglob("*_0001_*")).unlink(),
        FileNotFoundError,
        "1 of 18 listed pictures do not exist, the first is",
    ),
    "broken line": (
        lambda r: edit(r / "images.txt", lambda text: text.replace("\n2 ", "\ntwo ", 1)),
        ValueError,
        "images.txt, line 2: should be a new number",
    ),
    "lists differ": (
        lambda r: edit(r / "image_class_labels.txt", lambda text: text.rsplit("\n", 2)[0] + "\n"),
        ValueError,
        "Image 27 is in one only",
    ),
    "unknown class": (
        lambda r: edit(r / "image_class_labels.txt", lambda text: text.replace("5 1\n", "5 9\n", 1)),
        ValueError,
        "image 5 is of class 9",
    ),
    "third part": (
        lambda r: edit(r / "train_test_split.txt", lambda text: text.replace("4 1\n", "4 2\n", 1)),
        ValueError,
        "image 4 should be marked 0 or 1. Found 2",
    ),
}


@pytest.mark.parametrize("fault", CUB_FAULTS)
def test_cub_laid_out_otherwise(fault: str, tmp_path: Path) -> None:
    root = layouts.make_cub(tmp_path)
    damage, kind, said = CUB_FAULTS[fault]
    damage(root)
    assert said in refusal("cub200", kind, root=root, partial=True)


def test_dogs_laid_out_otherwise(tmp_path: Path) -> None:
    root = layouts.make_dogs(tmp_path / "dogs")
    (root / "lists" / "test_list.mat").write_bytes(b"no matrix")
    assert "test_list.mat should be a .mat file" in refusal("stanford_dogs", root=root)
    (root / "lists" / "test_list.mat").unlink()
    assert "Found no test_list.mat" in refusal("stanford_dogs", root=root)
    (root / "lists" / "train_list.mat").unlink()
    message = refusal("stanford_dogs", root=root)
    assert "images.tar and lists.tar" in message and "Found no lists among Images, lists" in message


def test_dogs_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.make_dogs(tmp_path / "dogs")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in refusal("stanford_dogs", ImportError, root=root)


# CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_parquet(name: str, tmp_path: Path) -> None:
    layouts.make_cifar_parquet(tmp_path / "x", name, train=40)
    splits = load_splits(name, root=tmp_path / "x", partial=True)
    assert sizes(splits) == [36, 4, 10] and len(splits.classes) == {"cifar10": 10, "cifar100": 100}[name]
    assert isinstance(splits.test, ImageSet) and splits.test.images.shape == (10, 3, 32, 32)
    assert splits.test.labels.tolist() == list(range(10))
    for index in range(10):
        expected = torch.from_numpy(layouts.draw(1000 + index, index, (32, 32))).permute(2, 0, 1)
        assert torch.equal(splits.test.images[index], expected)
    assert "Found 40, 10 and" in refusal(name, root=tmp_path / "x")


def test_cifar_with_coarse_labels(tmp_path: Path) -> None:
    layouts.make_cifar_parquet(tmp_path, "cifar100")
    splits = load_splits("cifar100", root=tmp_path, partial=True, label_column="coarse_label")
    assert isinstance(splits.test, ImageSet)
    assert len(splits.classes) == 20 and splits.test.labels.tolist() == [i // 5 for i in range(10)]
    message = refusal("cifar100", root=tmp_path, partial=True, label_column="species")
    assert "no column species. Found img, fine_label, coarse_label" in message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_binary(name: str, packed: bool, tmp_path: Path) -> None:
    records = layouts.make_cifar_binary(tmp_path / "x", name)
    root = tmp_path / "x"
    if packed:
        (folder,) = [path.name for path in root.iterdir()]
        archive = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
        root = layouts.pack(tmp_path / archive, root, [folder])
    splits = load_splits(name, root=root, partial=True, validation_share=0)
    label_bytes = 1 if name == "cifar10" else 2
    for part, images in parts_of(splits).items():
        assert images.labels.tolist() == records[part][:, label_bytes - 1].tolist()
        assert numpy.array_equal(images.images.numpy().reshape(len(images), -1), records[part][:, label_bytes:])
    assert splits.classes[:2] == ("class 0", "class 1")


def test_cifar_binary_that_is_broken(tmp_path: Path) -> None:
    layouts.make_cifar_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[3073 * 2] = 11
    path.write_bytes(content)
    assert f"{path}, row 2: the label should be in 0..9. Found 11" in refusal("cifar10", root=tmp_path, partial=True)
    path.write_bytes(content[:-1])
    assert "whole records of 3073 bytes. Found 12291" in refusal("cifar10", root=tmp_path)
    path.unlink()
    assert "Found no test_batch.bin" in refusal("cifar10", FileNotFoundError, root=tmp_path)


@pytest.mark.parametrize("place", ["cifar-10-batches-py/data_batch_1", "data_batch_1", "cifar-10-python.tar.gz"])
def test_pickled_cifar_is_not_read(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    for root in (tmp_path, path) if place.endswith("gz") else (tmp_path,):
        message = refusal("cifar10", root=root)
        assert "pickle" in message or "should hold" in message
    message = refusal("cifar10", root=path if place.endswith("gz") else tmp_path)
    assert str(path) in message and "is pickled" in message and "cifar-10-binary.tar.gz" in message


def test_shards_are_one_set(tmp_path: Path) -> None:
    for shard in range(2):
        layouts.make_cifar_parquet(tmp_path / str(shard), train=10 + shard)
        source = tmp_path / str(shard) / "plain_text"
        (tmp_path / "x" / "data").mkdir(parents=True, exist_ok=True)
        (source / "train-00000-of-00001.parquet").rename(
            tmp_path / "x" / "data" / f"train-0000{shard}-of-00002.parquet"
        )
        (source / "test-00000-of-00001.parquet").replace(tmp_path / "x" / "data" / "test-00000-of-00001.parquet")
    splits = load_splits("cifar10", root=tmp_path / "x", partial=True, validation_share=0)
    assert splits.train.labels.tolist() == [*range(10), *range(10), 0]
    (tmp_path / "x" / "data" / "train-00000-of-00002.parquet").unlink()
    assert "should hold 00002 train files. Found 1" in refusal("cifar10", root=tmp_path / "x")
    (tmp_path / "x" / "data" / "train-00001-of-00002.parquet").unlink()
    assert "Found none of train" in refusal("cifar10", FileNotFoundError, root=tmp_path / "x")


# MNIST


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize(("name", "packed"), [("mnist", True), ("fashion_mnist", False)])
def test_idx(name: str, packed: bool, below: str, tmp_path: Path) -> None:
    found = layouts.make_idx(tmp_path / below, packed=packed)
    splits = load_splits(name, root=tmp_path, partial=True, validation_share=0)
    assert splits.classes[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]
    for part, images in parts_of(splits).items():
        pixels, labels = found[part]
        assert images.images.shape == (len(pixels), 3, 28, 28) and images.labels.tolist() == labels.tolist()
        assert all(numpy.array_equal(images.images[:, channel].numpy(), pixels) for channel in range(3))
    assert sizes(load_splits(name, root=tmp_path, partial=True)) == [18, 2, 10]


def test_idx_that_is_broken(tmp_path: Path) -> None:
    layouts.make_idx(tmp_path, packed=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([10]))
    assert "labels should be in 0..9" in (message := refusal("mnist", root=tmp_path)) and "row 9" in message
    path.write_bytes(content[:-1])
    assert f"{path} should have 10 values, as its head says. Found 9" in refusal("mnist", root=tmp_path)
    path.write_bytes(content[:4] + (9).to_bytes(4, "big") + content[8:-1])
    assert "should have 10 labels" in refusal("mnist", root=tmp_path)
    path.write_bytes(b"<html>")
    assert "should begin as IDX with 1 dimensions" in refusal("mnist", root=tmp_path)
    path.with_suffix(".gz").write_bytes(b"<html>")
    path.unlink()
    assert "cannot be unpacked" in refusal("mnist", root=tmp_path)
    path.with_suffix(".gz").unlink()
    assert "Found no t10k-labels-idx1-ubyte" in refusal("mnist", FileNotFoundError, root=tmp_path)


@pytest.mark.parametrize("name", [name for name in catalog.PUBLISHED])
def test_what_is_no_copy(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    message = refusal(name, root=tmp_path)
    assert str(tmp_path) in message and "Found" in message and "notes.txt" in message
    assert f"{tmp_path / 'absent'} does not exist" in refusal(name, FileNotFoundError, root=tmp_path / "absent")


# Folders and parquet files


def test_folders(tmp_path: Path) -> None:
    layouts.make_class_folders(tmp_path, ("train", "test"))
    splits = load_splits("folder", root=tmp_path)
    assert sizes(splits) == [16, 2, 18] and splits.classes == ("heron", "kingfisher", "wren")
    assert [part.name for part in parts_of(splits).values()] == ["train", "validation", "test"]
    for part in parts_of(splits).values():
        assert [Path(str(f)).parent.name for f in part.files] == [splits.classes[i] for i in part.labels.tolist()]
    apart = load_splits("folder", train=tmp_path / "train", test=tmp_path / "test")
    assert files_of(apart.train) == files_of(splits.train) and files_of(apart.test) == files_of(splits.test)
    alone = load_splits("folder", root=tmp_path / "train")
    assert alone.test is None and files_of(alone.train) == files_of(splits.train)


def test_a_folder_with_validation_images(tmp_path: Path) -> None:
    layouts.make_class_folders(tmp_path, ("Train", "val"))
    splits = load_splits("folder", root=tmp_path, validation_share=0.5)
    assert sizes(splits) == [18, 18] and splits.test is None  # none is held out


def test_test_images_have_the_training_classes_numbers(tmp_path: Path) -> None:
    layouts.make_class_folders(tmp_path, ("train",), classes=("a", "b", "c"))
    layouts.make_class_folders(tmp_path, ("test",), classes=("a", "c"), count=1)
    splits = load_splits("folder", root=tmp_path)
    assert splits.test is not None and sorted(splits.test.labels.tolist()) == [0, 2] and len(splits.test.classes) == 3
    layouts.make_class_folders(tmp_path, ("test",), classes=("zebra",), count=1)
    assert "Found 1 others: zebra" in refusal("folder", root=tmp_path)


def test_the_first_test_images_are_a_fair_sample(tmp_path: Path) -> None:
    """Lists and folders come class by class; what is measured with a limit must not be the first classes alone."""
    layouts.make_class_folders(tmp_path / "folder", count=12)
    splits = [load_splits("folder", root=tmp_path / "folder")]
    splits += [load_splits("cub200", root=layouts.make_cub(tmp_path, test=12), partial=True)]
    for found in splits:
        assert found.test is not None and len(found.test) == 36
        assert len(set(found.test.labels[:12].tolist())) == 3
        assert torch.bincount(found.test.labels).tolist() == [12] * 3


def test_folders_that_are_refused(tmp_path: Path) -> None:
    assert "absent is no folder" in refusal("folder", FileNotFoundError, root=tmp_path / "absent")
    assert "Found none" in refusal("folder", FileNotFoundError, root=tmp_path)
    layouts.make_class_folders(tmp_path, ("val", "test"), count=1)
    assert "should hold a folder train beside val, test" in refusal("folder", root=tmp_path)
    layouts.make_class_folders(tmp_path, ("train", "dev"), count=1)
    assert "one folder of validation images. Found dev, val" in refusal("folder", root=tmp_path)
    assert "needs root" in refusal("folder")


def write_parquet(path: Path, pictures: list[Any], labels: list[int], **names: str) -> Path:
    image, label = names.get("image", "image"), names.get("label", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.Value("int64")})
    rows = {image: [p and {"bytes": p, "path": None} for p in pictures], label: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def big(index: int) -> bytes:
    return layouts.encode(layouts.draw(index, index, layouts.SIZES[index % 4]))


def test_large_pictures_in_parquet_stay_encoded(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [big(i) for i in range(5)], [0, 1, 0, 1, 0], label="kind")
    test = write_parquet(tmp_path / "test.parquet", [big(i) for i in range(3)], [0, 2, 1], label="kind")
    splits = load_splits("parquet", train=train, test=test, label_column="kind", validation_share=0.2)
    assert sizes(splits) == [4, 1, 3] and all(isinstance(part, EncodedImages) for part in parts_of(splits).values())
    assert splits.classes == ("0", "1", "2")  # plain numbers: the largest of all parts
    assert "no column img or image" not in (message := refusal("parquet", train=train))
    assert "no column label or fine_label or labels. Found image, kind" in message
    assert "no column photo. Found" in refusal("parquet", train=train, image_column="photo", label_column="kind")
    assert "needs train" in refusal("parquet", test=test)


def test_labels_that_leave_classes_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_parquet(tmp_path / "train.parquet", [big(i) for i in range(3)], [1, 2, 1])
    with caplog.at_level(logging.WARNING, "robust_peft"):
        load_splits("parquet", train=path, validation_share=0)
    assert "1 of 3 classes have no training image, the first is 0" in caplog.text
    path = write_parquet(tmp_path / "wrong.parquet", [big(i) for i in range(3)], [1, -2, 1])
    message = refusal("parquet", train=path)
    assert f"{path}, row 1" in message and "Found labels from -2 to 1" in message


# Broken pictures


@pytest.mark.parametrize("small", [False, True])
def test_broken_pictures_are_left_out_and_counted(
    small: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layouts.make_class_folders(tmp_path, ("train", "test"), sizes=[(20, 24)] if small else layouts.SIZES)
    whole = load_splits("folder", root=tmp_path)
    (tmp_path / "train" / "wren" / "017.png").write_bytes(b"no picture")
    path = tmp_path / "test" / "heron" / "020.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING, "robust_peft"):
        splits = load_splits("folder", root=tmp_path, skip_broken=True)
    assert splits.skipped == 2 and sum(sizes(splits)) == 34 and len(splits.test or ()) == 17
    assert "train: 1 of 18 pictures are broken" in caplog.text and "017.png: the image cannot be decoded" in caplog.text
    assert "test: 1 of 18" in caplog.text and "020.jpg" in caplog.text
    # The split of all others is what it was.
    for part, before in zip(parts_of(splits).values(), parts_of(whole).values(), strict=True):
        assert isinstance(part, ImageSet if small else EncodedImages) and len(before) - len(part) in (0, 1)
        if not small:
            assert [f for f in files_of(before) if f not in ("017.png", "020.jpg")] == files_of(part)
    if small:
        assert "017.png: the image cannot be decoded" in refusal("folder", root=tmp_path)
        return
    reached = load_splits("folder", root=tmp_path)
    assert reached.skipped == 0 and reached.test is not None
    with pytest.raises(ValueError, match="020.jpg: the image cannot be decoded"):
        list(reached.test)


def test_broken_rows_of_parquet(tmp_path: Path) -> None:
    pictures = [layouts.encode(layouts.draw(i, i, (16, 16)), "PNG") for i in range(6)]
    pictures[3], pictures[4] = pictures[3][:50], None
    path = write_parquet(tmp_path / "x.parquet", pictures, [0, 1, 2, 0, 1, 2])
    assert f"{path}, row 3: the image cannot be decoded" in refusal("parquet", train=path)
    splits = load_splits("parquet", train=path, skip_broken=True, validation_share=0)
    assert splits.skipped == 2 and splits.train.labels.tolist() == [0, 1, 2, 2]
    path = write_parquet(tmp_path / "y.parquet", [b"x", b"y"], [0, 1])
    assert "is empty" in refusal("parquet", train=path, skip_broken=True, validation_share=0)


# The Hub


def as_on_the_hub(**parts: list[int]) -> datasets.DatasetDict:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [{"bytes": big(i), "path": None} for i in range(len(labels))], "label": labels}, features
            )
            for name, labels in parts.items()
        }
    )


def test_any_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = as_on_the_hub(train=[0, 1, 2, 0, 1], valid=[2, 1], test=[1])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (asked.append(name), whole)[1])
    splits = load_splits("hub/someone/pets")
    assert asked == ["someone/pets"] and sizes(splits) == [5, 2, 1] and splits.classes == ("a", "b", "c")
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1] and splits.train[1][0].shape == (3, 96, 72)
    assert "someone/pets train has no column photo. Found image, label" in refusal(
        "hub/someone/pets", image_column="photo"
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: as_on_the_hub(test=[0]))
    assert "no part train. Found test" in refusal("hub/someone/pets")
    assert "hub/OWNER/NAME. Found hub/pets" in refusal("hub/pets")


@pytest.mark.parametrize("name", ["cub200", "cifar10", "hub/someone/pets"])
def test_without_network(name: str) -> None:
    """The tests run offline, so this is the real answer."""
    message = refusal(name, OSError)
    known = catalog.PUBLISHED.get(name)
    assert (known.hub if known else "someone/pets") in message and "--data.root" in message


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found pets.py"), ValueError, "script of its own"),
        (ValueError("Config name is missing.\nPlease pick one"), ValueError, "Config name is missing. Please pick one"),
        (ConnectionError("no route\nto host"), OSError, "no route to host"),
        (datasets.exceptions.DatasetNotFoundError("absent"), FileNotFoundError, "The Hub has no dataset someone/pets"),
    ],
)
def test_what_the_hub_may_answer(
    error: Exception, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("hub/someone/pets", kind)
    assert said in message and "someone/pets" in message


# Settings


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("birds", {}, "Found 'birds'"),
        ("digits", {"root": "x"}, "root does not belong to 'digits'"),
        ("cifar10", {"train": "x"}, "train does not belong to 'cifar10'"),
        ("folder", {"image_column": "x"}, "image_column does not belong to 'folder'"),
        ("folder", {"partial": True}, "partial does not belong to 'folder'"),
        ("hub/a/b", {"root": "x"}, "root does not belong to 'hub/a/b'"),
        ("cifar10", {"validation_share": 1.0}, "validation_share should be in [0, 1)"),
    ],
)
def test_settings_that_do_not_belong(name: str, options: dict[str, Any], said: str) -> None:
    assert said in refusal(name, **options)


def test_columns_without_a_table(tmp_path: Path) -> None:
    layouts.make_idx(tmp_path)
    assert "belong to parquet files" in refusal("mnist", root=tmp_path, image_column="image")
