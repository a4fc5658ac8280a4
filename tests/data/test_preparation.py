"""Images at the size that a model wants: places, sizes, epochs, workers."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import robust_peft.data.sets
from robust_peft.data import (
    EncodedImages,
    ImageSet,
    PreparedImages,
    Splits,
    evaluation_loader,
    load_images,
    load_splits,
    train_loader,
)

spec = importlib.util.spec_from_file_location("official_layouts", Path(__file__).with_name("official_layouts.py"))
assert spec is not None and spec.loader is not None
layouts: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Splits[Any]:
    """Encoded, of four sizes."""
    return load_splits("folder", root=layouts.make_class_folders(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def small() -> Splits[ImageSet]:
    """In memory, 12 x 10 pixels."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int, name: str) -> ImageSet:
        images = torch.randint(0, 256, (count, 3, 12, 10), generator=generator, dtype=torch.uint8)
        return ImageSet(images, torch.arange(count) % 3, ("a", "b", "c"), name)

    return Splits(part(11, "train"), part(4, "validation"), part(7, "test"))


def windows(image: Tensor, size: int) -> list[Tensor]:
    height, width = image.shape[1:]
    return [
        image[:, top : top + size, left : left + size]
        for top in range(height - size + 1)
        for left in range(width - size + 1)
    ]


def resized(images: Any, index: int, length: int) -> Tensor:
    """By Pillow for files, by torchvision for tensors."""
    if isinstance(images, ImageSet):
        chosen = images.images[index : index + 1]
        return functional.resize(chosen, [length], InterpolationMode.BICUBIC, antialias=True)[0]
    with Image.open(images.files[index]) as picture:
        short = min(picture.size)
        size = [int(length * side / short) for side in picture.size]
        pixels = numpy.array(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["pictures", "small"])
def test_training_images_are_windows_of_the_resized_picture(kind: str, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind)
    prepared = splits.prepared(28)  # resized to 32
    assert isinstance(prepared.train, PreparedImages) and len(prepared.train) == len(splits.train)
    assert prepared.train.classes == splits.classes and prepared.train.name == splits.train.name
    for index in range(len(prepared.train)):
        image, label, own = prepared.train[index]
        assert image.shape == (3, 28, 28) and image.dtype == torch.uint8 and image.is_contiguous()
        assert own == index and label == splits.train.labels[index]
        found = sum(torch.equal(image, window) for window in windows(resized(splits.train, index, 32), 28))
        assert found >= 1


@pytest.mark.parametrize("kind", ["pictures", "small"])
def test_other_images_are_cut_in_the_centre(kind: str, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind)
    prepared = splits.prepared(28, resize=30, crop=False)
    for part, source in ((prepared.train, splits.train), (prepared.validation, splits.validation)):
        for index in range(len(part)):
            whole = resized(source, index, 30)
            assert torch.equal(part[index][0], functional.center_crop(whole, [28, 28]))
    prepared.train.set_epoch(5)
    assert torch.equal(prepared.train[0][0], functional.center_crop(resized(splits.train, 0, 30), [28, 28]))


def test_as_an_evaluation_of_the_folder_reads_them(pictures: Splits[Any]) -> None:
    """A run's test images and the same folder given to an evaluation are the same pixels."""
    folder = pictures.test.files[0].parents[1]
    evaluated: Any = load_images(folder, image_size=28)
    prepared = pictures.prepared(28).test
    assert prepared is not None
    for index, file in enumerate(evaluated.files):
        assert torch.equal(evaluated[index][0], prepared[pictures.test.files.index(file)][0])


@pytest.mark.parametrize("kind", ["pictures", "small"])
def test_places_belong_to_seed_epoch_and_sample(kind: str, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind)

    def images(seed: int = 0, epoch: int = 0, order: list[int] | None = None) -> dict[int, Tensor]:
        train = splits.prepared(16, resize=32, seed=seed).train
        train.set_epoch(epoch)
        order = list(range(len(train))) if order is None else order
        return {index: image for image, _, index in train.__getitems__(order)}

    def same(one: dict[int, Tensor], two: dict[int, Tensor]) -> int:
        return sum(torch.equal(one[index], two[index]) for index in one)

    first, state = images(), torch.get_rng_state()
    count = len(first)
    assert same(first, images()) == count
    assert same(first, images(order=list(reversed(range(count))))) == count
    alone = splits.prepared(16, resize=32).train
    assert same(first, {index: alone[index][0] for index in range(count)}) == count
    assert same(first, images(epoch=1)) <= count // 4 and same(first, images(seed=1)) <= count // 4
    assert torch.equal(torch.get_rng_state(), state)


def test_places_are_uniform() -> None:
    """Each pixel of this image says where it is; 9 places, 1,800 samples."""
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(1800, 3, 6, 6)
    images = ImageSet(image, torch.zeros(1800, dtype=torch.int64), ("a",))
    train = Splits(images, None, None).prepared(4, resize=6).train
    corners = torch.stack([sample[0][0, 0, 0] for sample in train.__getitems__(range(1800))])
    seen = torch.bincount(corners.long(), minlength=15)[[0, 1, 2, 6, 7, 8, 12, 13, 14]].double()
    assert seen.sum() == 1800 and ((seen - 200) ** 2 / 200).sum() < 40  # chi-squared, 8 degrees: a chance of 3e-6


