"""Auto-PGD against closed forms, a plain loop of the paper's algorithm, and the official implementation."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
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


class Noting(nn.Module):
    """Keeps every batch that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = network(), []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.inner(images)


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
        attack = APGD(threat, objective, early_stop=False, **options)
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
    assert torch.equal(found[standing], optimum[standing])
    assert standing.any() or len(images) == 1
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
        with torch.enable_grad():
            value = get_objective(attack.objective or "")(model(leaf), label, clean_logits=clean_logits).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), grad.sign() if threat.norm == "linf" else grad / grad.norm()

    with torch.no_grad():
        clean_logits = model(image)
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


@pytest.mark.parametrize("objective", ["margin", "dlr", "kl"])
@pytest.mark.parametrize("norm", NORMS)
def test_each_sample_goes_its_own_way_through_the_papers_algorithm(norm: str, objective: str) -> None:
    model, (images, labels) = Singly(network().eval()), some_images(5)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.3)
    attack, keys = APGD(threat, objective, early_stop=False), keys_of(5)
    found = attack(model, images, labels, keys=keys)
    starts = threat.random_start(images, derive(keys, 0, 0))
    ways = []
    for index in range(5):
        row = slice(index, index + 1)
        expected, halvings = textbook(model, images[row], labels[row], starts[row], threat, attack)
        # Rounding, which may decide between iterates that are as good as each other.
        assert_close(found[row], expected, rtol=0, atol=1e-7)
        ways.append(tuple(halvings))
    if norm == "l2":  # in L-inf they find their corner at once
        assert len(set(ways)) > 1
        assert objective == "kl" or any(stuck for way in ways for _, stuck in way)  # the second condition had its say


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


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 34, 400])
def test_checkpoints_of_other_numbers_of_steps(steps: int) -> None:
    assert list(checkpoints(steps).items()) == recorded_checkpoints(steps)


def test_checkpoints_are_the_papers_at_100_steps() -> None:
    assert list(checkpoints(100)) == [round(100 * share) for share in SHARES]


# Beside the official implementation


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with two layers that learnt five blurred classes, and 100 images that it gets right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        centres = torch.rand(5, 3, 4, 4)
        labels = torch.arange(1200) % 5
        images = (0.25 + 0.5 * centres[labels] + 0.15 * torch.randn(1200, 3, 4, 4)).clamp(0, 1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[:1000]), labels[:1000]).backward()
            optimizer.step()
    right = (~fooled(model, images[1000:], labels[1000:])).nonzero().squeeze(1)[:100] + 1000
    assert len(right) == 100
    return model.eval().requires_grad_(False), images[right], labels[right]


OFFICIAL_NORMS = {"linf": "Linf", "l2": "L2"}


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.45)])
@pytest.mark.parametrize("name", ["ce", "targeted dlr"])
def test_as_many_stand_as_under_the_official_attack(
    trained: tuple[nn.Module, Tensor, Tensor], name: str, norm: str, eps: float
) -> None:
    model, images, labels = trained
    official_options: dict[str, Any] = dict(norm=OFFICIAL_NORMS[norm], eps=eps)
    if name == "ce":
        # Three restarts, because one start more or less lucky than the other's is worth a sample or two here.
        official_attack = APGDAttack(model, n_restarts=3, **official_options)
        attack = APGD(ThreatModel(norm, eps), "ce", restarts=3)
    else:
        official_attack = APGDAttack_targeted(model, n_target_classes=4, **official_options)
        attack = APGD(ThreatModel(norm, eps), "dlr", targeted=True)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
        official = official_attack.perturb(images, labels)
    threat = attack.threat
    assert threat.contains(official, images).all()
    adv_images = attack(model, images, labels, keys=keys_of(100))
    assert threat.contains(adv_images, images).all()
    ours, theirs = (100 - int(fooled(model, found, labels).sum()) for found in (adv_images, official))
    assert abs(ours - theirs) <= 1
    assert 20 < theirs < 95  # neither too weak to tell nor too strong


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.45)])
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


