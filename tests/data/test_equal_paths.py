"""One dataset by name, as a folder and as parquet: equal pixels and labels. On real data where they are at hand."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from robust_peft.data import ImageSet, Splits, load_splits
from robust_peft.data.splits import shuffled

spec = importlib.util.spec_from_file_location("official_layouts", Path(__file__).with_name("official_layouts.py"))
assert spec is not None and spec.loader is not None
layouts: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"  # beside the project's folder
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def check_equal_paths(named: Splits[Any], folder: Path, count: int) -> None:
    """The first ``count`` images of each part, written without loss, come back the same from folder and parquet."""
    classes = named.classes
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
    safe = [name.replace("/", "-") for name in classes]
    for part in ("train", "test"):
        images = getattr(named, part)
        assert isinstance(images, ImageSet)
        pictures = []
        for index in range(count):
            pixels, label, _ = images[index]
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": None})
            # The class's number leads its name, so that folders are numbered as the classes are.
            place = folder / part / f"{int(label):02} {safe[int(label)]}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:05}.png").write_bytes(file.getvalue())
        rows = {"image": pictures, "label": images.labels[:count].tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{part}.parquet"))
    paths = {"train": folder / "train.parquet", "test": folder / "test.parquet"}
    from_parquet = load_splits("parquet", **paths, validation_share=0)
    from_folder = load_splits("folder", root=folder, validation_share=0)
    assert from_parquet.classes == classes
    assert from_folder.classes == tuple(f"{i:02} {name}" for i, name in enumerate(safe))
    for part in ("train", "test"):
        whole, table, files = (getattr(splits, part) for splits in (named, from_parquet, from_folder))
        assert torch.equal(table.images, whole.images[:count]) and torch.equal(table.labels, whole.labels[:count])
        order = torch.argsort(whole.labels[:count], stable=True)  # folders come class by class, files by name
        if part == "test":
            order = order[shuffled(count)]
        assert torch.equal(files.images, whole.images[order]) and torch.equal(files.labels, whole.labels[order])


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"CIFAR-10 is not in {CIFAR}")
def test_cifar10(tmp_path: Path) -> None:
    named = load_splits("cifar10", root=CIFAR, validation_share=0)
    assert len(named.train) == 50000 and named.test is not None and len(named.test) == 10000
    assert torch.bincount(named.test.labels).tolist() == [1000] * 10
    check_equal_paths(named, tmp_path, 300)


def test_a_tiny_cifar10(tmp_path: Path) -> None:
    layouts.make_cifar_parquet(tmp_path / "hub", train=40, test=40)
    named = load_splits("cifar10", root=tmp_path / "hub", validation_share=0, partial=True)
    check_equal_paths(named, tmp_path / "x", 30)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist(tmp_path: Path) -> None:
    named = load_splits("fashion_mnist", root=FASHION, validation_share=0)
    assert len(named.train) == 60000 and named.test is not None and len(named.test) == 10000
    assert torch.bincount(named.train.labels).tolist() == [6000] * 10
    assert named.classes[int(named.test.labels[0])] == "Ankle boot"
    check_equal_paths(named, tmp_path, 300)


def test_a_tiny_fashion_mnist(tmp_path: Path) -> None:
    layouts.make_idx(tmp_path / "idx", train=40, test=40)
    named = load_splits("fashion_mnist", root=tmp_path / "idx", validation_share=0, partial=True)
    check_equal_paths(named, tmp_path / "x", 30)