def test_images_of_the_size_are_left_as_they_are(tmp_path: Path, small: Splits[ImageSet]) -> None:
    layouts.make_class_folders(tmp_path, sizes=[(70, 70)])
    splits = load_splits("folder", root=tmp_path)
    prepared = splits.prepared(70)
    assert isinstance(splits.test, EncodedImages) and prepared.test is not None
    assert all(torch.equal(prepared.test[i][0], splits.test[i][0]) for i in range(len(splits.test)))
    assert torch.equal(prepared.train[0][0], splits.train[0][0])  # else training images alone would be enlarged
    assert not torch.equal(splits.prepared(70, resize=80).train[0][0], splits.train[0][0])
    assert not torch.equal(splits.prepared(70, resize=80).test[0][0], splits.test[0][0])
    square = ImageSet(small.train.images[..., :10, :], small.train.labels, small.classes)
    same = Splits(square, None, None).prepared(10, crop=False).train
    assert torch.equal(torch.stack([sample[0] for sample in same]), square.images)


def test_floats_stay_in_the_box() -> None:
    edge = torch.zeros(2, 3, 8, 8)
    edge[..., 4:] = 1  # bicubic interpolation overshoots on both sides
    train = Splits(ImageSet(edge, torch.zeros(2, dtype=torch.int64), ("a",)), None, None).prepared(14).train
    image = train[0][0]
    assert image.dtype == torch.float32 and image.min() == 0 and image.max() == 1


def test_memory_holds_only_what_is_asked_for(small: Splits[ImageSet]) -> None:
    prepared = small.prepared(224)
    assert prepared.train.source is small.train and prepared.train[0][0].shape == (3, 224, 224)


def test_limited_before_and_after(pictures: Splits[Any]) -> None:
    few = pictures.prepared(28).limited(5)
    assert [len(part) for part in (few.train, few.validation, few.test)] == [5, 2, 5]
    assert few.train[4][2] == 4 and torch.equal(few.train.labels, pictures.limited(5).train.labels)
    again = pictures.limited(5).prepared(28)
    assert all(torch.equal(few.train[i][0], again.train[i][0]) for i in range(5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 0}, "image_size should be an integer of at least 1. Found image_size = 0"),
        ({"image_size": 28, "resize": 27}, "resize should be at least image_size = 28. Found resize = 27"),
        ({"image_size": 28, "resize": True}, "resize should be an integer"),
        ({"resize": 30}, "resize needs image_size"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], said: str, small: Splits[ImageSet]) -> None:
    with pytest.raises(ValueError, match=said):
        small.prepared(**options)


def test_prepared_once(small: Splits[ImageSet]) -> None:
    assert small.prepared() is small
    with pytest.raises(ValueError, match="train is prepared already, for images of 28 pixels"):
        small.prepared(28).prepared(28)


# Loaders


def batches(loader: DataLoader) -> list[list[Tensor]]:
    return [list(batch) for batch in loader]


@pytest.mark.parametrize("kind", ["pictures", "small"])
def test_workers_change_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind).prepared(28, seed=3)
    found = []
    for workers in (0, 2):
        loader = train_loader(splits.train, 4, seed=7, workers=workers)
        epochs = []
        for epoch in range(2):
            splits.train.set_epoch(epoch)
            epochs += batches(loader)
        found.append(epochs + batches(evaluation_loader(splits.test, 4, workers=workers)))
    assert len(found[0]) == len(found[1]) >= 5
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        images, labels, indices = one
        assert images.dtype == torch.uint8 and labels.dtype == indices.dtype == torch.int64
    half = len(train_loader(splits.train, 4))
    assert not all(torch.equal(a[2], b[2]) for a, b in zip(found[0][:half], found[0][half : 2 * half], strict=True))


def test_one_decode_for_each_image_and_epoch(pictures: Splits[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    original = robust_peft.data.sets.decode
    monkeypatch.setattr("robust_peft.data.sets.decode", lambda file: (decoded.append(file), original(file))[1])
    prepared = pictures.prepared(28)
    assert decoded == []
    for _ in range(2):
        batches(train_loader(prepared.train, len(prepared.train)))
        assert sorted(decoded) == sorted(pictures.train.files)
        decoded.clear()


def test_pictures_of_several_sizes_make_no_batch(pictures: Splits[Any]) -> None:
    with pytest.raises(ValueError, match=r"should have one size. Found 4, .*splits.prepared\(image_size\)"):
        batches(evaluation_loader(pictures.test, 18))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_in_one_line(workers: int, tmp_path: Path) -> None:
    layouts.make_class_folders(tmp_path)
    path = tmp_path / "test" / "wren" / "036.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    test = load_splits("folder", root=tmp_path).prepared(28).test
    with pytest.raises(ValueError, match="036.jpg: the image cannot be decoded") as caught:
        batches(evaluation_loader(test, 6, workers=workers))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_plain_loaders_and_pickle(pictures: Splits[Any], small: Splits[ImageSet]) -> None:
    for splits in (pictures, small):
        test = splits.prepared(28).test
        whole = next(iter(DataLoader(pickle.loads(pickle.dumps(test)), batch_size=4)))
        assert torch.equal(whole[0], torch.stack([test[i][0] for i in range(4)]))
        assert torch.equal(whole[1], test.labels[:4]) and whole[2].tolist() == [0, 1, 2, 3]
