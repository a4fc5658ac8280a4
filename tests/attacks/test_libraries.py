"""The attacks of other libraries: closed-form distances on linear models, the reference beside FAB, and the wrapper."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.attacks import lending
from robust_peft.attacks.libraries import DDN, FAB, MIFGSM, CarliniWagner, LibraryAttack
from robust_peft.attacks.pgd import PGD
from robust_peft.attacks.victim import Counted
from robust_peft.keyed_random import sample_keys
from robust_peft.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 0.05), ThreatModel("l2", 0.3)


def small(name: str, threat: ThreatModel | None = None) -> LibraryAttack:
    """Each attack with few steps, by a name that says the norm."""
    linf, l2 = threat or LINF, threat or L2
    makers: dict[str, Callable[[], LibraryAttack]] = {
        "fab-linf": lambda: FAB(linf, steps=5),
        "fab-l2": lambda: FAB(l2, steps=5),
        "t-fab-linf": lambda: FAB(linf, steps=5, targeted=True),
        "t-fab-l2": lambda: FAB(l2, steps=5, targeted=True),
        "mifgsm-linf": lambda: MIFGSM(linf, steps=5),
        "cw-linf": lambda: CarliniWagner(linf, steps=5),
        "cw-l2": lambda: CarliniWagner(l2, steps=10, binary_search_steps=5),
        "ddn-l2": lambda: DDN(l2, steps=10),
    }
    return makers[name]()


def generous(name: str) -> LibraryAttack:
    """The same with a budget at which it should break most samples."""
    return small(name, ThreatModel("linf", 0.3) if "linf" in name else ThreatModel("l2", 2))


NAMES = ["fab-linf", "fab-l2", "t-fab-linf", "t-fab-l2", "mifgsm-linf", "cw-linf", "cw-l2", "ddn-l2"]
FABS = [name for name in NAMES if "fab" in name]
every = pytest.mark.parametrize("name", NAMES)


class Linear(nn.Module):
    """Logits linear in the pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class Wrapped(nn.Module):
    """A model behind a change of its pixels or logits."""

    def __init__(self, model: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        images = images if self.before is None else self.before(images)
        logits = self.model(images)
        return logits if self.after is None else self.after(logits)


def some_images(count: int = 6, shape: tuple[int, ...] = (3, 4, 4), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def network(classes: int = 4, dtype: torch.dtype = torch.float64, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, classes)
    model = nn.Sequential(*layers).to(dtype).eval()
    with torch.no_grad():
        model[-1].weight *= 3
    return model


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(dim=1)


def problem(
    count: int = 6, dtype: torch.dtype = torch.float64, classes: int = 4, channels: int = 3
) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, images, and its own answers as labels."""
    model, images = network(classes, dtype, channels), some_images(count, (channels, 4, 4), dtype)
    return model, images, predictions(model, images)


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


# Strength: closed forms on linear models


def linear_problem(norm: str, classes: int = 5, count: int = 40) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """A linear model, images far from the box, labels, and the distance to the nearest boundary in the norm."""
    generator = torch.Generator().manual_seed(classes)
    images = torch.rand((count, 3, 4, 4), generator=generator) * 0.3 + 0.35
    weight = torch.randn(classes, 48, generator=generator) * 0.3
    model = Linear(weight)
    logits = (images.flatten(1) @ weight.T).double()
    labels = logits.argmax(dim=1)
    differences = (weight.unsqueeze(0) - weight[labels].unsqueeze(1)).double()
    length = differences.norm(1 if norm == "linf" else 2, dim=2)
    distance = (logits.gather(1, labels.unsqueeze(1)) - logits) / length
    return model, images, labels, distance.scatter(1, labels.unsqueeze(1), torch.inf).amin(dim=1)


STRONG: list[tuple[str, Callable[[ThreatModel], LibraryAttack], str, float]] = [
    ("fab", FAB, "linf", 1.02),
    ("fab", FAB, "l2", 1.02),
    ("t-fab", lambda threat: FAB(threat, targeted=True), "linf", 1.02),
    ("t-fab", lambda threat: FAB(threat, targeted=True), "l2", 1.02),
    ("cw", CarliniWagner, "l2", 1.06),
    # Of several classes the cross-entropy's gradient does not point at the nearest.
    ("ddn", DDN, "l2", 1.1),
]


@pytest.mark.parametrize(
    ("make", "norm", "factor"), [row[1:] for row in STRONG], ids=[f"{r[0]}-{r[2]}" for r in STRONG]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_minimal_norm_on_a_linear_model(make: Any, norm: str, factor: float, classes: int) -> None:
    """Exactly the samples nearer to their boundary than the budget are broken, by an image about as near."""
    model, images, labels, distance = linear_problem(norm, classes)
    threat = ThreatModel(norm, distance.median().item() * 1.02)
    adv_images = make(threat)(model, images, labels)
    fooled = predictions(model, adv_images) != labels
    sure, impossible = distance < threat.eps / factor, distance > threat.eps
    assert sure.sum() >= 10 and impossible.sum() >= 10
    assert fooled[sure].all() and not fooled[impossible].any()
    length = (adv_images - images).double().flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
    assert (length[fooled] <= factor * distance[fooled]).all()
    assert threat.contains(adv_images, images).all()


def test_mifgsm_reaches_the_corner_of_the_ball() -> None:
    """On a linear model of two classes every step has the same sign: K steps of eps / K reach the optimum."""
    for eps in (0.05, 0.3):  # with torchattacks' step of 2/255, ten steps would end at 0.08
        model, images, labels, _ = linear_problem("linf", 2)
        direction = (model.weight[1 - labels] - model.weight[labels]).sign().reshape(images.shape)
        adv_images = MIFGSM(ThreatModel("linf", eps))(model, images, labels)
        # Ten additions of float32.
        assert_close(adv_images, (images + eps * direction).clamp(0, 1).detach(), rtol=0, atol=1e-6)


def test_mifgsm_is_the_papers() -> None:
    """Eq. 6 and 7 of Dong et al., written down once more, with steps that make the momentum matter."""
    model, images, labels = problem(20)
    threat, expected, momentum = ThreatModel("linf", 0.1), images, torch.zeros_like(images)
    for _ in range(10):
        expected = expected.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(expected), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, expected)
        momentum = momentum + grad / grad.abs().sum(dim=(1, 2, 3), keepdim=True)
        expected = torch.clamp(expected.detach() + 0.03 * momentum.sign(), images - 0.1, images + 0.1).clamp(0, 1)
    adv_images = MIFGSM(threat, steps=10, step_size=0.03)(model, images, labels)
    assert_close(adv_images, expected, rtol=0, atol=1e-12)


def test_mifgsm_goes_on_where_one_gradient_vanishes() -> None:
    """The momentum carries it; a division by the gradient's zero size would end the sample's attack there."""
    model, images, labels, _ = linear_problem("linf", 2)
    calls = 0

    def dead_once(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits * 0 if calls == 3 else logits

    alive = MIFGSM(LINF)(model, images, labels)
    assert_close(MIFGSM(LINF)(Wrapped(model, after=dead_once), images, labels), alive, rtol=0, atol=1e-6)


def test_cw_moves_black_and_white_pixels() -> None:
    """Where the tanh is saturated an attack with too short a step, or none at infinity, would never arrive."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand((20, 1, 6, 6), generator=generator) > 0.5).float()
    model = Linear(torch.randn(3, 36, generator=generator) * 0.3)
    labels = predictions(model, images)
    threat = ThreatModel("l2", 3)
    assert (predictions(model, CarliniWagner(threat)(model, images, labels)) != labels).all()


def test_cw_under_linf_is_pgd_on_the_margin() -> None:
    model, images, labels = problem()
    pgd = PGD(LINF, steps=100, objective="margin")
    keys = keys_of(6)
    expected = pgd(model, images, labels, keys=keys)
    assert_close(CarliniWagner(LINF)(model, images, labels, keys=keys), expected, rtol=0, atol=0)


def test_cw_that_finds_nothing_leaves_the_image() -> None:
    """foolbox answers with a black image then."""
    model, images, labels = problem()
    adv_images = CarliniWagner(L2, steps=1, binary_search_steps=1)(model, images, labels)
    assert_close(adv_images, images, rtol=0, atol=0)


# Strength: beside the reference


def trained_network(classes: int = 10) -> tuple[nn.Module, Tensor, Tensor]:
    """A multi-layer perceptron trained on noisy patterns of 8 x 8 pixels, and 100 test images."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand((classes, 1, 8, 8), generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn((count, 1, 8, 8), generator=generator)
        return (0.5 + 0.3 * (patterns[labels] - 0.5) + 0.12 * noise).clamp(0, 1), labels

    images, labels = draw(1500)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), *draw(100)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    return trained_network()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.03), ThreatModel("l2", 0.25)], ids=str)
def test_fab_is_as_strong_as_the_reference(trained: Any, threat: ThreatModel, targeted: bool) -> None:
    model, images, labels = trained
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    state = torch.get_rng_state()
    reference = FABAttack_PT(
        model, norm=norm, n_iter=100, eps=threat.eps, targeted=targeted, device=torch.device("cpu")
    )
    expected = reference.perturb(images, labels)
    torch.set_rng_state(state)
    adv_images = FAB(threat, targeted=targeted)(model, images, labels)
    standing, reference_standing = (int((predictions(model, x) == labels).sum()) for x in (adv_images, expected))
    clean = int((predictions(model, images) == labels).sum())
    assert 15 <= reference_standing <= clean - 15  # the attack has something to do, and does not do it all
    assert abs(standing - reference_standing) <= 1


def test_untargeted_and_targeted_fab_reach_each_class() -> None:
    """Two classes to twenty: as many targets as there are, nine at most."""
    for classes, targets in ((2, 1), (3, 2), (10, 9), (20, 9)):
        model, images, labels = problem(3, classes=classes)
        tiny = ThreatModel("linf", 1e-6)  # nobody is broken, so that every target is tried
        counted = Counted(model)
        FAB(tiny, steps=2, targeted=True)(counted, images, labels)
        assert counted.backwards == 3 * 2 * targets
        counted = Counted(model)
        FAB(tiny, steps=2)(counted, images, labels)
        assert counted.backwards == 3 * 2 * (classes - 1)
    counted = Counted(model)
    FAB(tiny, steps=2, targeted=True, num_targets=4)(counted, images, labels)
    assert counted.backwards == 3 * 2 * 4


@every
@pytest.mark.parametrize("classes", [2, 3, 10, 20])
def test_any_number_of_classes(name: str, classes: int) -> None:
    """The budget is generous, so that each attack breaks most samples, whatever the classes."""
    model, images, labels = problem(10, classes=classes)
    adv_images = generous(name)(model, images, labels, keys=keys_of(10))
    assert (predictions(model, adv_images) != labels).sum() >= 6


def test_targets_come_in_descending_order_of_the_clean_logits() -> None:
    """With one target, it is the likeliest wrong class: a linear model of three classes shows which boundary it was."""
    model, images, labels, _ = linear_problem("l2", 3)
    threat = ThreatModel("l2", 5)
    adv_images = FAB(threat, targeted=True, num_targets=1)(model, images, labels)
    second = model(images).detach().argsort(dim=1, descending=True)[:, 1]
    logits = model(adv_images).detach()
    broken = predictions(model, adv_images) != labels
    # The target alone was brought up to the label: it is just above it, where the third class may be anywhere.
    rows = torch.arange(len(labels))
    gap = (logits[rows, second] - logits[rows, labels]).abs()
    clean_gap = (model(images)[rows, second] - model(images)[rows, labels]).abs().detach()
    assert broken.sum() >= 30 and (gap[broken] < 0.1 * clean_gap[broken]).all()


@pytest.mark.parametrize("name", FABS)
@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_scale_of_the_logits_under_fab_hardly_matters(name: str, scale: float) -> None:
    """torchattacks' FAB and the reference do nothing under L2 where gradients are below 1e-8."""
    model, images, labels, distance = linear_problem(small(name).threat.norm)
    attack = small(name, ThreatModel(small(name).threat.norm, distance.median().item()))
    scaled = Linear(model.weight.detach() * scale)
    fooled = predictions(scaled, attack(scaled, images, labels)) != labels
    plain = predictions(model, attack(model, images, labels)) != labels
    # Rounding may flip a sample at the boundary.
    assert plain.sum() >= 15 and (fooled != plain).sum() <= 1


@pytest.mark.parametrize("make", [DDN, MIFGSM])
def test_a_hardly_sloping_loss(make: Any) -> None:
    """foolbox's DDN takes gradients below 1e-12 for shorter than they are, and those below 1e-19 for zero."""
    norm = "l2" if make is DDN else "linf"
    model, images, labels, distance = linear_problem(norm, classes=2)
    attack = make(ThreatModel(norm, distance.median().item() * 1.02))
    faint = Wrapped(model, after=lambda logits: logits * 1e-20)
    assert_close(attack(faint, images, labels), attack(model, images, labels), rtol=0, atol=1e-3)
    assert (predictions(model, attack(faint, images, labels)) != labels).sum() >= 15


# What the wrapper promises


@every
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (3, 5, 4)])
def test_ball_and_box(name: str, shape: tuple[int, ...]) -> None:
    images = some_images(9, shape, torch.float32)
    images[0], images[1] = 0, 1
    model = Linear(torch.randn(4, math.prod(shape), generator=torch.Generator().manual_seed(0)))
    labels = predictions(model, images)
    for eps in (0.0, 0.03, 0.5):
        attack = small(name, ThreatModel("linf" if "linf" in name else "l2", eps))
        adv_images = attack(model, images, labels)
        assert adv_images.shape == images.shape and adv_images.dtype == images.dtype
        assert attack.threat.contains(adv_images, images, tolerance=1e-6).all()
        assert adv_images.amin() >= 0 and adv_images.amax() <= 1