# Leaving the batch


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_leaving_the_batch_saves_forwards_and_no_verdict(norm: str, name: str) -> None:
    model, (images, labels) = Singly(network().eval()), some_images(16)
    threat, keys = ThreatModel(norm, 0.04 if norm == "linf" else 0.15), keys_of(16)

    def outcome(early_stop: bool) -> tuple[Tensor, Tensor, Counted]:
        counted = Counted(model)
        attack = APGD(threat, steps=8, early_stop=early_stop, **OPTIONS[name])
        adv_images = attack(counted, images, labels, keys=keys)
        return adv_images, fooled(model, adv_images, labels), counted

    stopped, stopped_fooled, cheap = outcome(True)
    whole, whole_fooled, full = outcome(False)
    assert stopped_fooled.any() and not stopped_fooled.all()
    if name == "kl":  # whose labels play no part where nobody leaves
        assert (stopped_fooled >= whole_fooled).all()
    else:
        assert torch.equal(stopped_fooled, whole_fooled)
    # Those that withstood were computed to the end, and to the same image.
    assert torch.equal(stopped[~stopped_fooled], whole[~stopped_fooled])
    assert cheap.forwards < full.forwards and cheap.backwards < full.backwards


def test_cost() -> None:
    """Nobody is fooled, so both modes cost the same: one forward more than steps, and a backward for each step."""
    images, labels = some_images()
    labels = network().eval()(images).argmax(dim=1)
    for options, forwards, backwards in (
        (dict(), 6, 5),
        (dict(eot=3), 18, 15),
        (dict(restarts=2), 12, 10),
        (dict(objective="kl"), 7, 5),
        (dict(targeted=True), 1 + 3 * 6, 3 * 5),
        (dict(targeted=True, num_targets=1, restarts=2), 1 + 2 * 6, 2 * 5),
    ):
        for early_stop in (False, True):
            model = Counted(network())
            APGD(ThreatModel("linf", 1e-4), steps=5, early_stop=early_stop, **options)(model, images, labels)
            assert (model.forwards, model.backwards) == (6 * forwards, 6 * backwards), (options, early_stop)


def test_who_is_fooled_costs_nothing_more() -> None:
    images, labels = some_images()
    wrong = (network().eval()(images).argmax(dim=1) + 1) % 4
    model = Counted(network())
    APGD(ThreatModel("linf", 1e-4), restarts=5)(model, images, wrong)
    assert (model.forwards, model.backwards) == (6, 6)
    # The other targets are not tried on those that the first one fooled, nor is an empty batch.
    noting = Noting()
    APGD(ThreatModel("linf", 1.0), "margin", targeted=True, steps=3)(noting, images, labels)
    sizes = [len(batch) for batch in noting.seen]
    assert sum(sizes) <= 6 + 6 * 4 and min(sizes) > 0


def test_nothing_waits_for_the_device_where_nobody_leaves() -> None:
    """On the meta device there are no values, so whatever needs one raises."""
    model, images, labels = linear((4, 3, 2, 2), torch.float32, classes=5)
    model, images, labels = model.to("meta"), images.to("meta"), labels.to("meta")
    for options in OPTIONS.values():
        attack = APGD(ThreatModel("l2", 0.5), steps=2, early_stop=False, **options)
        assert attack.perturb(model, images, labels, keys=keys_of(4).to("meta")).shape == images.shape


class Asked:
    """Confirms the samples of ``refused`` not before the given number of times that it was asked about them."""

    def __init__(self, refused: dict[int, int], batch: Tensor, model: nn.Module, labels: Tensor) -> None:
        self.refused, self.batch, self.model, self.labels = dict(refused), batch, model, labels
        self.confirmed: list[int] = []
        self.positions: list[list[int]] = []

    def __call__(self, adv_images: Tensor, positions: Tensor) -> Tensor:
        assert positions.dtype == torch.int64 and len(adv_images) == len(positions)
        assert ThreatModel("linf", 0.3).contains(adv_images, self.batch[positions]).all()
        self.positions.append(positions.tolist())
        wrong = fooled(self.model, adv_images, self.labels[positions])
        answers = []
        for position, is_wrong in zip(positions.tolist(), wrong.tolist(), strict=True):
            if is_wrong:
                self.refused[position] = self.refused.get(position, 0) - 1
            answers.append(is_wrong and self.refused[position] < 0)
            if answers[-1]:
                self.confirmed.append(position)
        return torch.tensor(answers, dtype=torch.bool)


