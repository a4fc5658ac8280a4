"""The closed forms of the linear model against attacks, duality, autograd and the theorem that they serve."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional

import robust_peft as rp
from robust_peft.studies.linear_model import (
    LogisticRegression,
    conflict_bound,
    exponent,
    gradients,
    largest_batch_eigenvalue,
    largest_eigenvalues,
    linearised_gradients,
    mixed_derivative,
    worst_images,
)

SHAPE = (1, 3, 4)
PIXELS = math.prod(SHAPE)


def problem(seed, count=6, scale=1.0):
    """A model, images with pixels at the ends of the range among them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(PIXELS, generator=generator, dtype=torch.float64)
    model = LogisticRegression(weight, torch.randn((), generator=generator, dtype=torch.float64))
    images = (torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return model, images, torch.arange(count) % 2


def conflict(clean, adv):
    grads = torch.stack([clean, adv], dim=-2)
    return rp.surgery.conflict(grads @ grads.mT)


seeds = st.integers(0, 10_000)
scales = st.sampled_from([0.05, 0.3, 1.0, 3.0])


def test_loss_is_cross_entropy_of_the_logits():
    model, images, labels = problem(0)
    reference = functional.cross_entropy(model(images), labels, reduction="none")
    torch.testing.assert_close(model.loss(images, labels), reference, rtol=1e-12, atol=0)
    assert (model(images).argmax(1) == (model.score(images) > 0)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("eps", [0.05, 0.3, 0.9])
def test_no_attack_finds_more(norm, box, eps):
    threat = rp.ThreatModel(norm, eps, box)
    model, images, labels = problem(1, count=16)
    worst = worst_images(model, images, labels, threat)
    assert worst.shape == images.shape and threat.contains(worst, images, tolerance=1e-12).all()
    attack = rp.attacks.PGD(threat, steps=100, step_size=eps / 2)
    found = attack(model, images, labels, keys=torch.arange(16))
    analytical, searched = model.loss(worst, labels), model.loss(found, labels)
    assert (analytical >= searched - 1e-12).all()
    if norm == "linf" or box is None:
        # PGD's projection onto ball and box together is exact here, so that it converges to the maximum.
        torch.testing.assert_close(searched, analytical, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.05, 0.3, 0.9])
def test_loss_under_linf_is_equation_16(eps):
    model, images, labels = problem(2)
    worst = worst_images(model, images, labels, rp.ThreatModel("linf", eps, None))
    y = 2 * labels - 1
    reference = torch.log1p(torch.exp(-y * model.score(images) + eps * model.weight.abs().sum()))
    torch.testing.assert_close(model.loss(worst, labels), reference, rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, eps=st.floats(1e-3, 6.0))
def test_l2_in_the_box_has_no_duality_gap(seed, eps):
    """min c^T e over ball and box: no dual value is above the one found, and the best reaches it."""
    model, images, labels = problem(seed)
    worst = worst_images(model, images, labels, rp.ThreatModel("l2", eps))
    slope = (2 * labels - 1)[:, None] * model.weight
    change = (worst - images).flatten(1)
    assert (change.norm(dim=1) <= eps * (1 + 1e-12)).all()
    low, high = -images.flatten(1), 1 - images.flatten(1)
    primal = (slope * change).sum(1)
    multiplier = torch.logspace(-6, 4, 4001, dtype=torch.float64)[:, None, None]
    e = torch.minimum(torch.maximum(-slope / multiplier, low), high)
    dual = (slope * e).sum(2) + multiplier.squeeze(2) / 2 * (e.square().sum(2) - eps**2)
    best = dual.amax(0)
    assert (primal >= best - 1e-9).all()
    torch.testing.assert_close(primal, best, rtol=1e-4, atol=1e-4)


def test_a_zero_weight_changes_nothing():
    images, labels = problem(3)[1:]
    model = LogisticRegression(torch.zeros(PIXELS), torch.tensor(0.3))
    for norm in ("linf", "l2"):
        for box in (None, (0.0, 1.0)):
            assert torch.equal(worst_images(model, images, labels, rp.ThreatModel(norm, 0.2, box)), images)


def test_gradients_are_autograds():
    model, images, labels = problem(4)

    def loss(weight, bias, image, label):
        return functional.softplus(-(2 * label - 1) * (image.flatten() @ weight + bias))

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    weight, bias = per_sample(model.weight.detach(), model.bias.detach(), images, labels)
    reference = torch.cat([weight, bias[:, None]], dim=1)
    torch.testing.assert_close(gradients(model, images, labels), reference, rtol=1e-12, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=scales)
def test_mixed_derivative_is_autograds_and_its_eigenvalues_are_the_closed_form(seed, scale):
    model, images, labels = problem(seed, count=3, scale=scale)

    def gradient(image, label):
        s = torch.sigmoid(-(2 * label - 1) * (image @ model.weight.detach() + model.bias.detach()))
        return -(2 * label - 1) * s * torch.cat([image, image.new_ones(1)])

    reference = torch.func.vmap(torch.func.jacrev(gradient))(images.flatten(1), labels)
    h = mixed_derivative(model, images, labels)
    torch.testing.assert_close(h, reference, rtol=1e-10, atol=1e-14)

    largest = torch.linalg.eigvalsh(h.mT @ h)[:, -1]
    torch.testing.assert_close(largest_eigenvalues(model, images, labels), largest, rtol=1e-9, atol=0)
    together = torch.linalg.eigvalsh((h @ h.mT).mean(0))[-1]
    torch.testing.assert_close(largest_batch_eigenvalue(model, images, labels), together, rtol=1e-9, atol=0)

    change = torch.rand_like(images)
    linearised = gradients(model, images, labels) + (h @ change.flatten(1)[:, :, None]).squeeze(2)
    torch.testing.assert_close(linearised_gradients(model, images, labels, images + change), linearised)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    scale=scales,
    norm=st.sampled_from(["linf", "l2"]),
    box=st.sampled_from([None, (0.0, 1.0)]),
    eps=st.floats(1e-4, 1.0),
)
def test_linearised_conflict_keeps_the_bound(seed, scale, norm, box, eps):
    threat = rp.ThreatModel(norm, eps, box)
    model, images, labels = problem(seed, scale=scale)
    clean = gradients(model, images, labels)
    adv = linearised_gradients(model, images, labels, worst_images(model, images, labels, threat))
    # A bit of room for the rounding of mu itself, which is a difference of products of norms.
    room = 1e-13 * clean.square().sum(1)
    bound = conflict_bound(largest_eigenvalues(model, images, labels), threat, PIXELS)
    assert (conflict(clean, adv).mu <= bound + room).all()
    together = conflict_bound(largest_batch_eigenvalue(model, images, labels), threat, PIXELS)
    assert conflict(clean.mean(0), adv.mean(0)).mu <= together + room.max()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, scale=scales)
