"""Each loss inside a training step: the pair of gradients by hand, the order of the passes, and whole trainings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import tiny_attack, tiny_images, tiny_optim
from torch import Tensor, nn

import robust_peft as rp
from robust_peft import keyed_random
from robust_peft.data import train_loader
from robust_peft.losses import CrossEntropy, LogitPairing, Loss, Mart, Trades
from robust_peft.models.resnet import cifar_resnet
from robust_peft.training.gradients import GradientPair
from robust_peft.training.step import ATTACK, EXTRAS, Batch, add_gradients

LOSSES: dict[str, Loss] = {
    "ce": CrossEntropy(),
    "trades": Trades(),
    "clp": LogitPairing(),
    "clp probabilities": LogitPairing(pairing="probabilities"),
    "mart": Mart(beta=6),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def network(bn: str | None = None) -> nn.Module:
    """Convolution, BatchNorm (or none), head; float64, in train mode."""
    torch.manual_seed(0)
    norm = nn.Identity() if bn is None else nn.BatchNorm2d(5, track_running_stats=bn == "running")
    return nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), norm, nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)).double()


def make_batch() -> Batch:
    images = tiny_images(6)
    keys = keyed_random.sample_keys(0, 0, torch.arange(6))
    return Batch(images.images.double() / 255, images.labels, keys)


def pair_of(model: nn.Module, name: str, batch: Batch, **options: Any) -> GradientPair:
    pair = GradientPair(list(model.named_parameters()), extras=len(EXTRAS), rows=1 if "loss_weights" in options else 2)
    add_gradients(pair, batch, model=model, attack=tiny_attack(), loss=LOSSES[name], **options)
    return pair


def losses_by_hand(name: str, clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
    """Both sums over the batch, in probabilities."""
    p, q, rows = clean_logits.softmax(dim=1), adv_logits.softmax(dim=1), torch.arange(len(labels))
    divergence = (p * (p / q).log()).sum(dim=1)
    others = torch.stack([torch.cat([row[:label], row[label + 1 :]]) for row, label in zip(q, labels, strict=True)])
    adv = {
        "ce": -q[rows, labels].log(),
        "trades": divergence,
        "clp": ((clean_logits - adv_logits) ** 2).sum(dim=1) / 3,
        "clp probabilities": ((p - q) ** 2).sum(dim=1) ** 0.5,
        "mart": -q[rows, labels].log() - (1 - others.amax(dim=1)).log() + 6 * divergence * (1 - p[rows, labels]),
    }[name]
    return torch.stack([-p[rows, labels].log().sum(), adv.sum()])


@pytest.mark.parametrize("bn", [None, "running", "batch"])
@each_loss
def test_pair_is_the_gradient_of_both_losses_by_hand(name: str, bn: str | None) -> None:
    model, batch = network(bn), make_batch()
    if bn == "running":
        model(batch.images)  # so that the attack's eval mode has statistics of its own
    reference = network(bn)
    reference.load_state_dict(model.state_dict())
    pair = pair_of(model, name, batch)
    keys = keyed_random.derive(batch.keys, ATTACK)
    attack: Any = tiny_attack(objective="kl" if name == "trades" else "ce")
    adv_images = attack.perturb(reference, batch.images, batch.labels, keys=keys)
    both = losses_by_hand(name, reference(batch.images), reference(adv_images), batch.labels)
    parameters = list(reference.parameters())
    for row, value in zip(pair.rows, both, strict=True):
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        torch.testing.assert_close(row, torch.cat([grad.flatten() for grad in grads]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pair.extras[1:3], both.detach(), rtol=1e-12, atol=0)


@each_loss
def test_pieces_of_a_batch_add_up(name: str) -> None:
    model, batch = network(), make_batch()
    whole, parts = pair_of(model, name, batch), GradientPair(list(model.named_parameters()), extras=len(EXTRAS))
    for cut in (slice(0, 2), slice(2, 6)):
        micro = Batch(batch.images[cut], batch.labels[cut], batch.keys[cut])
        add_gradients(parts, micro, model=model, attack=tiny_attack(), loss=LOSSES[name])
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@each_loss
def test_one_weighted_loss_equals_the_weighted_pair(name: str, lam: float) -> None:
    model, batch = network(), make_batch()
    both = pair_of(model, name, batch).rows
    one = pair_of(model, name, batch, loss_weights=(1 - lam, lam)).rows[0]
    torch.testing.assert_close(one, (1 - lam) * both[0] + lam * both[1], rtol=1e-10, atol=1e-12)


@each_loss
def test_graphs_are_alive_together_only_where_the_loss_needs_both(name: str) -> None:
    model, batch, events = network(), make_batch(), []

    def watch(module: nn.Module, args: Any, logits: Tensor) -> None:
        if module.training:  # not the attack's passes
            events.append("forward")
            logits.register_hook(lambda grad: events.append("backward"))

    model.register_forward_hook(watch)
    pair_of(model, name, batch)
    if LOSSES[name].needs_clean_logits:
        # The clean loss back through the clean graph; the adversarial one back through both.
        assert events == ["forward", "forward", "backward", "backward", "backward"]
    else:
        assert events == ["forward", "backward", "forward", "backward"]


@each_loss
def test_images_that_the_attack_cannot_move_give_finite_gradients(name: str) -> None:
    """With a budget of nothing both images are equal, where a norm has no derivative."""
    model, batch = network(), make_batch()
    pair = GradientPair(list(model.named_parameters()), extras=len(EXTRAS))
    attack = rp.attacks.PGD(rp.ThreatModel("linf", 0.0), steps=1)
    add_gradients(pair, batch, model=model, attack=attack, loss=LOSSES[name])
    assert pair.rows.isfinite().all() and pair.rows[0].any()
    assert pair.rows[1].any() == (name in ("ce", "mart"))


@pytest.mark.parametrize("bn", ["running", "batch"])
@each_loss
def test_a_narrow_resnet_learns(name: str, bn: str) -> None:
    """The clean loss falls, in bfloat16 and channels_last; and the same run twice is the same run."""
    histories = []
    for _ in range(2 if bn == "batch" else 1):
        torch.manual_seed(0)
        model = cifar_resnet(18, 3, bn=bn, width=4).to(memory_format=torch.channels_last)
        trainer = rp.Trainer(
            model,
            attack=rp.attacks.make_solver("pgd", rp.ThreatModel("linf", "4/255"), steps=1),
            loss=LOSSES[name],
            surgery=rp.surgery.Vanilla(0.5),
            optim=tiny_optim(epochs=3),
            precision="bf16",
            progress=False,
        )
        result = trainer.fit(train_loader(tiny_images(24), 12))
        histories.append([record for record in result.history if record["kind"] == "train"])
    steps = histories[0]
    assert len(steps) == 6 and all(step["skipped"] == 0 for step in steps)
    assert steps[-1]["clean_loss"] < min(steps[0]["clean_loss"], math.log(3))  # better than a guess
    for key in ("clean_loss", "adv_loss", "cos", "update_norm"):
        assert len({tuple(step[key] for step in history) for history in histories}) == 1, key
