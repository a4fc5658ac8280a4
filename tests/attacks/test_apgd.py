"""Auto-PGD against closed forms, a plain loop of the paper's algorithm, and the official implementation."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.attacks.apgd import APGD, checkpoints
from robust_peft.attacks.victim import Counted
from robust_peft.keyed_random import derive, sample_keys
from robust_peft.objectives import get_objective
from robust_peft.threat import ThreatModel

NORMS = ["linf", "l2"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 12), (17, 12), (1, 3, 2, 2), (17, 3, 2, 2)]
BOX = (0.0, 1.0)
LINF = ThreatModel("linf", 0.1)
OPTIONS: dict[str, dict[str, Any]] = {
    "ce": dict(),
    "margin": dict(objective="margin"),
    "dlr": dict(objective="dlr"),
    "kl": dict(objective="kl"),
    "targeted": dict(objective="dlr", targeted=True),
    "restarts": dict(restarts=2),
    "eot": dict(eot=2),
}


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


def per_row(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.dim() - 1))


class Linear(nn.Module):
    """Logits linear in the pixels, for images of any shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class Singly(nn.Module):
    """One image at a time, so that not even rounding depends on who else is in the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.inner(image) for image in images.split(1)])


def linear(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, classes: int = 2
) -> tuple[Linear, Tensor, Tensor]:
    """A model, images and labels."""
    generator = torch.Generator().manual_seed(classes)
    images = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    # Weights of 0.3 keep the softmax away from 0 and 1, where the gradient of ce would vanish.
    weight = torch.randn(classes, images[0].numel(), generator=generator, dtype=torch.float64) * 0.3
    return Linear(weight.to(dtype)), images, torch.randint(classes, shape[:1], generator=generator)


def direction_to(model: Linear, images: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """The gradient of the other class's logit minus the label's, of the shape of the images."""
    return (model.weight[others] - model.weight[labels]).detach().reshape(images.shape)


def network(classes: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network with everything that behaves otherwise in train mode; its modes and flags are mixed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(27, 16),
            nn.BatchNorm1d(16),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(16, classes),
        ).to(dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    model.train()
    model[2].eval()
    model[1].weight.requires_grad_(False)
    return model


def some_images(count: int = 6, classes: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images of shape `[B, 3, 3, 3]` and labels, most of them right."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(count, 3, 3, 3, generator=generator, dtype=torch.float64)
    labels = network(classes).eval()(images).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % classes
    return images.to(dtype), labels


@torch.no_grad()
def fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(dim=1) != labels


# Optima in closed form


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linf_optimum_is_reached_exactly(shape: tuple[int, ...], dtype: torch.dtype, box: Any, objective: str) -> None:
    model, images, labels = linear(shape, dtype)
    sign, keys = direction_to(model, images, labels, 1 - labels).sign(), keys_of(len(images))

    def threat_and_optimum(eps: float) -> tuple[ThreatModel, Tensor]:
        optimum = images + eps * sign
        return ThreatModel("linf", eps, box), optimum if box is None else optimum.clamp(*box)

    threat, optimum = threat_and_optimum(0.25)
    for options in (dict(steps=1), dict(steps=10), dict(steps=10, restarts=2)):
        attack = APGD(threat, objective, early_stop=False, **options)  # type: ignore[arg-type]
        adv_images = attack(model, images, labels, keys=keys)
        assert adv_images.shape == images.shape and adv_images.dtype == dtype and not adv_images.requires_grad
        assert torch.equal(adv_images, optimum), attack
    # Those that can be fooled may stop short of it, the others get there too.
    threat, optimum = threat_and_optimum(0.05)
    adv_images = APGD(threat, objective, steps=10)(model, images, labels, keys=keys)
    wrong = fooled(model, optimum, labels)
    assert torch.equal(adv_images[~wrong], optimum[~wrong])
    assert torch.equal(fooled(model, adv_images, labels), wrong)
    assert len(images) == 1 or (wrong.any() and not wrong.all())


def l2_optimum(images: Tensor, direction: Tensor, eps: float, box: Any) -> Tensor:
    """Of a linear function over ball and box: clip(x + t w), t such that the length is eps (KKT), by bisection."""
    images, direction = images.double(), direction.double()
    if box is None:
        return images + eps * direction / per_row(direction.flatten(1).norm(dim=1), images)
    low, high = torch.zeros(len(images), dtype=torch.float64), torch.full((len(images),), 1e6, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        point = (images + per_row(middle, images) * direction).clamp(*box)
        far = (point - images).flatten(1).norm(dim=1) > eps
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    return (images + per_row(low, images) * direction).clamp(*box)


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize(
    ("box", "steps", "factor"),
    [
        # Each step doubles what is along the optimum against what is across; float32's rounding is left of it.
        (None, 10, 1 - 1e-6),
        # Projecting onto the ball, then clipping, stops short of the optimum, however small the steps.
        (BOX, 20, 0.96),
        (BOX, 100, 0.97),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_optimum(
    shape: tuple[int, ...], dtype: torch.dtype, box: Any, steps: int, factor: float, objective: str
) -> None:
    model, images, labels = linear(shape, dtype)
    direction = direction_to(model, images, labels, 1 - labels)

    def gain(adv_images: Tensor) -> Tensor:
        return ((adv_images.double() - images.double()) * direction.double()).flatten(1).sum(dim=1)

    best = gain(l2_optimum(images, direction, 0.5, box))
    attack = APGD(ThreatModel("l2", 0.5, box), objective, steps=steps, early_stop=False)
    found = gain(attack(model, images, labels, keys=keys_of(len(images))))
    assert (found > factor * best).all(), (found / best).min()
    # Better than the optimum would be outside ball or box; 1e-6 is float32's rounding.
    assert (found < best * (1 + 1e-6)).all()


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_targets_are_the_only_ones(shape: tuple[int, ...], dtype: torch.dtype, early_stop: bool) -> None:
    model, images, _ = linear(shape, dtype, classes=5)
    labels = model(images).argmax(dim=1)
    targets = (labels + torch.arange(len(labels)) % 4 + 1) % 5
    threat = ThreatModel("linf", 0.03)
    optimum = (images + 0.03 * direction_to(model, images, labels, targets).sign()).clamp(0, 1)
    attack = APGD(threat, "margin", steps=5, targeted=True, early_stop=early_stop)
    counted = Counted(model)
    found = attack(counted, images, labels, targets=targets, keys=keys_of(len(images)))
    # An image of another wrong class may have come first.
    standing = ~fooled(model, found, labels)
    assert standing.any() and torch.equal(found[standing], optimum[standing])
    assert counted.forwards <= 6 * len(images) and (early_stop or counted.forwards == 6 * len(images))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_targets", [1, 2, 9])
def test_targets_are_tried_from_the_likeliest_down(num_targets: int, dtype: torch.dtype) -> None:
    """The image kept has the margin of the best of the first few classes' closed forms."""
    model, images, labels = linear((40, 3, 2, 2), dtype, classes=5)
    threat = ThreatModel("linf", 0.02, box=None)
    ranked = model(images).scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    attack = APGD(threat, "margin", steps=5, targeted=True, num_targets=num_targets, early_stop=False)
    counted = Counted(model)
    found = attack(counted, images, labels, keys=keys_of(40))
    count = min(num_targets, 4)
    assert counted.forwards == 40 + count * 6 * 40 and counted.backwards == count * 5 * 40
    margin = get_objective("margin")
    with torch.no_grad():
        optima = [
            images + 0.02 * direction_to(model, images, labels, ranked[:, place]).sign() for place in range(count)
        ]
        margins = torch.stack([margin(model(optimum), labels) for optimum in optima])
        # A look at another iterate can only be better where a class beyond the first few is; rounding of 12 terms.
        reached = margin(model(found), labels)
    assert (reached > margins.amax(dim=0) - 16 * torch.finfo(dtype).eps).all()
    if count == 4:
        assert_close(reached, margins.amax(dim=0), rtol=0, atol=16 * torch.finfo(dtype).eps)
        assert (margins.argmax(dim=0) > 0).any()  # so that more than one target was needed


