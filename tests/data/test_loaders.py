"""Image sets, the split that is held out, and the loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robust_peft.data import ImageSet, evaluation_loader, train_loader
from robust_peft.data.sets import check_labels
from robust_peft.data.splits import split_off

CLASSES = ("cat", "dog", "owl")


def make_set(count: int = 23, dtype: torch.dtype = torch.float32) -> ImageSet:
    """The pixels of image i are all i, so that an image tells who it is."""
    images = torch.arange(count).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(dtype).contiguous()
    return ImageSet(images, torch.arange(count) % 3, CLASSES, "toy")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_samples_and_batches_agree(dtype: torch.dtype) -> None:
    images = make_set(dtype=dtype)
    assert len(images) == 23 and images.images.dtype == dtype
    batch, labels, indices = images.__getitems__([5, 0, 22])
    assert batch.dtype == dtype and indices.tolist() == [5, 0, 22]
    for row, index in enumerate([5, 0, 22]):
        image, label, own = images[index]
        assert torch.equal(image, batch[row]) and label == labels[row] and own == index and isinstance(own, int)


def test_subset() -> None:
    part = make_set().subset(torch.tensor([4, 2]), "part")
    assert part.images[:, 0, 0, 0].tolist() == [4, 2] and part.labels.tolist() == [1, 2]
    assert part.classes == CLASSES and part.name == "part"
    assert part[0][2] == 0  # indices are the subset's own


IMAGES, LABELS = torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[0], LABELS, r"shape \[N, C, H, W\].*Found \[3, 2, 2\]"),
        (IMAGES.long(), LABELS, "uint8 or floating point.*int64"),
        (IMAGES, LABELS[:3], r"int64 of shape \[4\]. Found .* of shape \[3\]"),
        (IMAGES, LABELS.int(), "int64 of shape .* Found torch.int32"),
        (IMAGES, LABELS[:, None], r"Found .* of shape \[4, 1\]"),
        (IMAGES[:0], LABELS[:0], "'toy' is empty"),
        (IMAGES, LABELS + 3, r"labels should be in 0\.\.2. Found labels from 3 to 3"),
        (IMAGES, LABELS - 1, "Found labels from -1 to -1"),
    ],
)
def test_what_does_not_fit_is_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ImageSet(images, labels, CLASSES, "toy")
    assert "\n" not in str(error.value)


def test_check_labels() -> None:
    check_labels(torch.tensor([0, 9]), 10)
    check_labels(torch.tensor([], dtype=torch.int64), 10)
    for wrong in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"0\.\.9"):
            check_labels(torch.tensor(wrong), 10)


@pytest.mark.parametrize(("share", "held_out"), [(0.1, 3), (0.5, 12), (0.02, 1), (0.0, 0), (0.95, 22), (3 / 23, 3)])
def test_split_off(share: float, held_out: int) -> None:
    whole = make_set()
    kept, rest = split_off(whole, share, 0, ("kept", "rest"))
    if held_out == 0:
        assert kept is whole and rest is None
        return
    assert rest is not None and len(rest) == held_out and (kept.name, rest.name) == ("kept", "rest")
    # Every sample is in one of the two, in order and with its own label.
    found = [*kept.images[:, 0, 0, 0].tolist(), *rest.images[:, 0, 0, 0].tolist()]
    assert sorted(found) == list(range(23))
    for part in (kept, rest):
        assert part.images[:, 0, 0, 0].diff().gt(0).all()
        assert torch.equal(part.labels, part.images[:, 0, 0, 0].long() % 3)


def test_split_off_depends_on_its_seed_alone() -> None:
    def held_out(seed: int) -> list[float]:
        rest = split_off(make_set(), 0.5, seed, ("kept", "rest"))[1]
        assert rest is not None
        return rest.images[:, 0, 0, 0].tolist()

    torch.manual_seed(0)
    first = held_out(3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert held_out(3) == first and held_out(4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_split_off_leaves_something_to_train_on() -> None:
    with pytest.raises(ValueError, match="0.99 of 23 samples leaves none"):
        split_off(make_set(), 0.99, 0, ("kept", "rest"))


def test_train_loader_shuffles_and_drops_the_incomplete_batch() -> None:
    loader = train_loader(make_set(), 5, seed=1)
    epochs = [[index for _, _, indices in loader for index in indices.tolist()] for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20 and epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(loader) == 4
    again = [index for _, _, indices in train_loader(make_set(), 5, seed=1) for index in indices.tolist()]
    other = [index for _, _, indices in train_loader(make_set(), 5, seed=2) for index in indices.tolist()]
    assert again == epochs[0] != other


def test_train_loader_ignores_and_leaves_torchs_generator() -> None:
    def order() -> list[int]:
        return [index for _, _, indices in train_loader(make_set(), 5) for index in indices.tolist()]

    torch.manual_seed(0)
    first = order()
    torch.manual_seed(1)
    assert order() == first


@pytest.mark.parametrize("batch_size", [23, 24, 1000])
def test_train_loader_keeps_the_only_batch(batch_size: int) -> None:
    batches = list(train_loader(make_set(), batch_size))
    assert len(batches) == 1 and sorted(batches[0][2].tolist()) == list(range(23))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_evaluation_loader_gives_every_sample_once_in_order(batch_size: int) -> None:
    batches = list(evaluation_loader(make_set(), batch_size))
    assert torch.cat([indices for _, _, indices in batches]).tolist() == list(range(23))
    assert torch.cat([images for images, _, _ in batches])[:, 0, 0, 0].tolist() == list(range(23))
    assert [len(labels) for _, labels, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize("make", [lambda: train_loader(make_set(), 5), lambda: evaluation_loader(make_set(), 5)])
def test_batches_belong_together(make: Any) -> None:
    seen = 0
    for images, labels, indices in make():
        assert images.shape[1:] == (3, 2, 2) and labels.dtype == indices.dtype == torch.int64
        assert torch.equal(images[:, 0, 0, 0].long(), indices) and torch.equal(labels, indices % 3)
        seen += len(images)
    assert seen >= 20