@pytest.mark.parametrize("options", [dict(), dict(restarts=2), dict(objective="dlr", targeted=True)], ids=str)
def test_who_is_confirmed_leaves_and_who_is_not_is_attacked_on(options: dict[str, Any]) -> None:
    model, (images, labels) = network().eval(), some_images(8)
    attack, keys = APGD(ThreatModel("linf", 0.3), steps=6, **options), keys_of(8)
    assert fooled(model, attack(model, images, labels, keys=keys), labels).all()
    never, thrice = 2, 5
    confirm = Asked({never: 1000, thrice: 3}, images, model, labels)
    adv_images = attack.perturb(model, images, labels, keys=keys, confirm=confirm)
    # Each once but for the refused: nobody is asked about again once gone.
    asked = [position for positions in confirm.positions for position in positions]
    assert sorted(confirm.confirmed) == [0, 1, 3, 4, 5, 6, 7]
    assert asked.count(thrice) == 4 and asked.count(never) > 4
    assert all(asked.count(position) == 1 for position in (0, 1, 3, 4, 6, 7))
    # Each of the others keeps the image that it would have alone.
    assert_close(
        adv_images[[0, 1, 3, 4]], attack(model, images, labels, keys=keys)[[0, 1, 3, 4]], rtol=0, atol=1e-12
    )  # float64 rounding of other batches
    # The one that was refused comes as far as it can.
    alone = dataclasses.replace(attack, early_stop=False)(model, images, labels, keys=keys)
    if not options.get("targeted"):
        assert_close(adv_images[never], alone[never], rtol=0, atol=1e-12)


def test_confirm_is_given_the_whole_batch_where_nobody_leaves() -> None:
    model, (images, labels) = network().eval(), some_images(8)
    attack, keys = APGD(ThreatModel("linf", 0.3), steps=6, early_stop=False), keys_of(8)
    confirm = Asked({5: 2}, images, model, labels)
    adv_images = attack.perturb(model, images, labels, keys=keys, confirm=confirm)
    assert confirm.positions == [list(range(8))] * len(confirm.positions) and 3 <= len(confirm.positions) < 7
    assert set(confirm.confirmed) == set(range(8))
    assert fooled(model, adv_images, labels).all()


def test_image_that_was_refused_gives_way_to_one_that_was_confirmed() -> None:
    """However high the objective of the refused ones."""
    model, (images, labels) = network().eval(), some_images(8)
    seen: list[Tensor] = []

    def confirm_the_first(adv_images: Tensor, positions: Tensor) -> Tensor:
        seen.append(adv_images.clone())
        return torch.full((len(positions),), len(seen) == 1)

    attack = APGD(ThreatModel("linf", 0.3), steps=6, early_stop=False)
    adv_images = attack.perturb(model, images, labels, keys=keys_of(8), confirm=confirm_the_first)
    kept = (adv_images == seen[0]).flatten(1).all(dim=1)
    assert torch.equal(kept, fooled(model, seen[0], labels))
    assert kept.any() and not kept.all()


# Restarts, targets, fallbacks, passes


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_restarts_are_never_worse_than_one_start(norm: str, targeted: bool) -> None:
    model, (images, labels) = network().eval(), some_images(40)
    threat, margin = ThreatModel(norm, 0.06 if norm == "linf" else 0.3), get_objective("margin")

    def outcome(restarts: int, early_stop: bool) -> tuple[Tensor, Tensor]:
        attack = APGD(threat, "margin", steps=2, restarts=restarts, targeted=targeted, early_stop=early_stop)
        adv_images = attack(model, images, labels, keys=keys_of(40))
        with torch.no_grad():
            return fooled(model, adv_images, labels), margin(model(adv_images), labels)

    for early_stop in (False, True):
        fools, scores = outcome(1, early_stop)
        improved = 0
        for restarts in (2, 5):
            more_fools, more_scores = outcome(restarts, early_stop)
            assert (more_fools >= fools).all()
            same = more_fools == fools
            # The same image in another batch: float64 rounding.
            assert (more_scores[same] >= scores[same] - 1e-12).all()
            improved += int((more_scores > scores + 1e-9).sum())
        assert improved > 0 and 0 < fools.sum() < 40  # the comparison had something to compare


