"""What training minimises: formulas by hand in float64, gradients by finite differences, and the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robust_peft.losses import LOSSES, CrossEntropy, Trades, make_loss
from robust_peft.objectives import OBJECTIVES

DTYPES = [torch.float32, torch.float64]


def draw(dtype: torch.dtype = torch.float64, count: int = 8, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Clean logits, adversarial logits, labels."""
    generator = torch.Generator().manual_seed(0)
    clean_logits, adv_logits = 2 * torch.randn(2, count, classes, generator=generator, dtype=torch.float64)
    return clean_logits.to(dtype), adv_logits.to(dtype), torch.randint(classes, (count,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(row: list[float], label: int) -> float:
    return -math.log(softmax(row)[label])


def divergence(clean: list[float], adv: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(clean), softmax(adv), strict=True))


def assert_near(found: Tensor, expected: list[float]) -> None:
    # A handful of roundings of numbers up to ten.
    rounding = 50 * torch.finfo(found.dtype).eps
    assert found.shape == (len(expected),)
    assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_clean_loss_is_cross_entropy(name: str, dtype: torch.dtype) -> None:
    clean_logits, _, labels = draw(dtype)
    expected = [cross_entropy(row, label) for row, label in zip(clean_logits.tolist(), labels.tolist(), strict=True)]
    assert_near(make_loss(name).clean(clean_logits, labels), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_loss_of_ce(dtype: torch.dtype) -> None:
    clean_logits, adv_logits, labels = draw(dtype)
    expected = [cross_entropy(row, label) for row, label in zip(adv_logits.tolist(), labels.tolist(), strict=True)]
    assert_near(CrossEntropy().adv(adv_logits, labels, clean_logits), expected)
    assert_near(CrossEntropy().adv(adv_logits, labels), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_loss_of_trades(dtype: torch.dtype) -> None:
    clean_logits, adv_logits, labels = draw(dtype)
    expected = [divergence(c, a) for c, a in zip(clean_logits.tolist(), adv_logits.tolist(), strict=True)]
    assert_near(Trades().adv(adv_logits, labels, clean_logits), expected)
    assert_near(Trades().adv(clean_logits, labels, clean_logits), [0.0] * len(labels))


def slopes(of: Any, at: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of the sum of ``of(at)`` by central differences."""
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        offset = torch.zeros_like(at)
        offset.view(-1)[i] = step
        found.view(-1)[i] = (of(at + offset).sum() - of(at - offset).sum()) / (2 * step)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    clean_logits, adv_logits, labels = draw()
    loss = make_loss(name)
    clean_leaf, adv_leaf = clean_logits.clone().requires_grad_(), adv_logits.clone().requires_grad_()
    clean_grad, adv_grad = torch.autograd.grad(
        loss.adv(adv_leaf, labels, clean_leaf).sum(), (clean_leaf, adv_leaf), allow_unused=True
    )
    # Error of a central difference: step^2 = 1e-10 of the third derivative, and rounding 1e-16 / step = 1e-11.
    close = dict(rtol=1e-7, atol=1e-8)
    assert_close(adv_grad, slopes(lambda x: loss.adv(x, labels, clean_logits), adv_logits), **close)
    expected = slopes(lambda x: loss.adv(adv_logits, labels, x), clean_logits)
    if loss.needs_clean_logits:
        # Through the clean argument too, as in the authors' code: it is no constant.
        assert expected.abs().max() > 0.1
        assert_close(clean_grad, expected, **close)
    else:
        assert clean_grad is None and expected.abs().max() == 0
    (grad,) = torch.autograd.grad(loss.clean(clean_leaf, labels).sum(), clean_leaf)
    assert_close(grad, slopes(lambda x: loss.clean(x, labels), clean_logits), **close)


def test_gradients_of_trades_in_closed_form() -> None:
    clean_logits, adv_logits, labels = draw()
    clean_leaf, adv_leaf = clean_logits.clone().requires_grad_(), adv_logits.clone().requires_grad_()
    value = Trades().adv(adv_leaf, labels, clean_leaf)
    clean_grad, adv_grad = torch.autograd.grad(value.sum(), (clean_leaf, adv_leaf))
    p, q = clean_logits.softmax(dim=1), adv_logits.softmax(dim=1)
    # d KL / d adv = q - p;  d KL / d clean = p (log p/q - KL). Float64 rounding.
    assert_close(adv_grad, q - p, rtol=1e-12, atol=1e-13)
    assert_close(clean_grad, p * ((p / q).log() - value.detach().unsqueeze(1)), rtol=1e-12, atol=1e-13)


def test_trades_needs_clean_logits() -> None:
    _, adv_logits, labels = draw()
    with pytest.raises(ValueError, match="clean_logits"):
        Trades().adv(adv_logits, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_values_do_not_depend_on_the_batch(name: str) -> None:
    clean_logits, adv_logits, labels = draw()
    loss = make_loss(name)
    chosen = torch.tensor([5, 0])
    part = loss.adv(adv_logits[chosen], labels[chosen], clean_logits[chosen])
    assert_close(part, loss.adv(adv_logits, labels, clean_logits)[chosen], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e2, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_saturated_logits_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    clean_logits, adv_logits, labels = draw(torch.float32)
    clean_leaf, adv_leaf = (clean_logits * scale).requires_grad_(), (adv_logits * scale).requires_grad_()
    loss = make_loss(name)
    total = loss.clean(clean_leaf, labels).sum() + loss.adv(adv_leaf, labels, clean_leaf).sum()
    total.backward()
    assert total.isfinite() and clean_leaf.grad is not None and adv_leaf.grad is not None
    assert clean_leaf.grad.isfinite().all() and adv_leaf.grad.isfinite().all()


def test_registry() -> None:
    assert {"ce", "trades"} <= set(LOSSES)
    for name in LOSSES:
        loss = make_loss(name)
        assert loss.name == name and loss.inner_objective in OBJECTIVES
    assert make_loss("ce") == CrossEntropy() and make_loss("trades") == Trades()
    assert Trades.inner_objective == "kl" and CrossEntropy.inner_objective == "ce"
    assert Trades.needs_clean_logits and not CrossEntropy.needs_clean_logits


@pytest.mark.parametrize("name", ["", "CE", "TRADES", "hinge", None])
def test_unknown_name(name: Any) -> None:
    with pytest.raises(ValueError) as error:
        make_loss(name)
    message = str(error.value)
    assert f"Found loss = {name!r}" in message and "\n" not in message
    assert LOSSES and all(known in message for known in LOSSES)
