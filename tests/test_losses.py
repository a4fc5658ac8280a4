"""What training minimises: formulas by hand in float64, gradients by finite differences, and the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robust_peft.losses import LOSSES, CrossEntropy, LogitPairing, Loss, Mart, Trades, make_loss
from robust_peft.objectives import OBJECTIVES

DTYPES = [torch.float32, torch.float64]
VARIANTS: dict[str, Loss] = {
    "ce": CrossEntropy(),
    "trades": Trades(),
    "mart": Mart(),
    "mart beta 0.5": Mart(beta=0.5),
    "clp": LogitPairing(),
    "clp probabilities": LogitPairing(pairing="probabilities"),
}


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
@pytest.mark.parametrize("name", VARIANTS)
def test_clean_loss_is_cross_entropy(name: str, dtype: torch.dtype) -> None:
    clean_logits, _, labels = draw(dtype)
    expected = [cross_entropy(row, label) for row, label in zip(clean_logits.tolist(), labels.tolist(), strict=True)]
    assert_near(VARIANTS[name].clean(clean_logits, labels), expected)


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


def misclassification_aware(clean: list[float], adv: list[float], label: int, beta: float) -> float:
    """MART by the formula, in probabilities."""
    p, q = softmax(clean), softmax(adv)
    rival = max(value for k, value in enumerate(q) if k != label)
    return -math.log(q[label]) - math.log(1 - rival) + beta * divergence(clean, adv) * (1 - p[label])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0, 1.0, 5.0])
def test_adversarial_loss_of_mart(beta: float, dtype: torch.dtype) -> None:
    clean_logits, adv_logits, labels = draw(dtype, count=40)
    rows = list(zip(clean_logits.tolist(), adv_logits.tolist(), labels.tolist(), strict=True))
    assert_near(Mart(beta).adv(adv_logits, labels, clean_logits), [misclassification_aware(*row, beta) for row in rows])
    wrong = [max(adv) != adv[label] for _, adv, label in rows]
    assert any(wrong) and not all(wrong)  # the best other class is the first and the second best


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_loss_of_clp(dtype: torch.dtype) -> None:
    clean_logits, adv_logits, labels = draw(dtype)
    pairs = list(zip(clean_logits.tolist(), adv_logits.tolist(), strict=True))

    def squares(first: list[float], second: list[float]) -> list[float]:
        return [(a - b) ** 2 for a, b in zip(first, second, strict=True)]

    expected = [sum(squares(c, a)) / len(c) for c, a in pairs]
    assert_near(LogitPairing().adv(adv_logits, labels, clean_logits), expected)
    expected = [math.sqrt(sum(squares(softmax(c), softmax(a)))) for c, a in pairs]
    assert_near(LogitPairing("probabilities").adv(adv_logits, labels, clean_logits), expected)


def slopes(of: Any, at: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of the sum of ``of(at)`` by central differences."""
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        offset = torch.zeros_like(at)
        offset.view(-1)[i] = step
        found.view(-1)[i] = (of(at + offset).sum() - of(at - offset).sum()) / (2 * step)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    clean_logits, adv_logits, labels = draw()
    loss = VARIANTS[name]
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


@pytest.mark.parametrize("name", VARIANTS)
def test_clean_logits_are_asked_for_exactly_where_they_are_needed(name: str) -> None:
    _, adv_logits, labels = draw()
    if not VARIANTS[name].needs_clean_logits:
        assert VARIANTS[name].adv(adv_logits, labels).shape == labels.shape
        return
    with pytest.raises(ValueError, match="clean_logits"):
        VARIANTS[name].adv(adv_logits, labels)


@pytest.mark.parametrize("name", VARIANTS)
def test_values_do_not_depend_on_the_batch(name: str) -> None:
    clean_logits, adv_logits, labels = draw()
    loss = VARIANTS[name]
    chosen = torch.tensor([5, 0])
    part = loss.adv(adv_logits[chosen], labels[chosen], clean_logits[chosen])
    assert_close(part, loss.adv(adv_logits, labels, clean_logits)[chosen], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e2, 1e4])
@pytest.mark.parametrize("name", VARIANTS)
def test_saturated_logits_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    clean_logits, adv_logits, labels = draw(torch.float32)
    clean_leaf, adv_leaf = (clean_logits * scale).requires_grad_(), (adv_logits * scale).requires_grad_()
    loss = VARIANTS[name]
    total = loss.clean(clean_leaf, labels).sum() + loss.adv(adv_leaf, labels, clean_leaf).sum()
    total.backward()
    assert total.isfinite() and clean_leaf.grad is not None and adv_leaf.grad is not None
    assert clean_leaf.grad.isfinite().all() and adv_leaf.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", VARIANTS)
