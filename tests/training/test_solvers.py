"""Inner solvers: each of them, under both norms, as a training step uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import tiny_images, tiny_optim
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import robust_peft as rp
from robust_peft import keyed_random
from robust_peft.attacks import APGD, PGD, SOLVERS, make_solver
from robust_peft.attacks.victim import Counted
from robust_peft.data import train_loader
from robust_peft.losses import make_loss
from robust_peft.objectives import get_objective
from robust_peft.threat import ThreatModel
from robust_peft.training.gradients import GradientPair
from robust_peft.training.step import EXTRAS, Batch, add_gradients

CLASSES = 5
THREATS = {"linf": ThreatModel("linf", "16/255"), "l2": ThreatModel("l2", 0.6)}
OBJECTIVE_OF = {"pgd-dlr": "dlr", "apgd-dlr": "dlr", "t-apgd-dlr": "dlr"}
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_norm = pytest.mark.parametrize("norm", THREATS)


def network(bn: str = "running", classes: int = CLASSES) -> nn.Module:
    """A small network in train mode, with what behaves otherwise there; float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6, track_running_stats=bn == "running"),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(96, classes),
    ).double()
    if bn == "running":
        model(some_images()[0])  # statistics of its own, not 0 and 1
    return model


def some_images(count: int = 8, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Images of 8 x 8 pixels, labels and keys."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, torch.arange(count) % classes, keyed_random.sample_keys(0, 0, torch.arange(count))


def solver_for(name: str, norm: str, **options: Any) -> PGD | APGD:
    if name == "fgsm":
        options.pop("steps", None)
    elif "steps" not in options:
        options["steps"] = 4
    return make_solver(name, THREATS[norm], **options)


def objective_values(name: str, model: nn.Module, pixels: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """What the solver maximises, in eval mode; for the targeted one towards the likeliest wrong class."""
    model.eval()
    with torch.no_grad():
        clean_logits, logits = model(images), model(pixels)
    model.train()
    targets = None
    if name.startswith("t-"):
        targets = clean_logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    return get_objective(OBJECTIVE_OF.get(name, "ce"))(logits, labels, clean_logits=clean_logits, targets=targets)


# What comes back


@each_norm
@each_solver
def test_objective_rises_inside_ball_and_box(name: str, norm: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    solver, threat = solver_for(name, norm), THREATS[norm]
    found = solver.perturb(model, images, labels, keys=keys)
    assert found.shape == images.shape and found.dtype == images.dtype and not found.requires_grad
    assert threat.contains(found, images, tolerance=1e-12).all() and not torch.equal(found, images)
    reached = objective_values(name, model, found, images, labels)
    starts = {"clean": images}
    if name != "fgsm":
        numbers = (0, 0) if "apgd" in name else (0,)
        starts["random"] = threat.random_start(images, keyed_random.derive(keys, *numbers))
    for kind, start in starts.items():
        from_there = objective_values(name, model, start, images, labels)
        assert reached.mean() > from_there.mean() + 0.01, kind
        # One run of APGD keeps its best, so that nobody ends below the start.
        assert kind == "clean" or "apgd" not in name or (reached >= from_there).all()


@pytest.mark.parametrize("eps", ["12/255", "16/255"])
def test_larger_budgets_are_used(eps: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    for name in SOLVERS:
        found = make_solver(name, ThreatModel("linf", eps)).perturb(model, images, labels, keys=keys)
        far = ThreatModel("linf", eps).eps
        assert (found - images).abs().flatten(1).amax(dim=1).sub(far).abs().max() < 1e-12, name


class Singly(nn.Module):
    """One image at a time, so that not even rounding depends on who else is in the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.inner(image) for image in images.split(1)])


@each_norm
@each_solver
def test_draws_belong_to_the_sample_not_to_the_batch(name: str, norm: str) -> None:
    model, (images, labels, keys) = Singly(network()), some_images()
    solver = solver_for(name, norm, **({"random_start": True} if name == "fgsm" else {"restarts": 2}))
    whole = solver.perturb(model, images, labels, keys=keys)
    for part in torch.tensor([6, 1, 3, 0, 5, 2, 7, 4]).split([3, 5]):
        assert torch.equal(solver.perturb(model, images[part], labels[part], keys=keys[part]), whole[part])
    others = keyed_random.sample_keys(0, 1, torch.arange(8))
    assert not torch.equal(solver.perturb(model, images, labels, keys=others), whole)


class Dipping(nn.Module):
    """Three logits of one pixel x: the cross-entropy of class 0 rises with x, but the model is wrong only below 2/3."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return torch.cat([0 * x, 0.1 - 0.15 * x, -2 + 1.95 * x], dim=1)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_highest_objective_comes_before_a_fooled_model(name: str) -> None:
    threat, images = ThreatModel("linf", 1.0), torch.zeros(32, 1, 1, 1, dtype=torch.float64)
    labels, keys = torch.zeros(32, dtype=torch.int64), keyed_random.sample_keys(0, 0, torch.arange(32))
    options: dict[str, Any] = {"steps": 1, "step_size": 0.1, "restarts": 4} if name == "pgd" else {"steps": 4}
    solver = make_solver(name, threat, **options)
    assert not solver.fooling_first
    highest = solver.perturb(Dipping(), images, labels, keys=keys).flatten()
    if name == "pgd":
        starts = [threat.random_start(images, keyed_random.derive(keys, restart)).flatten() for restart in range(4)]
        assert_close(highest, (torch.stack(starts).amax(dim=0) + 0.1).clamp(max=1))
        careful: Any = PGD(threat, **options)
    else:
        assert (highest == 1).all()
        careful = APGD(threat, "ce", steps=4, early_stop=False)
    fooling = careful.perturb(Dipping(), images, labels, keys=keys).flatten()
    assert (highest > 2 / 3).any() and (fooling < 2 / 3).sum() > 5
    assert (fooling <= highest).all() and not torch.equal(fooling, highest)


@pytest.mark.parametrize("restarts", [1, 2])
@each_solver
def test_passes_are_as_documented(name: str, restarts: int) -> None:
    """Nobody leaves early, not even those that are wrong from the start."""
    model, (images, labels, keys) = Counted(network()), some_images(20)
    with torch.no_grad():
        assert (model.model.eval()(images).argmax(dim=1) != labels).any()
    if name == "fgsm":
        solver, forwards, backwards = solver_for(name, "linf"), 1, 1
    else:
        solver = solver_for(name, "linf", restarts=restarts)
        forwards = 5 if "apgd" in name or restarts > 1 else 4  # a look at the last image
        forwards, backwards = restarts * forwards + name.startswith("t-"), restarts * 4
    solver.perturb(model, images, labels, keys=keys)
    assert (model.forwards, model.backwards) == (20 * forwards, 20 * backwards)


def test_several_targets_cost_and_find_more() -> None:
    model, (images, labels, keys) = Counted(network()), some_images(20)
    margins = []
    for num_targets in (1, 3):
        model.forwards = 0
        found = solver_for("t-apgd-dlr", "l2", num_targets=num_targets).perturb(model, images, labels, keys=keys)
        assert model.forwards == 20 * (5 * num_targets + 1)
        with torch.no_grad():
            margins.append(get_objective("margin")(model.eval()(found), labels))
        model.train()
    assert margins[1].mean() > margins[0].mean()


class Waiting(TorchDispatchMode):
    """Counts the operations at which a program on a GPU would have to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@each_norm
@each_solver
def test_nothing_waits_for_the_device(name: str, norm: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    solver = solver_for(name, norm)
    with Waiting() as mode:
        solver.perturb(model, images, labels, keys=keys)
    assert mode.waits == []
    with Waiting() as mode:
        APGD(THREATS[norm], steps=2).perturb(model, images, labels, keys=keys)
    assert mode.waits  # an early stop has to ask


@each_norm
@each_solver
def test_channels_last_images_stay_so(name: str, norm: str) -> None:
    """Every pass sees them in the layout in which a GPU's convolutions are fast."""
    model, (images, labels, keys) = network(), some_images()
    seen: list[bool] = []
    expected = solver_for(name, norm).perturb(model, images, labels, keys=keys)
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    images = images.contiguous(memory_format=torch.channels_last)
    found = solver_for(name, norm).perturb(model, images, labels, keys=keys)
    assert seen and all(seen) and found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, expected, rtol=0, atol=1e-9)


# The loss's objective, and too few classes


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_objective_is_the_losss_own_where_none_is_named(name: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    found = {}
    for objective in ("ce", "kl"):
        found[objective] = solver_for(name, "l2").perturb(model, images, labels, keys=keys, objective=objective)
        named = solver_for(name, "l2", objective=objective)
        for asked in ("ce", "kl"):
            assert torch.equal(named.perturb(model, images, labels, keys=keys, objective=asked), found[objective])
    kl = get_objective("kl")
    with torch.no_grad():
        clean_logits, *logits = (model.eval()(pixels) for pixels in (images, found["kl"], found["ce"]))
    assert (
        kl(logits[0], labels, clean_logits=clean_logits).mean()
        > kl(logits[1], labels, clean_logits=clean_logits).mean()
    )
    assert torch.equal(solver_for(name, "l2").perturb(model.train(), images, labels, keys=keys), found["ce"])


@pytest.mark.parametrize("name", ["pgd-dlr", "apgd-dlr", "t-apgd-dlr"])
def test_solvers_of_the_dlr_keep_it_whatever_the_loss(name: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    found = solver_for(name, "l2").perturb(model, images, labels, keys=keys)
    assert torch.equal(solver_for(name, "l2").perturb(model, images, labels, keys=keys, objective="kl"), found)


@pytest.mark.parametrize(("name", "least"), [("pgd-dlr", 3), ("apgd-dlr", 3), ("t-apgd-dlr", 4)])
def test_margin_stands_in_where_the_dlr_is_undefined(name: str, least: int) -> None:
    for classes in (least - 1, least):
        model, (images, labels, keys) = network(classes=classes), some_images(classes=classes)
        solver = solver_for(name, "l2")
        margin = rp.attacks.PGD(THREATS["l2"], 4, objective="margin")
        if isinstance(solver, APGD):
            margin = APGD(
                THREATS["l2"],
                "margin",
                steps=4,
                targeted=solver.targeted,
                num_targets=solver.num_targets if solver.targeted else 9,
                early_stop=False,
                fooling_first=False,
            )
        same = torch.equal(*(each.perturb(model, images, labels, keys=keys) for each in (solver, margin)))
        assert same == (classes < least)


# The model, during and after


@pytest.mark.parametrize("bn", ["running", "batch"])
@each_solver
def test_model_is_attacked_in_eval_mode_and_left_as_it_was(name: str, bn: str) -> None:
    model, (images, labels, keys) = network(bn), some_images()
    model[1].eval()
    model[0].bias.requires_grad_(False)

    def state() -> Any:
        modes = [module.training for module in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]

    before, buffers = state(), {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[tuple[bool, bool]] = []
    fail_at = {0}

    def look(module: nn.Module, args: Any) -> None:
        seen.append((any(m.training for m in model.modules()), any(p.requires_grad for p in model.parameters())))
        if len(seen) in fail_at:
            raise KeyError("mid-attack")

    handle = model.register_forward_pre_hook(look)
    solver = solver_for(name, "linf", steps=2)
    solver.perturb(model, images, labels, keys=keys)
    assert seen and set(seen) == {(False, False)} and state() == before
    for forward in range(1, len(seen) + 1):
        seen.clear()
        fail_at = {forward}
        with pytest.raises(KeyError, match="mid-attack"):
            solver.perturb(model, images, labels, keys=keys)
        assert state() == before
    handle.remove()
    assert_close(dict(model.state_dict()), buffers, rtol=0, atol=0)


@each_solver
def test_running_statistics_move_with_the_two_passes_of_a_step_alone(name: str) -> None:
    model, (images, labels, keys) = network(), some_images()
    norm = model[1]
    norm.reset_running_stats()
    before = norm.running_mean.clone()
    solver_for(name, "linf").perturb(model, images, labels, keys=keys)
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, before)
    pair = GradientPair(list(model.named_parameters()), extras=len(EXTRAS))
    add_gradients(pair, Batch(images, labels, keys), model=model, attack=solver_for(name, "linf"), loss=make_loss("ce"))
    assert norm.num_batches_tracked == 2 and not torch.equal(norm.running_mean, before)


@each_solver
def test_statistics_of_the_batch_under_attack_too(name: str) -> None:
    """With bn="batch" an image's perturbation depends on who else is in the batch; with "running" it does not."""
    images, labels, keys = some_images()
    for bn in ("running", "batch"):
        model, solver = network(bn), solver_for(name, "l2")
        first = solver.perturb(model, images[:4], labels[:4], keys=keys[:4])
        whole = solver.perturb(model, images, labels, keys=keys)[:4]
        assert ((first - whole).abs().max() < 1e-9) == (bn == "running")


@each_norm
@each_solver
def test_two_steps_of_training(name: str, norm: str) -> None:
    """In bfloat16 as a GPU would; the attack raises the loss that is then minimised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = rp.Trainer(
        model, attack=solver_for(name, norm), optim=tiny_optim(epochs=1), precision="bf16", progress=False
    )
    result = trainer.fit(train_loader(tiny_images(24), 12))
    steps = [record for record in result.history if record["kind"] == "train"]
    assert len(steps) == 2 and all(step["adv_loss"] > step["clean_loss"] for step in steps)
    assert all(not torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))


# Names and parameters


def test_each_name_is_its_attack() -> None:
    threat = THREATS["l2"]
    assert make_solver("pgd", threat) == PGD(threat, 10, fooling_first=False)
    assert make_solver("pgd", threat, steps=7, step_size="2/255", restarts=2, objective="kl") == PGD(
        threat, 7, "2/255", "kl", 2, fooling_first=False
    )
    assert make_solver("pgd", threat, random_start=False) == PGD(threat, random_start=False, fooling_first=False)
    assert make_solver("fgsm", threat) == rp.attacks.FGSM(threat)
    assert make_solver("fgsm", threat, random_start=True, step_size=0.1) == PGD(threat, 1, 0.1)
    assert make_solver("pgd-dlr", threat, steps=3) == PGD(threat, 3, objective="dlr", fooling_first=False)
    training: dict[str, Any] = {"early_stop": False, "fooling_first": False}
    assert make_solver("apgd", threat) == make_solver("autopgd", threat) == APGD(threat, None, 10, **training)
    assert make_solver("apgd", threat, objective="kl", restarts=2) == APGD(threat, "kl", 10, 2, **training)
    assert make_solver("autopgd-dlr", threat, steps=5) == APGD(threat, "dlr", 5, **training)
    targeted = APGD(threat, "dlr", 10, targeted=True, num_targets=1, **training)
    assert make_solver("t-apgd-dlr", threat) == make_solver("t-autopgd-dlr", threat) == targeted
    assert make_solver("t-apgd-dlr", threat, num_targets=9).num_targets == 9


GIVEN: dict[str, Any] = {
    "steps": 3,
    "step_size": 0.01,
    "restarts": 2,
    "random_start": True,
    "objective": "margin",
    "num_targets": 2,
}


@pytest.mark.parametrize("parameter", GIVEN)
@each_solver
def test_every_parameter_arrives_or_is_refused(name: str, parameter: str) -> None:
    given = {parameter: GIVEN[parameter]}
    if parameter in SOLVERS[name]:
        assert getattr(make_solver(name, THREATS["l2"], **given), parameter) == GIVEN[parameter]
    else:
        with pytest.raises(ValueError, match=f"solver {name} has no {parameter}; it has .*{SOLVERS[name][-1]}"):
            make_solver(name, THREATS["l2"], **given)


@pytest.mark.parametrize("name", ["", "PGD", "square", "apgd-ce", None])
def test_unknown_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError) as error:
        make_solver(name, THREATS["l2"])
    assert f"Found solver = {name!r}" in str(error.value) and all(known in str(error.value) for known in SOLVERS)


def test_highest_objective_is_for_attacks_that_go_on() -> None:
    with pytest.raises(ValueError, match="fooling_first=False needs early_stop=False"):
        APGD(THREATS["l2"], fooling_first=False)
    with pytest.raises(ValueError, match="Found fooling_first = 'no'"):
        APGD(THREATS["l2"], fooling_first="no")
