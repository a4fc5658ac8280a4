"""Change of the parameters scaled to Vanilla(0.5)'s: closed form, an independent reference, identity, resuming."""

import json
import math

import pytest
import torch
from builders import tiny_adapted, tiny_attack, tiny_images, tiny_optim

import robust_peft as rp
from robust_peft.data import train_loader
from robust_peft.training.gradients import GradientPair
from robust_peft.training.optim import make_optimizer, make_schedule
from robust_peft.training.state import RunState
from robust_peft.training.step import EXTRAS
from robust_peft.training.update import Update

CA_AT = rp.surgery.ConflictAware(gamma=0.9)
SGD = {"optimizer": "sgd", "momentum": 0.0}
NESTEROV = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True}


def two_tensors():
    """A matrix, which decays, and a vector, which does not; in float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    return [(name, parameter) for name, parameter in model.named_parameters()]


def gradients(steps):
    """Conflicting pairs of shape `[2, 15]` of changing length, one for each step."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(steps, 2, 15, generator=generator, dtype=torch.float64)
    drawn[:, 1] -= 0.8 * drawn[:, 0]
    return drawn * torch.linspace(0.1, 3.0, steps, dtype=torch.float64)[:, None, None]


class Steps:
    """An update over made-up gradients, and what it did to the parameters at each step."""

    def __init__(self, optim, surgery=CA_AT, *, scope="all", scaler=None, all_reduce=None):
        self.named = two_tensors()
        self.pair = GradientPair(self.named, extras=len(EXTRAS))
        optimizer = make_optimizer(self.named, optim)
        schedule = make_schedule(optimizer, optim, 6)
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.run = RunState()
        self.scale = scaler.get_scale
        self.update = Update(
            self.pair,
            surgery,
            optimizer,
            schedule,
            scaler,
            scope=scope,
            clip_norm=optim.clip_norm,
            match_change=optim.match_change,
            all_reduce=all_reduce,
        )

    def __call__(self, rows):
        self.pair.clear()
        self.pair.rows.copy_(rows * self.scale())
        self.pair.extras.copy_(torch.ones_like(self.pair.extras))
        before = self.pair.flat_parameters()
        record = self.update(self.run)
        self.run.step += 1
        return record, self.pair.flat_parameters() - before


def matched(**options):
    return tiny_optim(**({"match_change": "vanilla", "epochs": 1, "schedule": "cosine"} | options))


def test_under_sgd_every_change_is_as_long_as_vanillas_gradient_times_the_rate():
    steps = Steps(matched(lr=0.3, **SGD))
    for rows in gradients(5):
        record, change = steps(rows)
        vanilla = (rows[0] + rows[1]) / 2
        assert change.norm().item() == pytest.approx(record["lr"] * vanilla.norm().item(), rel=1e-9)
        raw = CA_AT(rows @ rows.T) @ rows
        torch.testing.assert_close(change / change.norm(), -raw / raw.norm())  # the direction is the method's
        assert record["change_scale"] == pytest.approx((vanilla.norm() / raw.norm()).item(), rel=1e-9)


def adamw(parameter, gradient, state, *, lr, decay, step, betas=(0.9, 0.999)):
    """Loshchilov and Hutter 2019, algorithm 2, on one flat vector; `decay` of its shape."""
    state[0] = betas[0] * state[0] + (1 - betas[0]) * gradient
    state[1] = betas[1] * state[1] + (1 - betas[1]) * gradient**2
    mean, square = state[0] / (1 - betas[0] ** step), state[1] / (1 - betas[1] ** step)
    return parameter - lr * decay * parameter - lr * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_under_adamw_against_a_reference(clip):
    steps = Steps(matched(weight_decay=0.1, clip_norm=clip))
    weight = steps.pair.flat_parameters()
    decay = torch.tensor([0.1] * 12 + [0.0] * 3, dtype=torch.float64)
    own, vanillas = [0.0, 0.0], [0.0, 0.0]
    factors = []
    for step, rows in enumerate(gradients(6), start=1):
        directions = [CA_AT(rows @ rows.T) @ rows, rows.mean(dim=0)]
        if clip is not None:
            directions = [d * min(1.0, clip / d.norm().item()) for d in directions]
        lr = 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 6))
        options = {"lr": lr, "decay": decay, "step": step}
        change = adamw(weight, directions[0], own, **options) - weight
        wanted = (adamw(weight, directions[1], vanillas, **options) - weight).norm()
        factors.append((wanted / change.norm()).item())
        weight = weight + change * factors[-1]
        record, _ = steps(rows)
        assert record["change_scale"] == pytest.approx(factors[-1], rel=1e-9)
        torch.testing.assert_close(steps.pair.flat_parameters(), weight, rtol=1e-10, atol=1e-12)
    assert max(abs(factor - 1) for factor in factors) > 0.05


def vanilla_lengths(steps, rows, copies):
    """How far a real optimizer, fed with Vanilla(0.5)'s update, goes from where `steps` stands."""
    for (_, parameter), (_, other) in zip(copies.named, steps.named, strict=True):
        parameter.data.copy_(other)
    return copies(rows)[1].norm().item()


@pytest.mark.parametrize("surgery", [CA_AT, rp.surgery.PCGrad(), rp.surgery.Vanilla(0.9)], ids=str)
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, NESTEROV, {"clip_norm": 0.2}, {"warmup_epochs": 0.5}], ids=str
)
def test_lengths_are_equal_at_every_step(surgery, options):
    steps = Steps(matched(**options), surgery)
    alone = Steps(tiny_optim(epochs=1, schedule="cosine", **options), rp.surgery.Vanilla(0.5))
    for rows in gradients(6):
        wanted = vanilla_lengths(steps, rows, alone)
        assert steps(rows)[1].norm().item() == pytest.approx(wanted, rel=1e-6) and wanted > 0