def test_equal_logits_give_finite_gradients(name: str, scale: float) -> None:
    """At equal logits the pairings are 0, and a norm has no derivative there; at scale 0 all classes tie."""
    logits, _, labels = draw(torch.float32)
    clean_leaf, adv_leaf = (logits * scale).requires_grad_(), (logits * scale).requires_grad_()
    loss = VARIANTS[name]
    value = loss.adv(adv_leaf, labels, clean_leaf)
    value.sum().backward()
    assert value.isfinite().all() and adv_leaf.grad is not None and adv_leaf.grad.isfinite().all()
    assert clean_leaf.grad is None or clean_leaf.grad.isfinite().all()
    if name.startswith("clp"):
        assert not value.any() and not adv_leaf.grad.any()


def test_mart_keeps_its_digits_where_the_rival_is_certain() -> None:
    """1 - q_rival is 2 exp(-40), which a subtraction in float32 would make 0 and its logarithm infinite."""
    adv_logits = torch.tensor([[0.0, 40.0, 0.0]], requires_grad=True)
    value = Mart(beta=0).adv(adv_logits, torch.tensor([0]), torch.zeros(1, 3))
    assert_close(value, torch.tensor([80 - math.log(2)]), rtol=1e-6, atol=0)
    value.backward()
    # d/dz of 2 log(sum) - z_0 - log(exp z_0 + exp z_2), with all the weight on class 1.
    assert_close(adv_logits.grad, torch.tensor([[-1.5, 2.0, -0.5]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_logits_are_computed_on_in_float32(name: str, dtype: torch.dtype) -> None:
    clean_logits, adv_logits, labels = (100 * draw()[0]).to(dtype), (100 * draw()[1]).to(dtype), draw()[2]
    loss = VARIANTS[name]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.adv(adv_logits, labels, clean_logits), loss.clean(clean_logits, labels)
    expected = (
        loss.adv(adv_logits.float(), labels, clean_logits.float()),
        loss.clean(clean_logits.float(), labels),
    )
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)


def test_registry() -> None:
    assert set(LOSSES) == {"ce", "trades", "clp", "mart"}
    for name in LOSSES:
        loss = make_loss(name)
        assert loss.name == name and loss.inner_objective in OBJECTIVES
    assert make_loss("ce") == CrossEntropy() and make_loss("trades") == Trades()
    assert Trades.inner_objective == "kl" and CrossEntropy.inner_objective == "ce"
    assert make_loss("mart", beta=6) == Mart(6) and make_loss("mart").beta == 5
    assert make_loss("clp", pairing="probabilities") == LogitPairing("probabilities") != make_loss("clp")
    assert Mart.inner_objective == LogitPairing.inner_objective == "ce"
    assert Trades.needs_clean_logits and not CrossEntropy.needs_clean_logits


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ce", {"beta": 1}, "loss ce has no parameter beta; it has none"),
        ("clp", {"beta": 1, "gamma": 2}, "loss clp has no parameter beta, gamma; it has pairing"),
        ("mart", {"pairing": "logits"}, "loss mart has no parameter pairing; it has beta"),
        ("mart", {"beta": -1.0}, "Found beta = -1.0"),
        ("mart", {"beta": math.inf}, "Found beta = inf"),
        ("mart", {"beta": math.nan}, "Found beta = nan"),
        ("mart", {"beta": "5"}, "Found beta = '5'"),
        ("mart", {"beta": True}, "Found beta = True"),
        ("clp", {"pairing": "softmax"}, "Found pairing = 'softmax'"),
        ("clp", {"pairing": None}, "Found pairing = None"),
    ],
)
def test_bad_parameters(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_loss(name, **parameters)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_mart_needs_a_wrong_class() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        Mart().adv(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1))


@pytest.mark.parametrize("name", ["", "CE", "TRADES", "hinge", None])
def test_unknown_name(name: Any) -> None:
    with pytest.raises(ValueError) as error:
        make_loss(name)
    message = str(error.value)
    assert f"Found loss = {name!r}" in message and "\n" not in message
    assert LOSSES and all(known in message for known in LOSSES)