def test_conflict_is_quadratic_for_small_budgets(seed, scale):
    """Its exponent is 2, and its coefficient the closed form 1/2 s^2 (d - <sign(w), x>^2 / (||x||^2 + 1)) of L-inf."""
    model, images, labels = problem(seed, scale=scale)
    clean = gradients(model, images, labels)
    budgets = [1e-5, 1e-4]
    linearised, real = [], []
    for eps in budgets:
        worst = worst_images(model, images, labels, rp.ThreatModel("linf", eps, None))
        linearised.append(conflict(clean, linearised_gradients(model, images, labels, worst)).mu)
        real.append(conflict(clean, gradients(model, worst, labels)).mu)
    flat = images.flatten(1)
    s = torch.sigmoid(-(2 * labels - 1) * model.score(images)).detach()
    along = (flat @ model.weight.detach().sign()).square() / (flat.square().sum(1) + 1)
    coefficient = 0.5 * s.square() * (PIXELS - along)
    for found in (linearised, real):
        for index in range(len(images)):
            assert abs(exponent(budgets, [float(mu[index]) for mu in found]) - 2) < 0.1
        torch.testing.assert_close(found[0] / budgets[0] ** 2, coefficient, rtol=2e-2, atol=0)


@pytest.mark.parametrize("power", [0.5, 2.0, 3.7])
def test_exponent_of_a_power_law(power):
    budgets = [0.05, 0.1, 0.3]
    assert exponent(budgets, [3 * eps**power for eps in budgets]) == pytest.approx(power, rel=1e-12)


@pytest.mark.parametrize("budgets, values", [([0.1], [1.0]), ([0.1, 0.2], [1.0, 0.0]), ([0.1, 0.2], [1.0])])
def test_exponent_needs_positive_pairs(budgets, values):
    with pytest.raises(ValueError, match="positive pairs"):
        exponent(budgets, values)
