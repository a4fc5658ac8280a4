"""The pair of gradients against autograd by hand, and the combined update against Algorithm 1 on vectors."""

import pytest
import torch
from builders import tiny_adapted, tiny_attack, tiny_images
from torch import nn
from torch.nn import functional

import robust_peft as rp
from robust_peft import keyed_random
from robust_peft.losses import make_loss
from robust_peft.training.gradients import GradientPair
from robust_peft.training.step import EXTRAS, Batch, add_gradients


def trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def make_batch(count=6, dtype=torch.float64):
    images = tiny_images(count)
    keys = keyed_random.sample_keys(0, 0, torch.arange(count))
    return Batch(images.images.to(dtype) / 255, images.labels, keys)


def by_hand(model, loss_name, batch, adv_images):
    """Both mean gradients by plain autograd on one graph."""
    parameters = [p for _, p in trainable(model)]
    clean_logits, adv_logits = model(batch.images), model(adv_images)
    clean = functional.cross_entropy(clean_logits, batch.labels)
    if loss_name == "ce":
        adv = functional.cross_entropy(adv_logits, batch.labels)
    else:
        p, q = clean_logits.softmax(1), adv_logits.softmax(1)
        adv = (p * (p.log() - q.log())).sum(1).mean()
    flat = []
    for value in (clean, adv):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
            )
        )
    return torch.stack(flat)


