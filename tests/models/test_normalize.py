"""The normalisation in front of a backbone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.models import Normalized

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)


class AsOutput(nn.Module):
    """Answers as a classifier of transformers does."""

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=images.mean(dim=(2, 3)), hidden_states=None)


def draw_images() -> Tensor:
    return torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_backbone_sees_normalised_images() -> None:
    images = draw_images()
    found = Normalized(nn.Identity(), MEAN, STD)(images)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert_close(found[:, channel], (images[:, channel] - mean) / std)
    assert torch.equal(images, draw_images())


def test_output_objects_are_unpacked() -> None:
    logits = Normalized(AsOutput(), MEAN, STD)(draw_images())
    assert isinstance(logits, Tensor) and logits.shape == (4, 3)
    assert_close(logits, Normalized(nn.Identity(), MEAN, STD)(draw_images()).mean(dim=(2, 3)))


def test_zero_and_one_change_nothing() -> None:
    assert torch.equal(Normalized(nn.Identity(), (0, 0, 0), (1, 1, 1))(draw_images()), draw_images())


def test_statistics_follow_the_dtype_and_stay_out_of_the_state() -> None:
    model = Normalized(nn.Conv2d(3, 2, 1), MEAN, STD)
    assert set(model.state_dict()) == {"backbone.weight", "backbone.bias"}
    assert [name for name, _ in model.named_parameters()] == ["backbone.weight", "backbone.bias"]
    assert model.double()(draw_images().double()).dtype == torch.float64
    assert model.bfloat16()(draw_images().bfloat16()).dtype == torch.bfloat16


def test_gradient_reaches_the_pixels() -> None:
    images = draw_images().requires_grad_()
    (grad,) = torch.autograd.grad(Normalized(nn.Identity(), MEAN, STD)(images).sum(), images)
    assert_close(grad, (1 / torch.tensor(STD)).reshape(1, 3, 1, 1).expand_as(images))


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_channels(count: int) -> None:
    images = torch.rand(2, count, 3, 3, generator=torch.Generator().manual_seed(0))
    assert_close(Normalized(nn.Identity(), [0.5] * count, [0.5] * count)(images), images * 2 - 1)


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN, STD[:2]), (MEAN[:1], STD), (MEAN, (1, 0, 1)), (MEAN, (1, -1, 1)), (MEAN, (1, float("nan"), 1))],
)
def test_statistics_that_do_not_fit_are_refused(mean: Any, std: Any) -> None:
    with pytest.raises(ValueError, match="one entry for each channel, std positive. Found"):
        Normalized(nn.Identity(), mean, std)