def test_each_run_draws_its_own_start() -> None:
    model, (images, labels) = Noting(), some_images()
    threat, keys = ThreatModel("linf", 0.1), keys_of(6)
    attack = APGD(threat, targeted=True, restarts=2, num_targets=2, steps=1, early_stop=False)
    attack(model, images, labels, keys=keys)
    starts = model.seen[1::2]  # one clean look, then start and step of each run
    expected = [threat.random_start(images, derive(keys, restart, place)) for place in range(2) for restart in range(2)]
    assert len(starts) == 4 and all(torch.equal(*pair) for pair in zip(starts, expected, strict=True))
    assert len({start.sum().item() for start in starts}) == 4


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_dlr_gives_way_to_the_margin_where_it_is_undefined(classes: int, targeted: bool, early_stop: bool) -> None:
    model, (images, labels) = network(classes), some_images(8, classes)
    adv_images = {}
    for objective in ("dlr", "margin", "ce"):
        counted = Counted(model)
        attack = APGD(
            ThreatModel("l2", 0.1), objective, steps=4, targeted=targeted, num_targets=9, early_stop=early_stop
        )
        adv_images[objective] = attack(counted, images, labels, keys=keys_of(8))
        if not early_stop:
            runs = min(9, classes - 1) if targeted else 1
            assert counted.forwards == 8 * (runs * 5 + targeted)
    undefined = classes < (4 if targeted else 3)
    assert torch.equal(adv_images["dlr"], adv_images["margin"]) == undefined
    assert classes == 2 or not torch.equal(adv_images["ce"], adv_images["margin"])


def test_one_class_has_no_target() -> None:
    images, labels = some_images(2)
    with pytest.raises(ValueError, match="needs at least 2 classes. Found 1"):
        APGD(LINF, targeted=True)(network(1), images, torch.zeros_like(labels))


class Alternating(nn.Module):
    """Two classes; ``logits + noise`` and ``logits - noise`` in turn, both linear in the pixels."""

    def __init__(self, model: Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.model, self.sign = model, 1.0
        noise = torch.randn(model.weight.shape, generator=generator, dtype=torch.float64)
        self.noise = Linear(noise.to(model.weight.dtype) * 5)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images) + self.sign * self.noise(images)
        self.sign = -self.sign
        return logits


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_passes_are_averaged(norm: str, early_stop: bool) -> None:
    """Over two passes the noise cancels from gradients, objectives and predictions: a known answer."""
    model, images, labels = linear((17, 3, 2, 2))
    threat, keys = ThreatModel(norm, 0.05 if norm == "linf" else 0.15), keys_of(17)

    def found(victim: nn.Module, eot: int) -> Tensor:
        return APGD(threat, "margin", steps=6, eot=eot, early_stop=early_stop)(victim, images, labels, keys=keys)

    expected = found(model, 1)
    for eot in (2, 4):  # float64 rounding of the noise
        assert_close(found(Alternating(model), eot), expected, rtol=0, atol=1e-12)
    assert (found(Alternating(model), 1) - expected).abs().max() > 1e-3
    wrong = fooled(model, expected, labels)
    assert wrong.any() and not wrong.all()
    counted = Counted(Alternating(model))
    found(counted, 4)
    assert counted.forwards % 4 == 0 and counted.backwards % 4 == 0
    assert early_stop or (counted.forwards, counted.backwards) == (17 * 7 * 4, 17 * 6 * 4)