@pytest.mark.parametrize("scope", ["all", "tensor"])
@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "clip_norm": 0.2}, NESTEROV], ids=str)
def test_vanilla_is_not_changed(scope, options):
    free = Steps(tiny_optim(epochs=1, **options), rp.surgery.Vanilla(0.5), scope=scope)
    bound = Steps(matched(**options | {"schedule": "constant"}), rp.surgery.Vanilla(0.5), scope=scope)
    for rows in gradients(6):
        free(rows)
        assert bound(rows)[0]["change_scale"] == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(bound.pair.flat_parameters(), free.pair.flat_parameters(), rtol=1e-12, atol=0)


def test_changes_of_length_zero():
    opposite = torch.stack([torch.ones(15), -torch.ones(15)]).double()
    to_nothing = Steps(matched(**SGD), rp.surgery.Vanilla(1.0))
    record, change = to_nothing(opposite)  # vanilla's update is zero, the method's is not
    assert record["change_scale"] == 0 and not change.any()
    from_nothing = Steps(matched(**SGD), lambda gramian: torch.zeros(2, dtype=gramian.dtype))
    record, change = from_nothing(gradients(1)[0])  # and the other way round
    assert record["change_scale"] == 1 and not change.any()


def test_a_skipped_step_changes_neither_optimizer():
    whole, skipping = Steps(matched()), Steps(matched())
    first, second = gradients(2)
    for rows in (first, second):
        whole(rows)
    skipping(first)
    before = json.dumps(skipping.run.vanilla_optimizer["state"], default=torch.Tensor.tolist)
    broken = first.clone()
    broken[0, 3] = float("nan")
    record, change = skipping(broken)
    assert math.isnan(record["change_scale"]) and not change.any() and skipping.run.skipped == 1
    assert json.dumps(skipping.run.vanilla_optimizer["state"], default=torch.Tensor.tolist) == before
    assert math.isfinite(skipping(second)[0]["change_scale"])


def test_float16s_loss_scale_has_no_say():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # the first loss tells it that it is in use
    plain, scaled = Steps(matched(clip_norm=0.4)), Steps(matched(clip_norm=0.4), scaler=scaler)
    assert scaled.scale() > 1
    for rows in gradients(4):
        one, other = plain(rows), scaled(rows)
        assert one[0]["change_scale"] == pytest.approx(other[0]["change_scale"], rel=1e-12)
        torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=0)


def test_ranks_agree_and_equal_one_process():
    """Each rank brings gradients of its own; the sum of both is what either goes on with."""
    total = torch.zeros(2 * 15 + len(EXTRAS), dtype=torch.float64)
    ranks = [Steps(matched(), all_reduce=lambda flat: total) for _ in range(2)]
    alone = Steps(matched())
    for rows, part in zip(gradients(4), gradients(8)[4:], strict=True):
        total[:] = 1.0
        total[: 2 * 15] = rows.flatten()
        expected, change = alone(rows)
        for rank, own in zip(ranks, (rows + part, -part), strict=True):
            record, found = rank(own)
            assert torch.equal(found, change) and record["change_scale"] == expected["change_scale"]


def fitted(output=None, *, resume=False, surgery=CA_AT, optim=None, **fit):
    model = tiny_adapted()
    trainer = rp.Trainer(
        model,
        attack=tiny_attack(),
        surgery=surgery,
        optim=optim or tiny_optim(match_change="vanilla", weight_decay=0.1, schedule="cosine"),
        precision="fp32",
        output=output,
        progress=False,
    )
    result = trainer.fit(train_loader(tiny_images(), 8), resume=resume, **fit)
    return result, {name: p.detach().clone() for name, p in trainer.trainable}


def test_resumed_is_the_same_to_the_bit(tmp_path):
    whole, expected = fitted(tmp_path / "whole")
    result, _ = fitted(tmp_path / "pieces", time_limit=0.0)
    state = torch.load(tmp_path / "pieces" / "state" / "last.pt", weights_only=True)
    assert state["run"]["vanilla_optimizer"]["state"]
    while not result.finished:
        result, found = fitted(tmp_path / "pieces", resume=True, time_limit=0.0)
    assert result.steps == whole.steps == 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    scales = [[record["change_scale"] for record in run.history] for run in (whole, result)]
    assert scales[0] == scales[1] and any(abs(scale - 1) > 0.01 for scale in scales[0])


def test_vanilla_trains_as_without_and_nothing_is_logged_when_it_is_off():
    off, expected = fitted(surgery=rp.surgery.Vanilla(0.5), optim=tiny_optim())
    on, found = fitted(surgery=rp.surgery.Vanilla(0.5), optim=tiny_optim(match_change="vanilla"))
    assert all("change_scale" not in record for record in off.history)
    assert [record["change_scale"] for record in on.history] == pytest.approx([1] * 6, abs=1e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_one_backward_pass_has_nothing_to_match():
    trainer = rp.Trainer(
        tiny_adapted(),
        attack=tiny_attack(),
        surgery=rp.surgery.Vanilla(),
        optim=tiny_optim(match_change="vanilla"),
        measure_conflict=False,
        progress=False,
    )
    with pytest.raises(ValueError, match="match_change needs both gradients: measure_conflict=True"):
        trainer.fit(train_loader(tiny_images(), 8))