@every
def test_wrong_images_are_left_or_stay_wrong(name: str) -> None:
    """Labels that the model does not give: the clean image is in the ball, so nothing right may come out."""
    model, images, labels = problem()
    labels = (labels + 1) % 4
    if name != "mifgsm-linf":  # returns where it ends, as it does for everyone
        assert (predictions(model, small(name)(model, images, labels)) != labels).all()


@every
def test_another_box(name: str) -> None:
    """Pixels in [-1, 3]: the attack of the same model of pixels in [0, 1], moved and stretched."""
    model, images, labels = problem()
    keys = keys_of(len(images))
    unit = small(name)
    expected = unit(model, images, labels, keys=keys)
    wide = small(name, ThreatModel(unit.threat.norm, unit.threat.eps * 4, box=(-1, 3)))
    found = wide(Wrapped(model, before=lambda x: (x + 1) / 4), images * 4 - 1, labels, keys=keys)
    # FAB computes in float32.
    assert_close((found + 1) / 4, expected, rtol=0, atol=1e-5)
    assert not torch.equal(expected, images)


def test_another_box_and_steps_that_leave_the_ball() -> None:
    model, images, labels = problem()
    expected = MIFGSM(LINF, steps=5, step_size=0.03)(model, images, labels)
    wide = MIFGSM(ThreatModel("linf", 0.2, box=(-1, 3)), steps=5, step_size=0.12)
    found = wide(Wrapped(model, before=lambda x: (x + 1) / 4), images * 4 - 1, labels)
    assert_close((found + 1) / 4, expected, rtol=0, atol=1e-9)