def test_objective_of_the_attack_goes_before_the_losss() -> None:
    model, (images, labels), keys = network(), some_images(), keys_of(6)

    def found(own: str | None, handed: str | None) -> Tensor:
        attack = APGD(ThreatModel("linf", 0.1), own, steps=2, early_stop=False)
        return attack.perturb(model, images, labels, keys=keys, objective=handed)

    assert torch.equal(found("ce", "kl"), found("ce", None))
    assert torch.equal(found(None, None), found("ce", None))
    assert torch.equal(found(None, "kl"), found("kl", None))
    assert not torch.equal(found("kl", None), found("ce", None))
    with pytest.raises(ValueError, match='"kl" has no targeted form'):
        APGD(LINF, None, targeted=True).perturb(model, images, labels, objective="kl")


def test_labels_play_no_part_in_the_divergence() -> None:
    model, (images, labels), keys = network().eval(), some_images(20), keys_of(20)
    attack, kl = APGD(ThreatModel("linf", 0.05), "kl", steps=10, early_stop=False), get_objective("kl")
    adv_images = attack(model, images, labels, keys=keys)
    assert torch.equal(adv_images, attack(model, images, (labels + 1) % 4, keys=keys))
    with torch.no_grad():
        clean_logits, start = model(images), attack.threat.random_start(images, derive(keys, 0, 0))
        before = kl(model(start), labels, clean_logits=clean_logits)
        assert (kl(model(adv_images), labels, clean_logits=clean_logits) > before).all()


@pytest.mark.parametrize(
    ("objective", "targeted"),
    [("ce", False), ("dlr", False), ("margin", False), ("kl", False), ("ce", True), ("dlr", True)],
)
def test_best_image_seen_comes_back(objective: str, targeted: bool) -> None:
    """Highest objective, or margin where targets are compared, of those that fool where any does."""
    model, (images, labels) = Noting(), some_images(20)
    attack = APGD(ThreatModel("l2", 0.2), objective, steps=12, targeted=targeted, early_stop=False)
    adv_images = attack(model, images, labels, keys=keys_of(20))
    plain = network().eval()
    score = get_objective("margin" if targeted else objective)
    with torch.no_grad():
        seen = torch.stack(
            model.seen[objective == "kl" or targeted :]
        )  # without the clean images; [13 * runs, 20, ...]
        assert len(seen) == 13 * (3 if targeted else 1)
        clean_logits = plain(images)
        logits = torch.stack([plain(look) for look in seen])
        scores = torch.stack([score(look, labels, clean_logits=clean_logits) for look in logits])
    wrong = logits.argmax(dim=2) != labels
    if objective != "kl":
        scores = torch.where(wrong | ~wrong.any(dim=0), scores, -torch.inf)
    best = scores.argmax(dim=0)
    assert torch.equal(adv_images, seen[best, torch.arange(20)])
    assert len(best.unique()) > 2 and wrong.any(dim=0).any() and not wrong.any(dim=0).all()


# Ball, box and what is no number


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_ball_and_box_are_never_left(norm: str, dtype: torch.dtype, name: str) -> None:
    images, labels = some_images(12, dtype=dtype)
    images[:3], images[3:6] = 0, 1  # in corners of the box
    images[6] = images[6].round()
    model = network(dtype=dtype)
    for eps, steps, early_stop in ((0.0, 3, False), (1e-3, 5, True), (0.3, 1, True), (0.3, 5, False), (1.0, 5, False)):
        threat = ThreatModel(norm, eps)
        attack = APGD(threat, steps=steps, early_stop=early_stop, **OPTIONS[name])
        adv_images = attack(model, images, labels, keys=keys_of(12))
        # A few roundings of numbers up to 1, in each of 27 pixels.
        assert threat.contains(adv_images, images, tolerance=8 * torch.finfo(dtype).eps).all()
        assert ((adv_images >= 0) & (adv_images <= 1)).all()
        assert eps > 0 or torch.equal(adv_images, images)


class Spoiled(nn.Module):
    """Every second image's gradient, or logits, times ``value``."""

    def __init__(self, value: float, where: str) -> None:
        super().__init__()
        self.inner, self.value, self.where = network(), value, where

    def forward(self, images: Tensor) -> Tensor:
        # By content, not by place: who is in the batch changes.
        factor = torch.where(images[:, 0, 0, 0] > 0.5, self.value, 1.0).to(images.dtype)
        if self.where == "logits":
            return self.inner(images) * factor.detach().unsqueeze(1)
        if images.requires_grad:
            images = images * 1  # a place for the hook
            images.register_hook(lambda grad: grad * per_row(factor.detach(), grad))
        return self.inner(images)


