"""Augmentation: every output is a window of the padded image, the draws are uniform and belong to the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robust_peft.data import CropFlip
from robust_peft.keyed_random import sample_keys


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


def draw_images(count: int, height: int = 4, width: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """No two pixels alike, so that a window tells where it was cut."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)


def windows_of(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    """Every possible output for an image of shape `[C, H, W]`, pixel by pixel."""
    channels, height, width = image.shape
    found = []
    for mirrored in (False, True) if flip else (False,):
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                window = torch.zeros_like(image)
                for row in range(height):
                    for column in range(width):
                        source_row = row + down - padding
                        source_column = (width - 1 - column if mirrored else column) + right - padding
                        if 0 <= source_row < height and 0 <= source_column < width:
                            window[:, row, column] = image[:, source_row, source_column]
                found.append(window)
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_output_is_a_window_of_the_padded_image(padding: int, flip: bool, dtype: torch.dtype) -> None:
    images = draw_images(12, dtype=dtype)
    given = images.clone()
    outputs = CropFlip(padding, flip)(images, keys_of(12))
    assert outputs.shape == images.shape and outputs.dtype == dtype and outputs.is_contiguous()
    for image, output in zip(images, outputs, strict=True):
        windows = windows_of(image, padding, flip)
        assert len(windows) == (2 * padding + 1) ** 2 * (1 + flip)
        assert sum(torch.equal(output, window) for window in windows) == 1
    assert torch.equal(images, given)


@pytest.mark.parametrize(("padding", "flip"), [(1, True), (2, False), (0, True)])
def test_draws_are_uniform(padding: int, flip: bool) -> None:
    """One image under many keys: each offset and each mirroring equally often, together."""
    count, image = 6000, draw_images(1)[0]
    outputs = CropFlip(padding, flip)(image.expand(count, -1, -1, -1), keys_of(count))
    windows = torch.stack(windows_of(image, padding, flip))
    matches = (outputs[:, None] == windows[None]).flatten(2).all(dim=2)
    assert (matches.sum(dim=1) == 1).all()
    seen = matches.sum(dim=0).double()
    expected = count / len(windows)
    # Chi-squared with at most 24 degrees of freedom: above 70 with a chance of 3e-6.
    assert ((seen - expected) ** 2 / expected).sum() < 70


@pytest.mark.parametrize("transform", [CropFlip(), CropFlip(1, False), CropFlip(0, True)], ids=str)
def test_same_key_same_row_whatever_the_batch(transform: CropFlip) -> None:
    images, keys = draw_images(20, 8, 8), keys_of(20)
    whole = transform(images, keys)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for chosen in (order, torch.tensor([7, 7, 0]), torch.tensor([19]), torch.arange(0)):
        assert torch.equal(transform(images[chosen], keys[chosen]), whole[chosen])
    assert not torch.equal(transform(images, sample_keys(0, 1, torch.arange(20))), whole)


def test_torchs_generator_plays_no_part() -> None:
    images, state = draw_images(5), torch.get_rng_state()
    CropFlip()(images, keys_of(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_switched_off_it_is_the_identity() -> None:
    images = draw_images(9)
    assert torch.equal(CropFlip(padding=0, flip=False)(images, keys_of(9)), images)


@pytest.mark.parametrize("size", [(32, 32), (5, 9), (1, 1)])
def test_sizes(size: tuple[int, int]) -> None:
    images = draw_images(3, *size)
    assert CropFlip()(images, keys_of(3)).shape == images.shape


def test_memory_layout_changes_nothing() -> None:
    images = draw_images(6)
    expected = CropFlip()(images, keys_of(6))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(CropFlip()(channels_last, keys_of(6)), expected)