@every
def test_no_box_is_refused(name: str) -> None:
    norm = small(name).threat.norm
    with pytest.raises(ValueError, match=r"needs a threat with a box.*Found box = None"):
        small(name, ThreatModel(norm, 0.1, box=None))


class Noisy(nn.Module):
    """Draws from, and seeds, every generator there is, in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        return self.inner(images)


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = numpy.random.get_state()
    return (torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), *rest)


class Immovable(Wrapped):
    """Refuses what libraries do to a model beside calling it."""

    def train(self, mode: bool = True) -> Immovable:
        raise AssertionError("train() or eval() reached the model")

    def _apply(self, fn: Any, recurse: bool = True) -> Immovable:
        raise AssertionError("to() reached the model")


@every
def test_libraries_cannot_reach_the_model(name: str) -> None:
    model, images, labels = problem()
    expected = small(name)(model, images, labels, keys=keys_of(6))
    found = small(name)(Immovable(model), images, labels, keys=keys_of(6))
    assert_close(found, expected, rtol=0, atol=0)


@every
@pytest.mark.parametrize("given", [False, True])
def test_random_states_are_the_callers(name: str, given: bool) -> None:
    _, images, labels = problem()
    before = random_states()
    small(name)(Noisy(), images, labels, keys=keys_of(6) if given else None)
    # A model without gradients makes DDN draw noise.
    small(name)(Linear(torch.zeros(4, 48, dtype=torch.float64)), images, torch.zeros_like(labels))
    assert random_states() == before


class State:
    """Everything about a model that an attack has to leave as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.grads = {
            name: None if parameter.grad is None else (id(parameter.grad), parameter.grad.clone().tolist())
            for name, parameter in model.named_parameters()
        }
        self.values = {name: value.clone().tolist() for name, value in model.state_dict().items()}

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)