@pytest.mark.parametrize("name", ["ce", "kl", "targeted", "restarts"])
@pytest.mark.parametrize(("where", "value"), [("gradient", math.nan), ("gradient", math.inf), ("logits", math.nan)])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_no_number_does_no_harm(norm: str, where: str, value: float, name: str) -> None:
    images, labels = some_images(12)
    images[:, 0, 0, 0] = torch.tensor([0.2, 0.8], dtype=images.dtype).repeat(6)
    threat, keys = ThreatModel(norm, 0.1), keys_of(12)
    for early_stop in (False, True):
        attack = APGD(threat, steps=3, early_stop=early_stop, **OPTIONS[name])
        adv_images = attack(Spoiled(value, where), images, labels, keys=keys)
        expected = attack(network(), images, labels, keys=keys)
        assert threat.contains(adv_images, images).all()  # which no NaN is
        assert_close(adv_images[::2], expected[::2], rtol=0, atol=1e-12)  # float64 rounding
        if where == "logits" and name != "kl":
            # An answer that is no number is wrong: the first one is kept, and stays where nobody leaves.
            start = threat.random_start(images, derive(keys, 0, 0))
            assert torch.equal(adv_images[1::2], start[1::2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_without_a_gradient_stay_and_the_others_go_on(value: float) -> None:
    model, images, labels = linear((5, 3, 2, 2))

    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            images = images * 1
            if images.requires_grad:
                images.register_hook(lambda grad: grad.index_fill(3, torch.tensor([0]), value))
            return model(images)

    threat, keys = ThreatModel("linf", 0.2), keys_of(5)
    adv_images = APGD(threat, "margin", steps=3, early_stop=False)(Half(), images, labels, keys=keys)
    optimum = (images + 0.2 * direction_to(model, images, labels, 1 - labels).sign()).clamp(0, 1)
    start = threat.random_start(images, derive(keys, 0, 0))
    assert torch.equal(adv_images[..., 1], optimum[..., 1])
    assert torch.equal(adv_images[..., 0], start[..., 0])
    # In L2 too, where one that is no number would take the others along.
    threat = ThreatModel("l2", 0.2, box=None)
    adv_images = APGD(threat, "margin", steps=20, early_stop=False)(Half(), images, labels, keys=keys)
    direction = direction_to(model, images, labels, 1 - labels)[..., 1].flatten(1)
    gain = ((adv_images - images)[..., 1].flatten(1) * direction).sum(dim=1)
    assert (gain > 0.8 * 0.2 * direction.norm(dim=1)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_slack_of_the_box_is_not_handed_on(norm: str) -> None:
    images, labels = torch.full((3, 3, 3, 3), 1 + 2e-6), torch.zeros(3, dtype=torch.int64)
    for weight in (0.0, math.nan):  # NaN: there is no best image to give back
        for objective in ("ce", "kl"):
            attack = APGD(ThreatModel(norm, 0.0), objective, steps=1, early_stop=False)
            assert attack(Linear(torch.full((4, 27), weight)), images, labels).max() <= 1


@pytest.mark.parametrize("outside", [lambda x: x * 255, lambda x: x - 0.1, lambda x: x + 0.1, lambda x: x * torch.nan])
def test_images_outside_the_box_are_refused(outside: Any) -> None:
    images, labels = some_images()
    with pytest.raises(ValueError, match=r"\[0, 1\].*Found.*normalisation belongs inside the model"):
        APGD(LINF)(network(), outside(images), labels)


# Randomness and the batch


@pytest.mark.parametrize("name", ["ce", "dlr", "kl", "targeted", "restarts"])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_image_does_not_depend_on_the_batch(norm: str, early_stop: bool, name: str) -> None:
    """Nor on who left it: equal images to the bit, from a model whose rounding does not depend on the batch."""
    images, labels = some_images(64)
    model, keys = Singly(network()), keys_of(64)
    attack = APGD(ThreatModel(norm, 0.04 if norm == "linf" else 0.15), steps=3, early_stop=early_stop, **OPTIONS[name])
    whole = attack(model, images, labels, keys=keys)
    sizes = {7: torch.randperm(64, generator=torch.Generator().manual_seed(0)).split(7), 1: torch.arange(64).split(1)}
    for size, parts in sizes.items():
        for part in parts[: 2 if size == 7 else 4]:
            found = attack(model, images[part], labels[part], keys=keys[part])
            assert torch.equal(found, whole[part]), (size, part)
    other = attack(model, images[:8], labels[:8], keys=keys_of(16)[8:])
    assert norm == "linf" or not torch.equal(other, whole[:8])  # in L-inf both may find one corner


def test_without_keys_torchs_generator_governs() -> None:
    images, labels = some_images()
    attack = APGD(ThreatModel("linf", 0.1), steps=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = attack(network(), images, labels), attack(network(), images, labels)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(attack(network(), images, labels), first)


# What is left as it was found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that an attack must not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("modes", "flags", "enabled"):
        assert found[name] == expected[name]
    assert len(set(expected["modes"])) == 2 and len(set(expected["flags"])) == 2  # mixed, so that it is a test
    for name in ("grads", "tensors", "random"):
        assert_close(found[name], expected[name], rtol=0, atol=0)


class Watch(nn.Module):
    """Notes at each forward what an attack makes of the model; raises at the given call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.raise_at = inner, 0
        self.calls = self.training_modules = self.trainable = 0

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


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_model_and_generator_are_left_as_they_were(early_stop: bool, name: str, watched: Watch) -> None:
    images, labels = some_images()
    before, given = state_of(watched), images.clone()
    attack = APGD(ThreatModel("l2", 0.1), steps=3, early_stop=early_stop, **OPTIONS[name])
    attack(watched, images, labels, keys=keys_of(6))
    assert_same_state(state_of(watched), before)
    assert torch.equal(images, given)
    # Inside: eval mode and no parameter that asks for a gradient.
    forwards = watched.calls
    assert forwards >= 1 and watched.training_modules == 0 and watched.trainable == 0
    for raise_at in range(1, forwards + 1):
        watched.calls, watched.raise_at = 0, raise_at
        with pytest.raises(KeyError, match="mid-attack"):
            attack(watched, images, labels, keys=keys_of(6))
        assert_same_state(state_of(watched), before)


def test_model_is_left_as_it_was_when_confirm_raises(watched: Watch) -> None:
    images, labels = some_images()
    before = state_of(watched)

    def confirm(adv_images: Tensor, positions: Tensor) -> Tensor:
        raise KeyError("mid-confirm")

    with pytest.raises(KeyError, match="mid-confirm"):
        APGD(ThreatModel("linf", 0.3)).perturb(watched, images, labels, keys=keys_of(6), confirm=confirm)
    assert_same_state(state_of(watched), before)


def test_images_that_ask_for_a_gradient_get_none() -> None:
    images, labels = some_images()
    images.requires_grad_()
    for attack in (APGD(LINF, steps=2, objective="kl"), APGD(LINF, steps=2, targeted=True, early_stop=False)):
        adv_images = attack(network(), images, labels)
        assert not adv_images.requires_grad and images.grad is None and images.requires_grad


@pytest.mark.parametrize("name", OPTIONS)
def test_attack_works_where_gradients_are_switched_off(name: str) -> None:
    images, labels = some_images()
    attack, keys = APGD(ThreatModel("linf", 0.1), steps=2, **OPTIONS[name]), keys_of(6)
    expected = attack(network(), images, labels, keys=keys)
    with torch.no_grad():
        assert torch.equal(attack(network(), images, labels, keys=keys), expected)
        assert not torch.is_grad_enabled()


# Inputs


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_memory_layout_changes_nothing(norm: str, early_stop: bool) -> None:
    images, labels = some_images()
    attack, keys, model = APGD(ThreatModel(norm, 0.05), steps=3, early_stop=early_stop), keys_of(6), network()
    expected = attack(model, images, labels, keys=keys)
    strided = torch.stack([images, images], dim=-1)[..., 0]
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for layout in (strided, transposed, channels_last):
        assert not layout.is_contiguous()
        # Sums over pixels may run in another order.
        assert_close(attack(model, layout, labels, keys=keys), expected, rtol=0, atol=1e-12)
    expanded = images[:1].expand(6, -1, -1, -1)
    given = expanded.clone()
    assert_close(
        attack(model, expanded, labels, keys=keys), attack(model, given, labels, keys=keys), rtol=0, atol=1e-12
    )
    assert torch.equal(expanded, given)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_empty_batch(early_stop: bool, name: str) -> None:
    images, labels = some_images()
    attack = APGD(LINF, steps=3, early_stop=early_stop, **OPTIONS[name])
    adv_images = attack(network(), images[:0], labels[:0])
    assert adv_images.shape == (0, 3, 3, 3) and adv_images.dtype == images.dtype


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision(norm: str, early_stop: bool) -> None:
    images, labels = some_images(dtype=torch.bfloat16)
    threat = ThreatModel(norm, 0.1)
    attack = APGD(threat, steps=5, early_stop=early_stop)
    adv_images = attack(network(dtype=torch.bfloat16), images, labels, keys=keys_of(6))
    assert adv_images.dtype == torch.bfloat16 and ((adv_images >= 0) & (adv_images <= 1)).all()
    # A bfloat16 pixel is rounded by up to 2^-9. L2's projection leaves a point where its 27 pixels' rounding may be
    # what is outside, by the threat model's own measure.
    slack = 2**-7 * (math.sqrt(27) / 4 + 4 * 0.1) if norm == "l2" else 2**-9
    assert threat.contains(adv_images, images, tolerance=slack).all()


@pytest.mark.parametrize("norm", NORMS)
def test_grey_images_and_a_box_of_ones_own(norm: str) -> None:
    model, images, labels = linear((9, 1, 3, 3), classes=4)
    images = images * 4 - 2
    threat = ThreatModel(norm, 0.5, box=(-2, 2))
    adv_images = APGD(threat, steps=5, early_stop=False)(model, images, labels, keys=keys_of(9))
    assert threat.contains(adv_images, images).all() and fooled(model, adv_images, labels).any()


# What is refused at construction

BAD: list[dict[str, Any]] = [
    *(dict(threat=value) for value in ("linf", None, 0.1)),
    *(dict([(name, value)]) for name in ("steps", "restarts", "eot") for value in (0, -1, 1.5, "2", True, None)),
    *(dict(objective=value) for value in ("", "CE", "nll", 3)),
    *(dict(rho=value) for value in (-0.1, 1.1, math.nan, "0.75", True, None)),
    *(dict(targeted=value) for value in (1, "no", None)),
    *(dict(early_stop=value) for value in (0, "yes", None)),
    *(dict(num_targets=value, targeted=True) for value in (0, -1, 1.5, "9", True, None)),
    dict(num_targets=3),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError) as error:
        APGD(**{"threat": LINF, **bad})
    message = str(error.value)
    assert name in message and f"Found {name} = {value!r}" in message and "\n" not in message


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match='"kl" has no targeted form'):
        APGD(LINF, "kl", targeted=True)
    images, labels = some_images()
    for call in (APGD(LINF).__call__, APGD(LINF).perturb):
        with pytest.raises(ValueError, match="targets were given to an untargeted attack; make it with targeted=True"):
            call(network(), images, labels, targets=labels)


def test_attack_is_a_value() -> None:
    assert APGD(LINF) == APGD(LINF, "ce", 100, 1, False, 9, 1, True, 0.75)
    with pytest.raises(dataclasses.FrozenInstanceError):
        APGD(LINF).steps = 3


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (APGD(ThreatModel("linf", "8/255")), "APGD-CE-100 L-inf 8/255"),
        (APGD(ThreatModel("l2", 0.5), "dlr", targeted=True, restarts=5), "T-APGD-DLR-100 x5 L2 0.5"),
        (APGD(ThreatModel("l2", 0.5), None, 10, eot=20), "APGD-10 eot 20 L2 0.5"),
    ],
)
def test_text(attack: APGD, text: str) -> None:
    assert str(attack) == text