@pytest.mark.parametrize("loss_name", ["ce", "trades"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_pair_is_the_mean_gradient_of_both_losses(loss_name, pieces):
    model = tiny_adapted().double().train()
    batch = make_batch()
    attack = tiny_attack()
    loss = make_loss(loss_name)
    pair = GradientPair(trainable(model), extras=len(EXTRAS))
    for part in range(pieces):
        cut = slice(part * 6 // pieces, (part + 1) * 6 // pieces)
        micro = Batch(batch.images[cut], batch.labels[cut], batch.keys[cut])
        add_gradients(pair, micro, model=model, attack=attack, loss=loss)
    adv_images = attack.perturb(
        model, batch.images, batch.labels, keys=keyed_random.derive(batch.keys, 2), objective=loss.inner_objective
    )
    expected = by_hand(model, loss_name, batch, adv_images)
    assert pair.extras[0] == 6
    torch.testing.assert_close(pair.rows / 6, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(pair.gramian() / 36, expected @ expected.T, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_one_weighted_backward_equals_vanilla_through_the_pair(lam):
    model = tiny_adapted().double().train()
    batch, attack, loss = make_batch(), tiny_attack(), make_loss("ce")
    both = GradientPair(trainable(model), extras=len(EXTRAS))
    add_gradients(both, batch, model=model, attack=attack, loss=loss)
    one = GradientPair(trainable(model), rows=1, extras=len(EXTRAS))
    add_gradients(one, batch, model=model, attack=attack, loss=loss, loss_weights=(1 - lam, lam))
    update = both.combine(rp.surgery.Vanilla(lam=lam)(both.gramian()))
    torch.testing.assert_close(one.rows[0], update, rtol=1e-10, atol=1e-13)


def test_frozen_parameters_have_no_place_in_the_buffer():
    model = tiny_adapted()
    pair = GradientPair(trainable(model))
    assert pair.rows.shape[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert pair.rows.shape[1] < sum(p.numel() for p in model.parameters())


def test_write_puts_each_slice_where_it_belongs():
    model = tiny_adapted()
    named = trainable(model)
    pair = GradientPair(named)
    pair.update.copy_(torch.arange(pair.update.numel()))
    pair.write()
    start = 0
    for _, parameter in named:
        expected = torch.arange(start, start + parameter.numel(), dtype=torch.float32).view_as(parameter)
        assert torch.equal(parameter.grad, expected)
        start += parameter.numel()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def convolutions():
    """Two layers and a head; kernels of 3 x 3 and of 1 x 1, of which the latter's memory order is ambiguous."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(54, 3)).double()


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last_weights_are_stepped_by_their_own_gradients(fused):
    """As weights in the usual order; a fused optimizer takes gradients as they lie in memory."""
    images, labels = torch.rand(5, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 3
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = convolutions().to(memory_format=layout)
        pair = GradientPair(trainable(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=fused)
        for _ in range(2):
            pair.clear()
            for row, seen in enumerate((images, 1 - images)):
                pair.add(row, functional.cross_entropy(model(seen), labels, reduction="sum"))
            update = pair.combine(rp.surgery.ConflictAware(gamma=0.8)(pair.gramian("tensor"))).clone()
            before = pair.flat_parameters()
            pair.write()
            assert all(p.grad.stride() == p.stride() for p in model.parameters())
            optimizer.step()
            change = pair.flat_parameters() - before
        found.append((list(model.parameters()), pair.gramian(), update.sort().values, change.sort().values))
    assert not found[1][0][0].is_contiguous()  # so that it is a test
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_weights_with_gaps_in_memory_are_written_to_as_well():
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4)[:, ::2])
    pair = GradientPair([("gaps", parameter)], rows=1)
    pair.add(0, (parameter * torch.arange(6.0).view(3, 2)).sum())
    pair.update.copy_(pair.rows[0])
    pair.write()
    assert torch.equal(parameter.grad, torch.arange(6.0).view(3, 2))
    assert torch.equal(pair.flat_parameters(), parameter.detach().flatten())


def test_step_is_algorithm_1_on_the_flattened_vectors():
    model = tiny_adapted().double().train()
    pair = GradientPair(trainable(model), extras=len(EXTRAS))
    add_gradients(pair, make_batch(), model=model, attack=tiny_attack(), loss=make_loss("ce"))
    clean, adv = pair.rows
    gamma, cos = 0.99, (clean @ adv) / (clean.norm() * adv.norm())
    assert cos < gamma  # else the test would see the other branch
    sine, root = (1 - cos**2).sqrt(), (1 - gamma**2) ** 0.5
    expected = adv + adv.norm() * (gamma * sine - cos * root) / (clean.norm() * root) * clean
    update = pair.combine(rp.surgery.ConflictAware(gamma=gamma)(pair.gramian()))
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-13)


def test_tensor_scope_applies_the_rule_to_each_tensor():
    model = tiny_adapted().double().train()
    named = trainable(model)
    pair = GradientPair(named, extras=len(EXTRAS))
    add_gradients(pair, make_batch(), model=model, attack=tiny_attack(), loss=make_loss("ce"))
    surgery = rp.surgery.ConflictAware(gamma=0.9)
    update = pair.combine(surgery(pair.gramian("tensor")))
    checked = 0
    sizes = [p.numel() for _, p in named]
    for part, rows in zip(update.split(sizes), pair.rows.split(sizes, dim=1), strict=True):
        torch.testing.assert_close(part, surgery(rows @ rows.T) @ rows, rtol=1e-9, atol=1e-13)
        checked += 1
    assert checked == len(named) > 1


def test_angle_on_adapters_alone_leaves_the_head_out():
    model = tiny_adapted().double().train()
    named = trainable(model)
    pair = GradientPair(named, measured=lambda name: "modules_to_save" not in name, extras=len(EXTRAS))
    add_gradients(pair, make_batch(), model=model, attack=tiny_attack(), loss=make_loss("ce"))
    kept = torch.cat([torch.full((p.numel(),), "modules_to_save" not in name) for name, p in named])
    assert 0 < kept.sum() < len(kept)
    rows = pair.rows[:, kept]
    torch.testing.assert_close(pair.gramian(), rows @ rows.T, rtol=1e-9, atol=1e-13)
    # One pair of weights for all, the head included.
    assert pair.combine(rp.surgery.Vanilla()(pair.gramian())).shape == (len(kept),)


def test_nothing_trainable_and_no_adapters_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientPair([])
    named = trainable(tiny_adapted(method="linear"))
    with pytest.raises(ValueError, match="needs trainable adapter parameters"):
        GradientPair(named, measured=lambda name: "modules_to_save" not in name)