def worn(model: nn.Module) -> nn.Module:
    """In train mode but for one layer, with one parameter frozen, and some with gradients."""
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 7.0)
    return model


@every
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, images, labels = problem()
    before = State(worn(model))
    small(name)(model, images, labels)
    assert State(model) == before


class Fails(nn.Module):
    """Raises in its n-th forward pass, in the mode and with the flags that it should have there."""

    def __init__(self, model: nn.Module, after: int) -> None:
        super().__init__()
        self.model, self.left = model, after

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        assert not any(module.training for module in self.modules())
        assert not any(parameter.requires_grad for parameter in self.parameters())
        if self.left == 0:
            # What a library might leave behind when it fails.
            self.train(), torch.manual_seed(1), random.seed(1), numpy.random.seed(1), torch.set_grad_enabled(False)
            self.requires_grad_(True)
            raise RuntimeError("no more")
        return self.model(images)


@every
@pytest.mark.parametrize("after", [1, 2, 4])
def test_everything_is_left_as_it_was_when_the_attack_raises(name: str, after: int) -> None:
    model, images, labels = problem()
    failing = Fails(worn(model), after)
    before, states = State(failing), random_states()
    with pytest.raises(RuntimeError, match="no more"):
        small(name)(failing, images, labels)
    assert State(failing) == before and random_states() == states and torch.is_grad_enabled()


@every
def test_nothing_is_printed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, images, labels = problem()
    small(name)(model, images, labels)
    assert capfd.readouterr() == ("", "")


@every
def test_under_the_callers_no_grad(name: str) -> None:
    model, images, labels = problem()
    attack, keys = small(name), keys_of(6)
    expected = attack(model, images, labels, keys=keys)
    with torch.no_grad():
        found = attack(model, images, labels, keys=keys)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not found.requires_grad
    assert_close(found, expected, rtol=0, atol=0)