# The algorithm


def textbook(model: nn.Module, image: Tensor, label: Tensor, start: Tensor, threat: ThreatModel, attack: APGD) -> Any:
    """Algorithm 1 for one image of shape `[1, ...]`: every iterate's objective, the best image, and the halvings."""

    def project(point: Tensor) -> Tensor:
        if threat.norm == "linf":
            return point.clamp(image - threat.eps, image + threat.eps).clamp(0, 1)
        return (image + (point - image) * min(1.0, threat.eps / float((point - image).norm() + 1e-300))).clamp(0, 1)

    def look(point: Tensor) -> tuple[float, Tensor]:
        leaf = point.clone().requires_grad_()
        with torch.no_grad():
            clean_logits = model(image)
        with torch.enable_grad():
            value = get_objective(attack.objective or "")(model(leaf), label, clean_logits=clean_logits).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), grad.sign() if threat.norm == "linf" else grad / grad.norm()

    ends = [round(attack.steps * share) for share in SHARES]
    step_size, before, now = 2 * threat.eps, start, start
    values, grads, points = [], [], []
    halvings, last, last_best, just_halved = [], 0, 0.0, True
    for step in range(attack.steps + 1):
        value, grad = look(now)
        values, grads, points = [*values, value], [*grads, grad], [*points, now]
        if step in ends:
            rises = sum(values[i] > values[i - 1] for i in range(last + 1, step + 1))
            stuck = not just_halved and last_best == max(values)
            just_halved = rises <= attack.rho * (step - last) or stuck
            last, last_best = step, max(values)
            if just_halved:
                step_size, best = step_size / 2, values.index(max(values))
                now, grad = points[best], grads[best]
                halvings.append((step, stuck))
        moved = project(now + step_size * grad)
        if step > 0:
            moved = project(now + 0.75 * (moved - now) + 0.25 * (now - before))
        before, now = now, moved
    return points[values.index(max(values))], halvings


