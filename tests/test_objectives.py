"""What attacks maximise: formulas by hand in float64, targeted forms, invariances, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robust_peft.objectives import OBJECTIVES, ce, dlr, get_objective, kl, margin

DTYPES = [torch.float32, torch.float64]


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """A handful of roundings of numbers near 1."""
    return dict(rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def draw(count: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and targets that differ from the labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, classes, generator=generator, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(classes, (count,), generator=generator)
    targets = (labels + torch.randint(1, classes, (count,), generator=generator)) % classes
    return logits, labels, targets


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def by_hand(name: str, row: list[float], label: int, target: int | None, clean: list[float]) -> float:
    """One sample's value in Python floats, from the papers' equations; 1e-12 as in the reference code of dlr."""
    ordered = sorted(row, reverse=True)
    best_other = max(value for k, value in enumerate(row) if k != label)
    if name == "ce":
        return -log_softmax(row)[label] if target is None else log_softmax(row)[target]
    if name == "margin":
        return (best_other if target is None else row[target]) - row[label]
    if name == "dlr" and target is None:
        return -(row[label] - best_other) / (ordered[0] - ordered[2] + 1e-12)
    if name == "dlr":
        assert target is not None
        return -(row[label] - row[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)
    log_p, log_q = log_softmax(clean), log_softmax(row)
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 4, 10])
def test_formula(name: str, dtype: torch.dtype, classes: int) -> None:
    logits, labels, _ = draw(20, classes, dtype=dtype)
    clean_logits = draw(20, classes, seed=1, dtype=dtype)[0]
    found = get_objective(name)(logits, labels, clean_logits=clean_logits)
    rows = zip(logits.tolist(), labels.tolist(), clean_logits.tolist(), strict=True)
    expected = [by_hand(name, row, label, None, clean) for row, label, clean in rows]
    assert found.dtype == dtype
    assert_close(found, torch.tensor(expected, dtype=dtype), **tolerances(dtype))


@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [4, 10])
def test_targeted_formula(name: str, dtype: torch.dtype, classes: int) -> None:
    logits, labels, targets = draw(20, classes, dtype=dtype)
    found = get_objective(name)(logits, labels, targets=targets)
    rows = zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)
    expected = [by_hand(name, row, label, target, row) for row, label, target in rows]
    assert_close(found, torch.tensor(expected, dtype=dtype), **tolerances(dtype))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
def test_wrong_samples_score_higher(name: str, targeted: bool) -> None:
    """The sign: more of the other class and less of the label is better for the attacker, from a right prediction."""
    logits, labels, targets = draw(50, 5)
    logits[torch.arange(50), labels] = logits.amax(dim=1) + 1
    worse = logits.clone()
    worse[torch.arange(50), targets] += 10
    worse[torch.arange(50), labels] -= 10
    options = dict(targets=targets) if targeted else {}
    objective = OBJECTIVES[name]
    assert (objective(worse, labels, **options) > objective(logits, labels, **options)).all()


def test_margin_and_dlr_are_positive_exactly_where_the_model_is_wrong() -> None:
    logits, labels, _ = draw(200, 5)
    wrong = logits.argmax(dim=1) != labels
    assert 0 < wrong.sum() < 200
    assert torch.equal(margin(logits, labels) > 0, wrong)
    assert torch.equal(dlr(logits, labels) > 0, wrong)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e4, 0.0), (1.0, 100.0), (7.0, -3.0)])
def test_dlr_ignores_scale_and_shift(targeted: bool, scale: float, shift: float) -> None:
    logits, labels, targets = draw(50, 6)
    options = dict(targets=targets) if targeted else {}
    # 1e-12 in the denominator, against spreads down to 1e-3, and the rounding of a shift by 100.
    assert_close(dlr(logits * scale + shift, labels, **options), dlr(logits, labels, **options), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["ce", "margin", "kl"])
def test_shift_of_the_logits_changes_nothing(name: str) -> None:
    logits, labels, _ = draw(20, 5)
    clean_logits = draw(20, 5, seed=1)[0]
    shifted = OBJECTIVES[name](logits + 50, labels, clean_logits=clean_logits - 20)
    assert_close(shifted, OBJECTIVES[name](logits, labels, clean_logits=clean_logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_values_and_gradients_are_finite(name: str, scale: float) -> None:
    """Equal logits (where dlr divides by nothing) and saturated ones."""
    logits, labels, _ = draw(20, 5, dtype=torch.float32)
    logits = (logits * scale).requires_grad_()
    value = OBJECTIVES[name](logits, labels, clean_logits=draw(20, 5, seed=1, dtype=torch.float32)[0] * scale)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    logits, labels, _ = draw(6, 5)
    clean_logits = draw(6, 5, seed=1)[0]
    objective = OBJECTIVES[name]
    assert torch.autograd.gradcheck(
        lambda x: objective(x, labels, clean_logits=clean_logits), (logits.requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_is_zero_at_the_clean_image_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    clean_logits, labels, _ = draw(20, 5, dtype=dtype)
    logits = clean_logits.clone().requires_grad_()
    value = kl(logits, labels, clean_logits=clean_logits)
    assert (value == 0).all()  # log p - log p, without rounding
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.abs().max() < 4 * torch.finfo(dtype).eps  # softmax minus softmax
    other = kl(draw(20, 5, seed=2, dtype=dtype)[0], labels, clean_logits=clean_logits)
    assert (other > 0).all()


def test_kl_ignores_the_labels() -> None:
    logits, labels, targets = draw(20, 5)
    clean_logits = draw(20, 5, seed=1)[0]
    assert torch.equal(kl(logits, labels, clean_logits=clean_logits), kl(logits, targets, clean_logits=clean_logits))


def test_kl_needs_clean_logits_and_takes_no_targets() -> None:
    logits, labels, targets = draw(3, 5)
    with pytest.raises(ValueError, match="kl needs clean_logits"):
        kl(logits, labels)
    with pytest.raises(ValueError, match="kl has no targeted form"):
        kl(logits, labels, clean_logits=logits, targets=targets)


@pytest.mark.parametrize(
    ("name", "targeted", "least"), [("dlr", False, 3), ("dlr", True, 4), ("margin", False, 2), ("margin", True, 2)]
)
def test_class_count(name: str, targeted: bool, least: int) -> None:
    objective = OBJECTIVES[name]

    def value(classes: int) -> Tensor:
        labels = torch.zeros(4, dtype=torch.int64)
        options: dict[str, Any] = dict(targets=torch.ones(4, dtype=torch.int64)) if targeted else {}
        return objective(draw(4, classes)[0], labels, **options)

    assert value(least).isfinite().all()
    if least > 2:
        with pytest.raises(ValueError, match=f"at least {least} classes. Found {least - 1}; use margin"):
            value(least - 1)


def test_margin_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="margin needs at least 2 classes. Found 1"):
        margin(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))


def test_ties_count_as_no_margin() -> None:
    logits, labels = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])
    assert margin(logits, labels).item() == 0
    assert ce(logits, labels).item() == pytest.approx(-log_softmax([1.0, 1.0, 0.0])[0])


@pytest.mark.parametrize("name", ["", "CE", "cross-entropy", None, 3])
def test_unknown_name(name: Any) -> None:
    with pytest.raises(ValueError) as error:
        get_objective(name)
    message = str(error.value)
    assert f"Found objective = {name!r}" in message and "\n" not in message
    assert OBJECTIVES and all(known in message for known in OBJECTIVES)