@every
def test_layouts_of_memory(name: str) -> None:
    model, images, labels = problem()
    attack, keys = small(name), keys_of(6)
    expected = attack(model, images, labels, keys=keys)
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    strided = images.repeat_interleave(2, dim=3)[..., ::2]
    for layout in (images.contiguous(memory_format=torch.channels_last), transposed, strided):
        assert not layout.is_contiguous()
        given = layout.clone()
        assert_close(attack(model, layout, labels, keys=keys), expected, rtol=0, atol=0)
        assert torch.equal(layout, given)
    model.to(memory_format=torch.channels_last)
    # The convolution may sum in another order; FAB rounds to float32 besides.
    assert_close(attack(model, images, labels, keys=keys), expected, rtol=0, atol=1e-6)


@every
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_seven_is_seven_batches_of_one(name: str, dtype: torch.dtype, channels: int) -> None:
    model, images, labels = problem(7, dtype, channels=channels)
    attack, keys = small(name), keys_of(7)
    together = attack(model, images, labels, keys=keys)
    alone = torch.cat([attack(model, images[i : i + 1], labels[i : i + 1], keys=keys[i : i + 1]) for i in range(7)])
    assert together.dtype == alone.dtype == dtype
    # Ten to fifty steps' worth of rounding; at half precision of float32 where FAB's path branches.
    assert_close(alone, together, rtol=0, atol=1e-4 if dtype == torch.float32 or "fab" in name else 1e-9)
    assert torch.equal(predictions(model, alone) != labels, predictions(model, together) != labels)


class Step(nn.Module):
    """Two classes by whether the first pixel is below a threshold: no gradient anywhere."""

    def __init__(self, thresholds: Tensor) -> None:
        super().__init__()
        self.thresholds = thresholds

    def forward(self, images: Tensor) -> Tensor:
        low = (images[:, 0, 0, 0] < self.thresholds).to(images.dtype) + 0 * images.flatten(1).sum(dim=1)
        return torch.stack([1 - low, low], dim=1)


def test_noise_of_ddn_belongs_to_the_sample() -> None:
    """Where gradients vanish foolbox draws from torch's generator, in the order of the batch."""
    images, keys, attack = some_images(7), keys_of(7), DDN(L2, steps=20)
    thresholds, labels = images[:, 0, 0, 0] - 0.001, torch.zeros(7, dtype=torch.int64)
    together = attack(Step(thresholds), images, labels, keys=keys)
    singly = (slice(i, i + 1) for i in range(7))
    alone = torch.cat([attack(Step(thresholds[i]), images[i], labels[i], keys=keys[i]) for i in singly])
    assert (together != images).flatten(1).any(dim=1).sum() >= 4
    assert_close(alone, together, rtol=0, atol=1e-9)
    assert not torch.equal(attack(Step(thresholds), images, labels, keys=keys + 1), together)
    # Without keys they are drawn from torch's generator.
    torch.manual_seed(0)
    first, second = (attack(Step(thresholds), images, labels) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, second) and not torch.equal(attack(Step(thresholds), images, labels), first)


@every
def test_empty_batch(name: str) -> None:
    model, images, labels = problem()
    adv_images = small(name)(model, images[:0], labels[:0])
    assert adv_images.shape == (0, 3, 4, 4) and adv_images.dtype == images.dtype


@every
def test_half_precision(name: str) -> None:
    model, images, labels = problem(dtype=torch.bfloat16)
    adv_images = small(name)(model, images, labels)
    assert adv_images.dtype == torch.bfloat16
    # A bfloat16 pixel is rounded by up to 2^-9; 48 of them make an L2 error of up to 0.014.
    assert small(name).threat.contains(adv_images, images, tolerance=2**-9 * 7).all()


@every
def test_precise_images_stay_precise(name: str) -> None:
    """FAB computes in float32: what it returns for float64 images is in their ball all the same, to their rounding."""
    model, images, labels = problem(9)
    adv_images = small(name)(model, images, labels)
    assert adv_images.dtype == torch.float64
    assert small(name).threat.contains(adv_images, images, tolerance=1e-12).all()


