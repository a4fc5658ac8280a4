"""Augmentation: every output is a window of the padded image, the draws are uniform and belong to the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from robust_peft.data import CropFlip
from robust_peft.data.transforms import rotate
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


# Rotation


def smooth(count: int, height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(rows / (3.0 + i)) * torch.cos(columns / (4.0 + i)) for i in range(3 * count)]
    return torch.stack(waves).reshape(count, 3, height, width) / 2 + 0.5


@pytest.mark.parametrize("size", [(24, 24), (15, 22)])
@pytest.mark.parametrize("degrees", [0.0, 7.5, -30.0, 90.0, 180.0])
def test_rotation_is_torchvisions(degrees: float, size: tuple[int, int]) -> None:
    images = smooth(2, *size)
    expected = functional.rotate(images, degrees, InterpolationMode.BILINEAR)
    found = rotate(images, torch.full((2,), degrees))
    assert torch.allclose(found, expected, atol=2e-4)
    as_bytes = (images * 255).to(torch.uint8)
    found = rotate(as_bytes, torch.full((2,), degrees))
    expected = functional.rotate(as_bytes, degrees, InterpolationMode.BILINEAR)
    assert found.dtype == torch.uint8 and (found.int() - expected.int()).abs().max() <= 1


def test_a_quarter_turn_moves_every_pixel() -> None:
    images = draw_images(2, 6, 6)
    assert torch.allclose(rotate(images, torch.tensor([90.0, -90.0]))[0], images[0].rot90(1, (1, 2)), atol=1e-5)
    assert torch.allclose(rotate(images, torch.tensor([90.0, -90.0]))[1], images[1].rot90(-1, (1, 2)), atol=1e-5)


def test_rotation_keeps_the_box_and_the_inside_of_even_images() -> None:
    white = torch.ones(50, 3, 17, 17)
    turned = CropFlip(padding=0, rotation=45)(white, keys_of(50))
    assert turned.min() >= 0 and turned.max() <= 1 and (turned[:, :, 0, 0] < 0.5).any()  # corners turn black
    rows, columns = torch.meshgrid(torch.arange(17) - 8, torch.arange(17) - 8, indexing="ij")
    inside = rows**2 + columns**2 <= 7**2  # within the circle that no turn leaves
    assert torch.allclose(turned[:, :, inside], white[:, :, inside], atol=1e-5)


def test_angles_are_uniform_and_belong_to_the_sample() -> None:
    """A single bright pixel far from the centre tells the angle."""
    image = torch.zeros(1, 3, 65, 65)
    image[..., 31:34, 61:64] = 1
    transform = CropFlip(padding=0, flip=False, rotation=20)
    outputs = transform(image.expand(400, -1, -1, -1), keys_of(400))
    weights = outputs[:, 0]
    places = torch.arange(65.0) - 32
    x, y = ((weights * axis).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)) for axis in (places[None], places[:, None]))
    angles = torch.rad2deg(torch.atan2(-y, x)).sort().values
    uniform = torch.linspace(-20, 20, 400)
    assert (angles - uniform).abs().max() < 40 * 0.13  # Kolmogorov and Smirnov: beyond with a chance of 3e-6
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:7]
    assert torch.equal(transform(image.expand(7, -1, -1, -1), keys_of(400)[order]), outputs[order])


def test_rotation_leaves_the_other_draws_alone() -> None:
    images, keys = smooth(30, 20, 20), keys_of(30)
    plain, turned = CropFlip()(images, keys), CropFlip(rotation=1e-4)(images, keys)
    assert torch.allclose(plain, turned, atol=1e-3)
    assert CropFlip(rotation=10)(images.bfloat16(), keys).dtype == torch.bfloat16


@pytest.mark.parametrize("rotation", [-1, 181, float("nan")])
def test_rotations_that_cannot_be(rotation: float) -> None:
    with pytest.raises(ValueError, match="rotation should be in"):
        CropFlip(rotation=rotation)
