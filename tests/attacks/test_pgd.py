"""FGSM and PGD against optima in closed form on linear models, and what they leave as they found it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.attacks import FGSM, PGD
from robust_peft.keyed_random import sample_keys
from robust_peft.objectives import get_objective
from robust_peft.threat import ThreatModel

NORMS = ["linf", "l2"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 12), (3, 12), (17, 12), (1, 3, 2, 2), (3, 3, 2, 2), (17, 3, 2, 2)]
BOX = (0.0, 1.0)


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


class Linear(nn.Module):
    """Logits linear in the pixels, for images of any shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


@dataclasses.dataclass(frozen=True)
class Problem:
    """Images, labels and a linear model under which every gradient is a positive multiple of ``direction``."""

    model: Linear
    images: Tensor
    labels: Tensor
    direction: Tensor

    @property
    def keys(self) -> Tensor:
        return keys_of(len(self.images))

    def gain(self, adv_images: Tensor) -> Tensor:
        """By how much the other class gained on the label, of shape `[B]`."""
        return ((adv_images.double() - self.images.double()) * self.direction.double()).flatten(1).sum(dim=1)

    def attack_with(self, attack: PGD) -> Tensor:
        return attack(self.model, self.images, self.labels, keys=self.keys)


def binary(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Problem:
    """Two classes: the gradient of each objective is a multiple of the difference of the two rows."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    # Weights of 0.3 keep the softmax away from 0 and 1, where the gradient of ce would vanish.
    weight = (torch.randn(2, images[0].numel(), generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    labels = torch.randint(2, shape[:1], generator=generator)
    return Problem(Linear(weight), images, labels, (weight[1 - labels] - weight[labels]).reshape(shape))


def multiclass(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """Model of five classes, images, labels, and targets other than the labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(5, images[0].numel(), generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    labels = torch.randint(5, shape[:1], generator=generator)
    targets = (labels + torch.randint(1, 5, shape[:1], generator=generator)) % 5
    return Linear(weight), images, labels, targets


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


def some_images(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images of shape `[B, 3, 3, 3]` and labels of 4 classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(count, 3, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(4, (count,), generator=generator)


# Optima in closed form


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linf_optimum_is_reached_exactly(shape: tuple[int, ...], dtype: torch.dtype, box: Any, objective: str) -> None:
    problem, eps = binary(shape, dtype), 0.25
    threat = ThreatModel("linf", eps, box)
    optimum = problem.images + eps * problem.direction.sign()
    if box is not None:
        optimum = optimum.clamp(*box)
        # The box is felt by some pixels and not by others.
        touched = (optimum == 0) | (optimum == 1)
        assert touched.any() and not touched.all()
    attacks = [
        FGSM(threat, objective=objective),
        PGD(threat, steps=10, objective=objective),
        PGD(threat, steps=10, objective=objective, random_start=False),
        PGD(threat, steps=10, objective=objective, restarts=2),
    ]
    for attack in attacks:
        adv_images = problem.attack_with(attack)
        assert adv_images.shape == problem.images.shape and adv_images.dtype == dtype
        assert not adv_images.requires_grad
        assert torch.equal(adv_images, optimum), attack


def l2_optimum_without_a_box(problem: Problem, eps: float) -> Tensor:
    lengths = problem.direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (problem.images.dim() - 1))
    return problem.images + eps * problem.direction / lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_optimum_without_a_box(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem, eps = binary(shape, dtype), 0.5
    threat = ThreatModel("l2", eps, box=None)
    optimum = l2_optimum_without_a_box(problem, eps)
    # From the image every step is along the optimum: rounding alone is left, of ten steps.
    rounding = 40 * torch.finfo(dtype).eps
    for attack in (FGSM(threat), PGD(threat, steps=10, random_start=False)):
        assert_close(problem.attack_with(attack), optimum, rtol=0, atol=rounding)
    # From a random start what is across the optimum shrinks by eps / (eps + step) in each step at the surface. The
    # default's steps add up to 2.5 eps, of which the way to the surface takes up to 2: 5% of the gain may be left over.
    best = problem.gain(optimum)
    assert (problem.gain(problem.attack_with(PGD(threat, steps=40))) > 0.95 * best).all()
    # Steps that add up to 12 eps leave exp(-10) of it, which costs half its square: 1e-9; float32 rounds sooner.
    patient = problem.attack_with(PGD(threat, steps=60, step_size=eps / 5))
    assert (problem.gain(patient) > (1 - 1e-6) * best).all()


def l2_optimum_in_the_box(problem: Problem, eps: float) -> Tensor:
    """Of a linear function over ball and box: clip(x + t w), t such that the length is eps (KKT), by bisection."""
    images, direction = problem.images.double(), problem.direction.double()
    shape = (-1, *[1] * (images.dim() - 1))
    low, high = torch.zeros(len(images), dtype=torch.float64), torch.full((len(images),), 1e6, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        point = (images + middle.reshape(shape) * direction).clamp(*BOX)
        far = (point - images).flatten(1).norm(dim=1) > eps
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    return (images + low.reshape(shape) * direction).clamp(*BOX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_optimum_in_the_box(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem, eps = binary(shape, dtype), 0.5
    threat = ThreatModel("l2", eps)
    optimum = l2_optimum_in_the_box(problem, eps)
    assert ((optimum == 0) | (optimum == 1)).any()
    assert_close((optimum - problem.images.double()).flatten(1).norm(dim=1), torch.full(shape[:1], eps).double())
    # One step, whose clipped part is lost; a few roundings.
    one_step = l2_optimum_without_a_box(problem, eps).clamp(*BOX)
    assert_close(problem.attack_with(FGSM(threat)), one_step, rtol=0, atol=8 * torch.finfo(dtype).eps)
    best = problem.gain(optimum)
    for attack, factor in (
        # Projecting onto the ball, then clipping, stops short of the optimum by an amount of the order of the step.
        (PGD(threat, steps=40, random_start=False), 0.97),
        (PGD(threat, steps=40), 0.92),
        (PGD(threat, steps=100, step_size=eps / 20), 0.975),
    ):
        gain = problem.gain(problem.attack_with(attack))
        assert (gain > factor * best).all(), (attack, (gain / best).min())
        # Better than the optimum would be outside ball or box; 1e-6 is float32's rounding.
        assert (gain < best * (1 + 1e-6)).all(), attack


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_targeted_margin_of_many_classes(shape: tuple[int, ...], dtype: torch.dtype, box: Any) -> None:
    model, images, labels, targets = multiclass(shape, dtype)
    direction = (model.weight[targets] - model.weight[labels]).detach().reshape(shape)
    threat = ThreatModel("linf", 0.25, box)
    optimum = images + 0.25 * direction.sign()
    optimum = optimum if box is None else optimum.clamp(*box)
    for attack in (
        FGSM(threat, objective="margin", targeted=True),
        PGD(threat, objective="margin", targeted=True),
        PGD(threat, objective="margin", targeted=True, restarts=2),
    ):
        assert torch.equal(attack(model, images, labels, targets=targets, keys=keys_of(len(images))), optimum)


def test_untargeted_margin_of_many_classes() -> None:
    """The optimum is the best over classes of the closed form; single starts may end at another class's."""
    model, images, labels, _ = multiclass((17, 3, 2, 2), torch.float64)
    threat = ThreatModel("linf", 0.25, box=None)
    optima = torch.stack(
        [
            images + 0.25 * (model.weight[other] - model.weight[labels]).detach().sign().reshape(images.shape)
            for other in range(5)
        ]
    )
    margin = get_objective("margin")
    with torch.no_grad():
        best = torch.stack([margin(model(optimum), labels) for optimum in optima]).amax(dim=0)
        found = margin(
            model(PGD(threat, objective="margin", restarts=5)(model, images, labels, keys=keys_of(17))), labels
        )
        alone = margin(model(PGD(threat, objective="margin")(model, images, labels, keys=keys_of(17))), labels)
    assert (found <= best + 1e-12).all() and (alone <= found + 1e-12).all()  # rounding of sums of 12 numbers
    assert (found > best - 1e-12).double().mean() >= 0.9
    # FGSM goes where the best other class at the image is.
    other = model(images).scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    expected = optima[other, torch.arange(17)]
    assert torch.equal(FGSM(threat, objective="margin")(model, images, labels), expected)


@pytest.mark.parametrize("objective", ["ce", "margin", "dlr"])
def test_target_is_the_best_other_class_by_default(objective: str) -> None:
    model, images, labels, _ = multiclass((9, 12), torch.float64)
    attack = PGD(ThreatModel("linf", 0.1), steps=3, objective=objective, targeted=True)
    targets = model(images).scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    found = attack(model, images, labels, keys=keys_of(9))
    assert torch.equal(found, attack(model, images, labels, targets=targets, keys=keys_of(9)))
    others = (targets + 1) % 5
    assert not torch.equal(found, attack(model, images, labels, targets=others, keys=keys_of(9)))


@pytest.mark.parametrize("targeted", [False, True])
def test_strong_attack_fools(targeted: bool) -> None:
    model, images, labels, targets = multiclass((17, 12), torch.float64)
    attack = PGD(ThreatModel("linf", 1.0, box=None), steps=20, targeted=targeted)
    adv_images = attack(model, images, labels, targets=targets if targeted else None, keys=keys_of(17))
    predictions = model(adv_images).argmax(dim=1)
    assert torch.equal(predictions, targets) if targeted else (predictions != labels).all()


# Steps, starts and restarts


@pytest.mark.parametrize(
    ("attack", "size"),
    [
        (FGSM(ThreatModel("linf", 0.1)), 0.1),
        (FGSM(ThreatModel("linf", 0.1), random_start=True), 0.125),
        (PGD(ThreatModel("linf", 0.1), steps=10), 0.025),
        (PGD(ThreatModel("l2", 0.5), steps=100), 0.0125),
        (PGD(ThreatModel("linf", "8/255"), step_size="2/255"), 2 / 255),
        (PGD(ThreatModel("linf", 0), steps=10), 0.0),
    ],
)
def test_step_size(attack: PGD, size: float) -> None:
    assert attack.resolved_step_size == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_each_step_is_the_textbooks(norm: str) -> None:
    """Against a plain loop: gradient, step, projection."""
    model, (images, labels) = network().eval(), some_images()
    threat = ThreatModel(norm, 0.2)
    attack = PGD(threat, steps=4, step_size=0.07, random_start=False)
    expected = images
    for _ in range(4):
        leaf = expected.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)
        if norm == "linf":
            expected = expected + 0.07 * grad.sign()
            expected = expected.clamp(images - 0.2, images + 0.2).clamp(0, 1)
        else:
            moved = expected + 0.07 * grad / grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) - images
            length = moved.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            expected = (images + moved * (0.2 / length).clamp(max=1)).clamp(0, 1)
    # Four steps of float64 rounding.
    assert_close(attack(model, images, labels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_budget_of_zero_gives_the_images_back(norm: str, random_start: bool) -> None:
    images, labels = some_images()
    attack = PGD(ThreatModel(norm, 0), steps=2, random_start=random_start)
    assert torch.equal(attack(network(), images, labels), images)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("objective", "targeted"), [("ce", False), ("margin", False), ("kl", False), ("dlr", True)])
def test_restarts_are_never_worse_than_one_start(norm: str, objective: str, targeted: bool) -> None:
    images, labels = some_images(40)
    model, threat = network().eval(), ThreatModel(norm, 0.3 if norm == "l2" else 0.06)
    targets = (labels + 1) % 4 if targeted else None

    def outcome(restarts: int) -> tuple[Tensor, Tensor]:
        attack = PGD(threat, steps=2, objective=objective, restarts=restarts, targeted=targeted)
        adv_images = attack(model, images, labels, targets=targets, keys=keys_of(40))
        assert threat.contains(adv_images, images).all()
        with torch.no_grad():
            logits = model(adv_images)
            predictions = logits.argmax(dim=1)
            fools = predictions == targets if targets is not None else predictions != labels
            return fools, get_objective(objective)(logits, labels, clean_logits=model(images), targets=targets)

    fools, scores = outcome(1)
    improved = 0
    for restarts in (2, 5):
        more_fools, more_scores = outcome(restarts)
        assert (more_fools >= fools).all()
        same = more_fools == fools
        # The same image scored in another batch: float64 rounding.
        assert (more_scores[same] >= scores[same] - 1e-12).all()
        improved += int((more_scores[same] > scores[same] + 1e-9).sum())
    assert improved > 0 and 0 < fools.sum() < 40  # the comparison had something to compare


def test_single_restart_is_the_first_of_several() -> None:
    """Where no later start is better, one start's image is what comes out."""
    problem = binary((60, 12), torch.float64)
    threat = ThreatModel("l2", 0.5, box=None)
    one = problem.attack_with(PGD(threat, steps=1))
    several = problem.attack_with(PGD(threat, steps=1, restarts=4))
    kept = (one == several).all(dim=1)
    assert kept.any() and not kept.all()
    # Float64 rounding of scores between which the attack chose.
    assert (problem.gain(several) > problem.gain(one) - 1e-12).all()


def test_kl_raises_the_divergence() -> None:
    images, labels = some_images(20)
    model, threat = network().eval(), ThreatModel("linf", 0.05)
    attack = PGD(threat, steps=10, objective="kl")
    kl = get_objective("kl")
    with torch.no_grad():
        start = threat.random_start(images, keys_of(20))
        before = kl(model(start), labels, clean_logits=model(images))
        adv_images = attack(model, images, labels, keys=keys_of(20))
        after = kl(model(adv_images), labels, clean_logits=model(images))
    assert (after > before).all()
    assert torch.equal(adv_images, attack(model, images, (labels + 1) % 4, keys=keys_of(20)))  # labels play no part


def test_kl_needs_a_random_start() -> None:
    threat, (images, labels) = ThreatModel("linf", 0.1), some_images()
    for make in (lambda: PGD(threat, objective="kl", random_start=False), lambda: FGSM(threat, objective="kl")):
        with pytest.raises(ValueError, match='"kl" needs random_start=True: its gradient at the clean image is zero'):
            make()
    # A Trainer hands its loss's objective later.
    with pytest.raises(ValueError, match='"kl" needs random_start=True'):
        PGD(threat, random_start=False).perturb(network(), images, labels, objective="kl")
    FGSM(threat, objective="kl", random_start=True)(network(), images, labels)


def test_objective_of_the_attack_goes_before_the_losss() -> None:
    model, threat, (images, labels) = network(), ThreatModel("linf", 0.1), some_images()
    keys = keys_of(len(images))

    def found(own: str | None, handed: str | None) -> Tensor:
        attack = PGD(threat, steps=2, objective=own)
        return attack.perturb(model, images, labels, keys=keys, objective=handed)

    assert torch.equal(found("ce", "kl"), found("ce", None))
    assert torch.equal(found(None, None), found("ce", None))
    assert torch.equal(found(None, "kl"), found("kl", None))
    assert not torch.equal(found("kl", None), found("ce", None))


# What is left as it was found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an attack must not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "random": torch.get_rng_state(),
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["modes"] == expected["modes"] and found["flags"] == expected["flags"]
    assert len(set(expected["modes"])) == 2 and len(set(expected["flags"])) == 2  # mixed, so that it is a test
    for name in ("grads", "tensors", "random"):
        assert_close(found[name], expected[name], rtol=0, atol=0)


class Watch(nn.Module):
    """Notes at each forward what an attack makes of the model; raises at the given call."""

    def __init__(self, inner: nn.Module, raise_at: int | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.raise_at = raise_at
        self.calls = 0
        self.training_modules = 0
        self.trainable = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.training_modules += sum(module.training for module in self.modules())
        self.trainable += sum(parameter.requires_grad for parameter in self.parameters())
        if self.calls == self.raise_at:
            raise KeyError("mid-attack")
        return self.inner(images)


@pytest.fixture
def watched() -> Iterator[Watch]:
    model = Watch(network())
    for index, parameter in enumerate(model.parameters()):
        if index % 2:
            parameter.grad = torch.full_like(parameter, 7.0)
    yield model


ATTACKS = {
    "FGSM": dict(steps=1, random_start=False),
    "PGD": dict(steps=3),
    "PGD-kl": dict(steps=3, objective="kl"),
    "restarts": dict(steps=2, restarts=3),
    "targeted": dict(steps=2, targeted=True),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_model_and_generator_are_left_as_they_were(norm: str, name: str, watched: Watch) -> None:
    images, labels = some_images()
    before, given = state_of(watched), images.clone()
    PGD(ThreatModel(norm, 0.1), **ATTACKS[name])(watched, images, labels, keys=keys_of(len(images)))
    assert_same_state(state_of(watched), before)
    assert torch.equal(images, given)
    # Inside: eval mode and no parameter that asks for a gradient.
    assert watched.calls >= 1 and watched.training_modules == 0 and watched.trainable == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_model_is_left_as_it_was_when_it_raises(name: str, watched: Watch) -> None:
    images, labels = some_images()
    attack = PGD(ThreatModel("linf", 0.1), **ATTACKS[name])
    before = state_of(watched)
    attack(watched, images, labels, keys=keys_of(len(images)))
    forwards = watched.calls
    assert forwards >= 1
    for raise_at in range(1, forwards + 1):
        watched.calls, watched.raise_at = 0, raise_at
        with pytest.raises(KeyError, match="mid-attack"):
            attack(watched, images, labels, keys=keys_of(len(images)))
        assert_same_state(state_of(watched), before)


def test_cost_is_one_forward_for_each_step() -> None:
    images, labels = some_images()
    for options, forwards in ((dict(steps=5), 5), (dict(steps=5, objective="kl"), 6), (dict(steps=2, restarts=3), 9)):
        model = Watch(network())
        PGD(ThreatModel("linf", 0.1), **options)(model, images, labels)
        # One more for the clean logits of kl; one more in each restart, to choose between them.
        assert model.calls == forwards, options


def test_images_that_ask_for_a_gradient_get_none() -> None:
    images, labels = some_images()
    images.requires_grad_()
    adv_images = PGD(ThreatModel("linf", 0.1), steps=2, objective="kl")(network(), images, labels)
    assert not adv_images.requires_grad and images.grad is None and images.requires_grad


def test_attack_works_where_gradients_are_switched_off() -> None:
    images, labels = some_images()
    attack, keys = PGD(ThreatModel("linf", 0.1), steps=2), keys_of(len(images))
    expected = attack(network(), images, labels, keys=keys)
    with torch.no_grad():
        assert torch.equal(attack(network(), images, labels, keys=keys), expected)
        assert not torch.is_grad_enabled()


def test_dropout_and_batch_statistics_play_no_part() -> None:
    images, labels = some_images()
    attack, keys = PGD(ThreatModel("linf", 0.1), steps=2), keys_of(len(images))
    assert torch.equal(
        attack(network(), images, labels, keys=keys), attack(network().eval(), images, labels, keys=keys)
    )


# Randomness


def test_without_keys_torchs_generator_governs() -> None:
    images, labels = some_images()
    attack = PGD(ThreatModel("linf", 0.1), steps=1)
    torch.manual_seed(0)
    first, second = attack(network(), images, labels), attack(network(), images, labels)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(attack(network(), images, labels), first)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_keys_make_the_result_independent_of_the_batch(norm: str, name: str) -> None:
    images, labels = some_images(12)
    attack, keys, model = PGD(ThreatModel(norm, 0.1), **ATTACKS[name]), keys_of(12), network()
    whole = attack(model, images, labels, keys=keys)
    for chosen in (torch.tensor([3]), torch.tensor([11, 0, 7]), torch.arange(12).flip(0)):
        part = attack(model, images[chosen], labels[chosen], keys=keys[chosen])
        # Matrix products of other sizes may round otherwise: float64's rounding over a few steps.
        assert_close(part, whole[chosen], rtol=0, atol=1e-12)
    other = attack(model, images, labels, keys=keys_of(24)[12:])
    assert torch.equal(other, whole) == (name == "FGSM")


# Inputs


@pytest.mark.parametrize("norm", NORMS)
def test_memory_layout_changes_nothing(norm: str) -> None:
    images, labels = some_images()
    attack, keys, model = PGD(ThreatModel(norm, 0.1), steps=3), keys_of(len(images)), network()
    expected = attack(model, images, labels, keys=keys)
    strided = torch.stack([images, images], dim=-1)[..., 0]
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    expanded = images[:1].expand(6, -1, -1, -1)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for layout in (strided, transposed, channels_last):
        assert not layout.is_contiguous()
        # Sums over pixels may run in another order.
        assert_close(attack(model, layout, labels, keys=keys), expected, rtol=0, atol=1e-12)
    given = expanded.clone()
    assert_close(
        attack(model, expanded, labels, keys=keys), attack(model, given, labels, keys=keys), rtol=0, atol=1e-12
    )
    assert torch.equal(expanded, given)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch(norm: str, name: str) -> None:
    images, labels = some_images()
    adv_images = PGD(ThreatModel(norm, 0.1), **ATTACKS[name])(network(), images[:0], labels[:0])
    assert adv_images.shape == (0, 3, 3, 3) and adv_images.dtype == images.dtype


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision(norm: str) -> None:
    images, labels = some_images(dtype=torch.bfloat16)
    adv_images = PGD(ThreatModel(norm, 0.1), steps=3)(network(dtype=torch.bfloat16), images, labels)
    assert adv_images.dtype == torch.bfloat16 and ((adv_images >= 0) & (adv_images <= 1)).all()
    # A bfloat16 pixel is rounded by up to 2^-9; 27 of them make an L2 error of up to 0.01.
    slack = 2**-9 * (math.sqrt(27) if norm == "l2" else 1)
    assert ThreatModel(norm, 0.1).contains(adv_images, images, tolerance=slack).all()


@pytest.mark.parametrize("outside", [lambda x: x * 255, lambda x: x - 0.1, lambda x: x + 0.1, lambda x: x * torch.nan])
def test_images_outside_the_box_are_refused(outside: Any) -> None:
    images, labels = some_images()
    with pytest.raises(ValueError, match=r"\[0, 1\].*Found.*normalisation belongs inside the model"):
        PGD(ThreatModel("linf", 0.1))(network(), outside(images), labels)
    # Slack of float arithmetic is none of it, and is not handed on.
    adv_images = PGD(ThreatModel("linf", 0.1))(network(), (images * 1.000001).float().double(), labels)
    assert ThreatModel("linf", 0.1).contains(adv_images, images).all()


def test_targets_of_an_untargeted_attack_are_refused() -> None:
    images, labels = some_images()
    with pytest.raises(ValueError, match="targets were given to an untargeted attack; make it with targeted=True"):
        PGD(ThreatModel("linf", 0.1))(network(), images, labels, targets=labels)


class Broken(nn.Module):
    """Logits that are no numbers for every second image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = network()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        factor = torch.ones(len(images), 1, dtype=images.dtype)
        factor[::2] = self.value
        return self.inner(images) * factor


@pytest.mark.timeout(10)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_logits_that_are_no_numbers_do_no_harm(norm: str, name: str, value: float) -> None:
    """It comes to an end, and the other samples do not notice."""
    images, labels = some_images()
    attack, keys = PGD(ThreatModel(norm, 0.1), **ATTACKS[name]), keys_of(len(images))
    adv_images = attack(Broken(value), images, labels, keys=keys)
    expected = attack(network(), images, labels, keys=keys)
    assert adv_images.shape == images.shape
    assert_close(adv_images[1::2], expected[1::2], rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_logits_that_are_no_numbers_do_not_lead_out_of_ball_and_box(norm: str, value: float) -> None:
    """An image of NaN would fail every later check of the ball, and so count as one that the model withstood."""
    images, labels = some_images()
    adv_images = PGD(ThreatModel(norm, 0.1), steps=3)(Broken(value), images, labels, keys=keys_of(len(images)))
    assert ThreatModel(norm, 0.1).contains(adv_images, images).all()


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_stay_at_the_start(norm: str) -> None:
    """A model that ignores its input, as one whose softmax is saturated does."""
    images, labels = some_images()
    model = Linear(torch.zeros(4, 27, dtype=torch.float64))
    threat = ThreatModel(norm, 0.1)
    assert_close(PGD(threat, random_start=False)(model, images, labels), images, rtol=0, atol=0)
    once, often = (PGD(threat, steps=steps)(model, images, labels, keys=keys_of(6)) for steps in (1, 10))
    assert_close(once, often, rtol=0, atol=1e-15)  # the start, projected again
    assert not torch.equal(once, images)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_of_the_logits_under_margin_changes_nothing(norm: str, scale: float) -> None:
    problem = binary((5, 12), torch.float32)
    scaled = dataclasses.replace(problem, model=Linear(problem.model.weight.detach() * scale))
    attack = PGD(ThreatModel(norm, 0.1), steps=3, objective="margin")
    # Float32 rounding of unit vectors.
    assert_close(scaled.attack_with(attack), problem.attack_with(attack), rtol=0, atol=1e-6)


# What is refused at construction

LINF = ThreatModel("linf", 0.1)
BAD = [
    dict(threat="linf"),
    dict(threat=None),
    dict(threat=0.1),
    *(dict(steps=value) for value in (0, -1, 1.5, 10.0, "10", True, None)),
    *(dict(restarts=value) for value in (0, -1, 1.5, "2", True, None)),
    *(dict(step_size=value) for value in (0, -0.1, "0", "-1/255", "abc", "1/0", math.nan, math.inf, True)),
    *(dict(objective=value) for value in ("", "CE", "nll", 3)),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError) as error:
        PGD(**{"threat": LINF, **bad})
    message = str(error.value)
    assert f"Found {name} = {value!r}" in message and "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(restarts=2, random_start=False), "restarts = 2 without random_start"),
        (dict(objective="kl", random_start=False), '"kl" needs random_start=True'),
        (dict(objective="kl", targeted=True), '"kl" has no targeted form'),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PGD(LINF, **options)
    assert "\n" not in str(error.value)


def test_attack_is_a_value() -> None:
    assert PGD(LINF, step_size="2/255") == PGD(LINF, step_size=2 / 255)
    assert FGSM(LINF) == PGD(LINF, steps=1, random_start=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PGD(LINF).steps = 3


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (FGSM(ThreatModel("linf", "8/255")), "FGSM L-inf 8/255"),
        (PGD(ThreatModel("linf", "8/255"), steps=20), "PGD-20 L-inf 8/255"),
        (PGD(ThreatModel("l2", 0.5), restarts=5), "PGD-10 x5 L2 0.5"),
    ],
)
def test_text(attack: PGD, text: str) -> None:
    assert str(attack) == text