@every
def test_a_model_without_parameters(name: str) -> None:
    """torchattacks asks the first parameter where to compute."""
    _, images, labels = problem()
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Wrapped(nn.Flatten(), after=lambda x: x @ weight.T)
    labels = predictions(model, images)
    assert (predictions(model, generous(name)(model, images, labels)) != labels).sum() >= 4


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_do_no_harm(name: str, value: float) -> None:
    """Every second image's; the others do not notice, and no pixel becomes NaN."""
    model, images, labels = problem()
    keys, odd = keys_of(6), torch.arange(6) % 2 == 1
    broken = Wrapped(model, after=lambda logits: logits * torch.where(odd, value, 1.0).unsqueeze(1).to(logits.dtype))
    attack = small(name)
    # Whoever is left out changes who is odd, so nobody is.
    if isinstance(attack, FAB):
        attack = dataclasses.replace(attack, early_stop=False)
    found = attack(broken, images, labels, keys=keys)
    expected = attack(model, images, labels, keys=keys)
    assert attack.threat.contains(found, images).all()
    assert_close(found[~odd], expected[~odd], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mifgsm-linf", "cw-linf")])
def test_an_answer_that_is_no_number_is_a_find(name: str) -> None:
    """Half-way to the boundary, which itself is out of reach, the model answers NaN: that is not right."""
    model, images, labels, distance = linear_problem(small(name).threat.norm, classes=2)
    rows = torch.arange(40)
    clean_margin = (model(images)[rows, labels] - model(images)[rows, 1 - labels]).detach()

    def blind(logits: Tensor) -> Tensor:
        margin = logits[rows, labels] - logits[rows, 1 - labels]
        return logits * torch.where(margin < 0.5 * clean_margin, torch.nan, 1.0).unsqueeze(1)

    model = Wrapped(model, after=blind)
    threat = ThreatModel(small(name).threat.norm, 0.9 * distance.amin().item())
    within_reach = 0.5 * distance < threat.eps / 1.2
    makers = {"fab": FAB, "t-fab": lambda t: FAB(t, targeted=True), "cw": CarliniWagner, "ddn": DDN}
    attack = makers[name.rsplit("-", 1)[0]](threat)
    if isinstance(attack, FAB):
        attack = dataclasses.replace(attack, early_stop=False)
    adv_images = attack(model, images, labels, keys=keys_of(40))
    assert within_reach.sum() >= 4 and model(adv_images).isnan().any(dim=1)[within_reach].all()
    # Asked who is wrong, it names all of them, whatever class the index of the NaN is.
    asked: list[Tensor] = []
    attack.perturb(model, adv_images, labels, confirm=lambda _, positions: asked.append(positions) or positions >= 0)
    assert torch.equal(asked[0], model(adv_images).isnan().any(dim=1).nonzero().squeeze(1))


class PoisonedGradient(torch.autograd.Function):
    """The identity; on the way back one pixel of each image is NaN."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        grad[:, 0, 0, 0] = torch.nan
        return grad


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cw-linf"])  # PGD's own, tested there
def test_gradients_that_are_no_numbers_are_zero(name: str) -> None:
    """That pixel stays, the others move, and the sample is broken as if the pixel could not be changed."""
    model, images, labels = problem()
    attack = generous(name)
    found = attack(Wrapped(model, before=PoisonedGradient.apply), images, labels, keys=keys_of(6))
    deaf = attack(Wrapped(model, before=lambda x: held_pixel(x)), images, labels, keys=keys_of(6))
    assert_close(found, deaf, rtol=0, atol=1e-6)
    assert (predictions(model, found) != labels).sum() >= 4


def held_pixel(images: Tensor) -> Tensor:
    """The identity, without a gradient at one pixel."""
    images = images.clone()
    images[:, 0, 0, 0] = images[:, 0, 0, 0].detach()
    return images


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cw-linf"])  # no library in it
def test_what_is_no_image_becomes_the_clean_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foolbox, torchattacks = lending.library("foolbox"), lending.library("torchattacks")
    model, images, labels = problem()

    def nonsense(self: Any, *args: Any, **options: Any) -> Tensor:
        found = images.float() + 0.01
        found[1::2, 0, 0, 0] = torch.nan
        return found

    for attack in (foolbox.attacks.DDNAttack, foolbox.attacks.L2CarliniWagnerAttack):
        monkeypatch.setattr(attack, "run", nonsense)
    monkeypatch.setattr(foolbox.attacks.LinfMomentumIterativeFastGradientMethod, "run", nonsense)
    monkeypatch.setattr(torchattacks.FAB, "attack_single_run", nonsense)
    monkeypatch.setattr(torchattacks.FAB, "attack_single_run_targeted", nonsense)
    attack = small(name)
    adv_images = attack(model, images, labels)
    assert torch.equal(adv_images[1::2], images[1::2])
    assert attack.threat.contains(adv_images, images).all()


@every
def test_models_without_gradients_end_where_they_are(name: str) -> None:
    """Gradients of zero, and a graph that is cut, as by a JPEG layer of numpy."""
    _, images, labels = problem()
    weight = torch.randn(4, 48, dtype=torch.float64)
    flat = Linear(torch.zeros(4, 48, dtype=torch.float64))
    cut = Linear(weight)
    models = [flat] if name == "cw-linf" else [flat, Wrapped(cut, after=lambda x: x.detach())]
    for model in models:
        labels = predictions(model, images)
        adv_images = small(name)(model, images, labels)
        assert small(name).threat.contains(adv_images, images).all()
        if name not in ("ddn-l2", "cw-linf"):  # which go where chance sends them
            assert_close(adv_images, images, rtol=0, atol=1e-6)


@every
def test_passes_are_counted(name: str) -> None:
    """Nobody is broken here, so that nothing is spared; the model that is given is the one that is asked."""
    model, images, labels = problem()
    counted = Counted(model)
    attack = small(name, ThreatModel(small(name).threat.norm, 1e-6))
    attack(counted, images, labels)
    passes = {
        "fab": (2 * 5 + 2, 3 * 5),
        "t-fab": (3 * (2 * 5 + 2) + 1, 3 * 5),
        "mifgsm": (5, 5),
        "cw": (5, 5) if "linf" in name else (5 * 10 + 2, 5 * 10),
        "ddn": (10 + 2, 10),
    }
    forwards, backwards = passes[name.rsplit("-", 1)[0]]
    assert (counted.forwards, counted.backwards) == (6 * forwards, 6 * backwards)


@every
def test_nothing_holds_the_model_afterwards(name: str) -> None:
    model, images, labels = problem()
    reference = weakref.ref(model)
    small(name)(model, images, labels)
    del model
    gc.collect()
    assert reference() is None


# Who is attacked


class Sizes(nn.Module):
    """Notes how many images each forward pass has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return self.model(images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_spares_the_broken(norm: str) -> None:
    model, images, labels, distance = linear_problem(norm)
    threat = ThreatModel(norm, distance.median().item())
    sizes = Sizes(model)
    adv_images = FAB(threat, steps=20, targeted=True)(sizes, images, labels)
    fooled = predictions(model, adv_images) != labels
    last = sizes.sizes[-1]
    assert sizes.sizes == sorted(sizes.sizes, reverse=True) and 0 < last <= 40 - fooled.sum() + 3
    together = Sizes(model)
    attack = FAB(threat, steps=20, targeted=True, early_stop=False)
    whole = attack(together, images, labels)
    assert set(together.sizes) == {40}
    assert torch.equal(predictions(model, whole) != labels, fooled)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_keeps_what_was_confirmed(norm: str) -> None:
    """Nobody is left out here, and what the later targets yield is not confirmed."""
    model, images, labels, distance = linear_problem(norm)
    attack = FAB(ThreatModel(norm, 3 * distance.max().item()), steps=5, targeted=True, early_stop=False)
    answers = iter([True])

    def at_first(adv_images: Tensor, positions: Tensor) -> Tensor:
        return torch.full((len(positions),), next(answers, False))

    kept = attack.perturb(model, images, labels, confirm=at_first)
    first = dataclasses.replace(attack, num_targets=1)(model, images, labels)
    broken = predictions(model, first) != labels
    assert broken.sum() >= 30 and torch.equal(kept[broken], first[broken])


@pytest.mark.parametrize("name", FABS)
def test_fab_leaves_alone_what_is_wrong_already(name: str) -> None:
    model, images, labels = problem()
    labels[::2] = (labels[::2] + 1) % 4
    sizes = Sizes(model)
    adv_images = small(name, ThreatModel(small(name).threat.norm, 1e-6))(sizes, images, labels)
    assert torch.equal(adv_images[::2], images[::2]) and set(sizes.sizes[1:]) == {3}
    sizes = Sizes(model)
    small(name)(sizes, images, (predictions(model, images) + 1) % 4)
    assert sizes.sizes == [6]  # once, to see that nothing is to be done


@pytest.mark.parametrize("name", FABS)
def test_fab_attacks_the_unconfirmed_on(name: str) -> None:
    """Where confirm never agrees, every target is tried; who is asked about is wrong, and stands at its position."""
    model, images, labels, distance = linear_problem(small(name).threat.norm)
    threat = ThreatModel(small(name).threat.norm, 3 * distance.max().item())
    asked: list[Tensor] = []

    def never(adv_images: Tensor, positions: Tensor) -> Tensor:
        assert (predictions(model, adv_images) != labels[positions]).all()
        assert threat.contains(adv_images, images[positions]).all()
        asked.append(positions)
        return torch.zeros(len(positions), dtype=torch.bool)

    counted = Counted(model)
    adv_images = small(name, threat).perturb(counted, images, labels, confirm=never)
    assert counted.backwards == 40 * 5 * 4
    assert len(torch.cat(asked).unique()) == 40
    # The best that there is, all the same.
    assert (predictions(model, adv_images) != labels).sum() >= 35


@pytest.mark.parametrize("name", ["fab-linf", "t-fab-l2", "ddn-l2", "cw-l2"])
def test_an_image_of_minimal_norm_is_confirmed_further_on(name: str) -> None:
    """The true boundary is a quarter further away than the attacked model's, as it may be for a copy in bfloat16."""
    norm = name.rsplit("-", 1)[1]
    model, images, labels, distance = linear_problem(norm, classes=2)
    threat = ThreatModel(norm, 1.3 * distance.max().item())
    direction = (model.weight[1 - labels] - model.weight[labels]).detach().reshape(images.shape)
    clean_margin = (images * direction).flatten(1).sum(dim=1)

    def confirm(adv_images: Tensor, positions: Tensor) -> Tensor:
        margin = (adv_images * direction[positions]).flatten(1).sum(dim=1)
        return margin > -0.25 * clean_margin[positions]

    everyone = torch.arange(40)
    makers = {"fab-linf": FAB, "t-fab-l2": lambda t: FAB(t, targeted=True), "ddn-l2": DDN, "cw-l2": CarliniWagner}
    attack = makers[name](threat)
    near = attack.perturb(model, images, labels)
    assert (predictions(model, near) != labels).all() and not confirm(near, everyone).any()
    far = attack.perturb(model, images, labels, confirm=confirm)
    assert threat.contains(far, images).all()
    assert confirm(far, everyone).sum() >= 38


# What is refused

BAD: list[tuple[type, dict[str, Any], str]] = [
    *(
        (kind, dict(threat=value), "Found threat")
        for kind in (FAB, MIFGSM, CarliniWagner, DDN)
        for value in ("linf", 1)
    ),
    *((kind, dict(steps=value), "Found steps") for kind in (FAB, CarliniWagner) for value in (0, 1.5, True, None)),
    *((FAB, dict(num_targets=value), "Found num_targets") for value in (0, -1, "9")),
    *((FAB, {name: 1}, f"Found {name}") for name in ("targeted", "early_stop")),
    *((MIFGSM, dict(step_size=value), "Found step_size") for value in (0, "abc", -1, math.nan, True)),
    *((MIFGSM, dict(steps=value), "Found steps") for value in (0, "10")),
    (MIFGSM, dict(threat=L2), "MIFGSM is an attack under linf"),
    (DDN, dict(threat=LINF), "DDN is an attack under l2"),
    (DDN, dict(threat=L2, steps=0), "Found steps"),
    (CarliniWagner, dict(threat=L2, step_size=0), "Found step_size"),
    (CarliniWagner, dict(threat=L2, binary_search_steps=0), "Found binary_search_steps"),
    (CarliniWagner, dict(step_size=0.1), "step_size belongs to the L2 attack"),
    (CarliniWagner, dict(binary_search_steps=9), "binary_search_steps belongs to the L2 attack"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=str)
def test_bad_values_are_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        kind(**{"threat": LINF, **options})
    assert "\n" not in str(error.value)


@every
def test_images_outside_the_box_are_refused(name: str) -> None:
    model, images, labels = problem()
    with pytest.raises(ValueError, match=r"\[0, 1\].*Found.*normalisation belongs inside the model"):
        small(name)(model, images * 255, labels)
    # Slack of float arithmetic is none of it, and is not handed on; foolbox itself would refuse it.
    slack = images.clone()
    slack[0], slack[1] = -1e-6, 1 + 1e-6
    adv_images = small(name)(model, slack, labels)
    assert adv_images.amin() >= 0 and adv_images.amax() <= 1


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for library in ("torchattacks", "foolbox"):
        monkeypatch.setitem(sys.modules, library, None)
    yield


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cw-linf"])
def test_a_missing_library_is_named_with_its_extra(name: str, without_libraries: None) -> None:
    model, images, labels = problem()
    before, states = State(worn(model)), random_states()
    library = "torchattacks" if "fab" in name else "foolbox"
    with pytest.raises(ImportError, match=rf'{library}: pip install "robust_peft\[attacks\]"'):
        small(name)(model, images, labels)
    assert State(model) == before and random_states() == states


def test_attacks_are_values() -> None:
    assert MIFGSM(LINF, step_size="2/255") == MIFGSM(LINF, step_size=2 / 255)
    assert FAB(LINF) == FAB(LINF, 100, False, 9) and FAB(LINF) != FAB(LINF, early_stop=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAB(LINF).steps = 3
    assert MIFGSM(ThreatModel("linf", "8/255"), steps=4).resolved_step_size == pytest.approx(2 / 255)


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (FAB(ThreatModel("linf", "8/255")), "FAB-100 L-inf 8/255"),
        (FAB(ThreatModel("l2", 0.5), 10, targeted=True), "targeted FAB-10 L2 0.5"),
        (MIFGSM(ThreatModel("linf", "8/255")), "MI-FGSM-10 L-inf 8/255"),
        (CarliniWagner(ThreatModel("l2", 0.5)), "C&W-9x100 L2 0.5"),
        (CarliniWagner(ThreatModel("linf", "8/255")), "C&W-100 L-inf 8/255"),
        (DDN(ThreatModel("l2", 0.5)), "DDN-100 L2 0.5"),
    ],
)
def test_text(attack: LibraryAttack, text: str) -> None:
    assert str(attack) == text