# p_0 to p_8 of section 3, times 100 whole numbers.
SHARES = [0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99]


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("objective", ["margin", "dlr", "kl"])
@pytest.mark.parametrize("norm", NORMS)
def test_each_sample_goes_its_own_way_through_the_papers_algorithm(norm: str, objective: str, steps: int) -> None:
    model, (images, labels) = Singly(network().eval()), some_images(8)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.3)
    attack, keys = APGD(threat, objective, steps=steps, early_stop=False), keys_of(8)
    found = attack(model, images, labels, keys=keys)
    starts = threat.random_start(images, derive(keys, 0, 0))
    ways = []
    for index in range(8):
        row = slice(index, index + 1)
        expected, halvings = textbook(model, images[row], labels[row], starts[row], threat, attack)
        # Rounding, which may decide between iterates that are as good as each other.
        assert_close(found[row], expected, rtol=0, atol=1e-7)
        ways.append(tuple(halvings))
    if steps == 100:
        assert len(set(ways)) > 1
        assert any(stuck for way in ways for _, stuck in way)  # the second condition had its say


def recorded_checkpoints(steps: int) -> list[tuple[int, int]]:
    """Steps done, and steps looked back on, at each check of the official implementation."""
    seen: list[tuple[int, int]] = []

    class Recording(APGDAttack):
        def check_oscillation(self, x: Tensor, j: int, k: int, y5: Tensor, k3: float = 0.75) -> Tensor:
            seen.append((j + 1, k))
            return super().check_oscillation(x, j, k, y5, k3)

    model, images, labels = linear((2, 3, 2, 2), torch.float32, classes=3)
    attack = Recording(model, n_iter=steps, norm="Linf", eps=0.001)
    attack.init_hyperparam(images)
    with torch.random.fork_rng():
        attack.attack_single_run(images, labels)
    return seen


@pytest.mark.parametrize(
    ("steps", "periods"),
    [
        (10, [2, 1, 1, 1, 1, 1, 1, 1, 1]),
        (20, [4, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (50, [11, 10, 9, 8, 7]),
        (100, [22, 19, 16, 13, 10, 7, 6, 6]),
    ],
)
def test_checkpoints_are_the_official_implementations(steps: int, periods: list[int]) -> None:
    expected = [(sum(periods[: count + 1]), period) for count, period in enumerate(periods)]
    assert list(checkpoints(steps).items()) == expected == recorded_checkpoints(steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 34, 1000])
def test_checkpoints_of_other_numbers_of_steps(steps: int) -> None:
    assert list(checkpoints(steps).items()) == recorded_checkpoints(steps)


def test_checkpoints_are_the_papers_at_100_steps() -> None:
    assert list(checkpoints(100)) == [round(100 * share) for share in SHARES]


# Beside the official implementation


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with two layers that learnt ten blurred classes, and 100 images that it gets right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        centres = torch.rand(10, 3, 4, 4)
        labels = torch.arange(1200) % 10
        images = (0.25 + 0.5 * centres[labels] + 0.15 * torch.randn(1200, 3, 4, 4)).clamp(0, 1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[:1000]), labels[:1000]).backward()
            optimizer.step()
    right = (~fooled(model, images[1000:], labels[1000:])).nonzero().squeeze(1)[:100] + 1000
    assert len(right) == 100
    return model.eval().requires_grad_(False), images[right], labels[right]


OFFICIAL_NORMS = {"linf": "Linf", "l2": "L2"}


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.065), ("l2", 0.38)])
@pytest.mark.parametrize("name", ["ce", "targeted dlr"])
def test_as_many_stand_as_under_the_official_attack(
    trained: tuple[nn.Module, Tensor, Tensor], name: str, norm: str, eps: float
) -> None:
    model, images, labels = trained
    kinds = {"ce": APGDAttack, "targeted dlr": APGDAttack_targeted}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
        official = kinds[name](model, norm=OFFICIAL_NORMS[norm], eps=eps).perturb(images, labels)
    threat = ThreatModel(norm, eps)
    assert threat.contains(official, images).all()
    objective, targeted = name.split()[-1], "targeted" in name
    adv_images = APGD(threat, objective, targeted=targeted)(model, images, labels, keys=keys_of(100))
    assert threat.contains(adv_images, images).all()
    ours, theirs = (100 - int(fooled(model, found, labels).sum()) for found in (adv_images, official))
    assert abs(ours - theirs) <= 1
    assert 20 < theirs < 95  # neither too weak to tell nor too strong


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.065), ("l2", 0.38)])
def test_run_is_the_official_one_from_the_same_start(
    trained: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float
) -> None:
    """100 steps of the cross-entropy in float64."""
    model, images, labels = trained
    model, images = copy.deepcopy(model).double(), images.double()
    threat, keys = ThreatModel(norm, eps), keys_of(100)
    official = APGDAttack(model, norm=OFFICIAL_NORMS[norm], eps=eps)
    official.init_hyperparam(images)
    try:
        torch.set_default_dtype(torch.float64)  # the official code makes its own tensors by it
        with torch.random.fork_rng():
            start = threat.random_start(images, derive(keys, 0, 0))
            best, _, theirs, _ = official.attack_single_run(images, labels, x_init=start)
    finally:
        torch.set_default_dtype(torch.float32)
    adv_images = APGD(threat, early_stop=False)(model, images, labels, keys=keys)
    ours = nn.functional.cross_entropy(model(adv_images), labels, reduction="none")
    # Ours keeps an image that fools before one with a higher cross-entropy that does not.
    comparable = fooled(model, adv_images, labels) == fooled(model, best, labels)
    assert comparable.sum() >= 95
    assert_close(ours[comparable], theirs[comparable], rtol=0, atol=1e-8)
