"""Ball, box, start, step and projection: laws over random inputs, closed forms, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from robust_peft.keyed_random import sample_keys
from robust_peft.threat import ThreatModel

NORMS = ["linf", "l2"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(1,), (5,), (3, 4, 4), (1, 2, 3, 2)]

properties = settings(deadline=None, derandomize=True, max_examples=60)


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


def lengths(difference: Tensor, norm: str) -> Tensor:
    flat = difference.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A threat model, images in its box, and points anywhere."""

    threat: ThreatModel
    images: Tensor
    points: Tensor
    keys: Tensor


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.sampled_from([1, 2, 5])), *draw(st.sampled_from(SHAPES)))
    dtype = draw(st.sampled_from(dtypes))
    eps = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-6, 2 / 255, 8 / 255, 0.5, 1.0])))
    box = draw(st.sampled_from([(0.0, 1.0), None]))
    images = torch.rand(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        images = images.round()  # at the faces of the box
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0])) * draw(st.sampled_from([eps, 1.0]))
    points = images + torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    threat = ThreatModel(draw(st.sampled_from(NORMS)), eps, box)
    keys = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)
    return Case(threat, images.to(dtype), points.to(dtype), keys)


# What is accepted and what is refused


@pytest.mark.parametrize(
    ("eps", "value"),
    [
        ("8/255", 8 / 255),
        ("8 / 255", 8 / 255),
        ("0.03", 0.03),
        (0.03, 0.03),
        (0, 0.0),
        ("0", 0.0),
        (1, 1.0),
        ("1e-3", 1e-3),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_eps_is_a_number_or_a_fraction(norm: str, eps: Any, value: float) -> None:
    threat = ThreatModel(norm, eps)
    assert threat.eps == value and isinstance(threat.eps, float)
    assert threat == ThreatModel(norm, value) and hash(threat) == hash(ThreatModel(norm, value))
    assert threat.box == (0.0, 1.0)


NO_NUMBER = ["8/0", "abc", "", "8/255/2", "nan", "inf", "1e999", True, False, None, [8], "8,0"]
NO_BUDGET = [-0.1, "-8/255", math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [*NO_NUMBER, *NO_BUDGET], ids=repr)
def test_eps_that_is_none_is_refused(norm: str, eps: Any) -> None:
    with pytest.raises(ValueError) as error:
        ThreatModel(norm, eps)
    message = str(error.value)
    assert f"Found eps = {eps!r}" in message and "\n" not in message
    assert ("number or a fraction" if eps in NO_NUMBER and eps == eps else "non-negative and finite") in message


@pytest.mark.parametrize("eps", [8, 8.0, "8"])
def test_eps_in_0_to_255_units_is_refused_with_the_fraction_to_write(eps: Any) -> None:
    with pytest.raises(ValueError, match=r'did you mean "8/255"\?'):
        ThreatModel("linf", eps)
    # Without a box, or in another box, it may be meant; under L2 it is no contradiction.
    assert ThreatModel("linf", eps, box=None).eps == 8
    assert ThreatModel("linf", eps, box=(0, 255)).eps == 8
    assert ThreatModel("l2", eps).eps == 8


@pytest.mark.parametrize("norm", ["l1", "Linf", "", None, 2])
def test_unknown_norm_is_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match="norm should be one of linf, l2. Found norm = "):
        ThreatModel(norm, 0.1)


@pytest.mark.parametrize("box", [(1, 0), (0, 0), (0, 1, 2), (0,), (), (math.nan, 1), 5, ("a", "b")], ids=repr)
def test_box_that_is_none_is_refused(box: Any) -> None:
    with pytest.raises(ValueError, match="box should be .* Found box = "):
        ThreatModel("linf", 0.1, box=box)


def test_threat_model_is_a_value() -> None:
    threat = ThreatModel("linf", "8/255")
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 0.1
    assert pickle.loads(pickle.dumps(threat)) == threat
    assert threat != ThreatModel("l2", "8/255") and threat != ThreatModel("linf", "8/255", box=None)


@pytest.mark.parametrize(
    ("norm", "eps", "text"), [("linf", "8/255", "L-inf 8/255"), ("linf", 0.03, "L-inf 0.03"), ("l2", 0.5, "L2 0.5")]
)
def test_text(norm: str, eps: Any, text: str) -> None:
    assert str(ThreatModel(norm, eps)) == text


# The random start


def largest_gap(values: Tensor, distribution: Tensor) -> float:
    """Kolmogorov-Smirnov statistic: ``distribution`` is the expected share of values up to each sorted value."""
    count = len(values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return max((steps[1:] - distribution).max().item(), (distribution - steps[:-1]).max().item())


# 1 - 1e-6 quantile of the Kolmogorov distribution, sqrt(ln(2e6) / 2).
KOLMOGOROV = 2.69


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (2, 1, 3)])
def test_l2_start_is_uniform_in_the_ball(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    count, eps, dimension = 8000, 0.7, math.prod(shape)
    centre = torch.full((count, *shape), 0.3, dtype=dtype)
    start = ThreatModel("l2", eps, box=None).random_start(centre, keys_of(count))
    difference = (start.double() - centre.double()).flatten(1) / eps
    radii = difference.norm(dim=1).sort().values
    # P(r <= t) = t^d. The rounding of float32 moves radii by 1e-7, nothing beside the statistic's 0.03.
    assert largest_gap(radii, radii.clamp(max=1) ** dimension) < KOLMOGOROV / math.sqrt(count)
    unit = difference / difference.norm(dim=1, keepdim=True)
    # Directions: mean zero and covariance 1/d; entries lie in [-1, 1], so 5/sqrt(n) is at least five standard errors.
    assert unit.mean(dim=0).abs().max() < 5 / math.sqrt(count)
    covariance = unit.T @ unit / count
    assert (covariance - torch.eye(dimension) / dimension).abs().max() < 5 / math.sqrt(count)
    # The radius says nothing about the direction.
    assert (difference.norm(dim=1)[:, None] * unit).mean(dim=0).abs().max() < 5 / math.sqrt(count)


def test_l2_start_in_the_plane_has_a_uniform_angle() -> None:
    centre = torch.zeros(8000, 2)
    start = ThreatModel("l2", 1, box=None).random_start(centre, keys_of(8000)).double()
    share = (torch.atan2(start[:, 1], start[:, 0]) / (2 * math.pi) + 0.5).sort().values
    assert largest_gap(share, share) < KOLMOGOROV / math.sqrt(8000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linf_start_is_uniform_in_the_cube(dtype: torch.dtype) -> None:
    count, eps = 4000, 0.25
    centre = torch.full((count, 2, 3), 0.5, dtype=dtype)
    start = ThreatModel("linf", eps, box=None).random_start(centre, keys_of(count))
    shares = ((start.double() - centre.double()) / eps + 1).flatten(1) / 2
    for column in shares.T:
        # Rounding may put a share 1e-7 outside [0, 1].
        assert largest_gap(column.sort().values, column.sort().values.clamp(0, 1)) < KOLMOGOROV / math.sqrt(count)
    correlations = torch.corrcoef(shares.T) - torch.eye(6)
    assert correlations.abs().max() < 5 / math.sqrt(count)  # 15 estimates, five standard errors


@pytest.mark.parametrize("norm", NORMS)
def test_start_belongs_to_the_sample(norm: str) -> None:
    images = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threat, keys = ThreatModel(norm, 0.1), keys_of(9)
    whole = threat.random_start(images, keys)
    chosen = torch.tensor([7, 0, 3])
    # The L2 start has a norm and a logarithm in it, whose rounding may depend on how the batch is vectorised.
    assert_close(threat.random_start(images[chosen], keys[chosen]), whole[chosen], rtol=1e-12, atol=1e-14)
    state = torch.get_rng_state()
    threat.random_start(images, keys)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", NORMS)
def test_start_of_no_images(norm: str) -> None:
    images = torch.zeros(0, 3, 4, 4)
    assert ThreatModel(norm, 0.1).random_start(images, torch.zeros(0, dtype=torch.int64)).shape == images.shape


@properties
@given(cases())
def test_start_never_leaves_ball_and_box(case: Case) -> None:
    start = case.threat.random_start(case.images, case.keys)
    assert start.shape == case.images.shape and start.dtype == case.images.dtype
    assert inside_to_rounding(case.threat, start, case.images)
    assert case.threat.contains(start, case.images).all()


# The projection


def inside_to_rounding(threat: ThreatModel, points: Tensor, images: Tensor) -> bool:
    """In the box exactly, in the ball up to the rounding of pixels up to 4 (images here are below 1, budgets too)."""
    if threat.box is not None and not bool(((points >= threat.box[0]) & (points <= threat.box[1])).all()):
        return False
    rounding = 4 * torch.finfo(points.dtype).eps
    if threat.norm == "l2":
        rounding *= math.sqrt(points[0].numel())
    return bool((lengths(points.double() - images.double(), threat.norm) <= threat.eps + rounding).all())


@properties
@given(cases())
def test_projection_never_leaves_ball_and_box(case: Case) -> None:
    points = case.points.clone()
    projected = case.threat.project(points, case.images)
    assert projected.shape == points.shape and projected.dtype == points.dtype
    assert inside_to_rounding(case.threat, projected, case.images)
    assert case.threat.contains(projected, case.images).all()
    assert torch.equal(points, case.points)  # nothing in place


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_idempotent_to_the_bit(norm: str) -> None:
    """Many points at once, where single bits show."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for eps in (1e-3, 8 / 255, 0.5, 1.0):
            for box in (None, (0.0, 1.0)):
                threat = ThreatModel(norm, eps, box)
                images = torch.rand(500, 3, 4, 4, generator=generator, dtype=dtype)
                points = images + torch.randn(images.shape, generator=generator, dtype=dtype) * eps
                once = threat.project(points, images)
                moved = (threat.project(once, images) != once).flatten(1).any(dim=1).sum().item()
                assert moved == 0, f"{moved} of 500 points move again under {threat}, box {box}, {dtype}"


@properties
@given(cases())
def test_projection_is_idempotent_and_keeps_what_is_inside(case: Case) -> None:
    once = case.threat.project(case.points, case.images)
    # To rounding here: the test above asks for the last bit.
    rounding = 4 * torch.finfo(once.dtype).eps
    assert_close(case.threat.project(once, case.images), once, rtol=0, atol=rounding)
    inside = lengths(case.points.double() - case.images.double(), case.threat.norm) <= case.threat.eps
    if case.threat.box is not None:
        inside &= ((case.points >= 0) & (case.points <= 1)).flatten(1).all(dim=1)
    assert_close(once[inside], case.points[inside], rtol=0, atol=rounding)


@properties
@given(cases((torch.float64,)), st.integers(0, 2**32))
def test_projection_onto_the_ball_is_the_nearest_point(case: Case, seed: int) -> None:
    """No other point of the ball is nearer, and the point lies where a convex set's projection has to lie."""
    threat = ThreatModel(case.threat.norm, case.threat.eps, box=None)
    projected = threat.project(case.points, case.images)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**62), 2**62, case.keys.shape, generator=generator)
    for other in (case.images, threat.random_start(case.images, keys)):
        # <p - proj p, other - proj p> <= 0 for every point of the set; 1e-12 is the rounding of float64 sums here.
        inner = ((case.points - projected) * (other - projected)).flatten(1).sum(dim=1)
        assert (inner <= 1e-12).all()


@properties
@given(cases())
def test_linf_projection_is_the_nearest_point_of_ball_and_box(case: Case) -> None:
    threat = ThreatModel("linf", case.threat.eps, case.threat.box)
    # By coordinates the set is an interval, so clamping is nearest in every norm.
    low, high = case.images - threat.eps, case.images + threat.eps
    if threat.box is not None:
        low, high = low.clamp(min=0), high.clamp(max=1)
    assert torch.equal(threat.project(case.points, case.images), case.points.maximum(low).minimum(high))


def test_l2_projection_scales_onto_the_sphere() -> None:
    threat = ThreatModel("l2", 1, box=None)
    images = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    points = images + torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = images + torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    assert_close(threat.project(points, images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_budget_of_zero_gives_the_images_back(norm: str) -> None:
    threat = ThreatModel(norm, 0)
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(threat.project(images + 0.1, images), images)
    assert torch.equal(threat.random_start(images, keys_of(4)), images)


# Steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_step_is_the_steepest_at_every_scale(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 4, 4, generator=generator, dtype=dtype)
    grad = torch.randn(images.shape, generator=generator, dtype=dtype)
    linf = ThreatModel("linf", 0.1).step(images, grad * scale, 0.25)
    # One addition: rounding of a number up to 1.25.
    assert_close(linf - images, 0.25 * grad.sign(), rtol=0, atol=2 * torch.finfo(dtype).eps)
    l2 = ThreatModel("l2", 0.1).step(images, grad * scale, 0.25)
    unit = grad / grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    # A norm of 48 numbers, a division and an addition.
    assert_close(l2 - images, 0.25 * unit, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert_close((l2 - images).flatten(1).norm(dim=1), torch.full((5,), 0.25, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *DTYPES])
def test_zero_gradient_gives_no_step(norm: str, dtype: torch.dtype) -> None:
    images = torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.zeros_like(images)
    grad[1] = 1
    stepped = ThreatModel(norm, 0.1).step(images, grad, 0.25)
    assert torch.equal(stepped[[0, 2]], images[[0, 2]])
    assert (stepped[1] > images[1]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_step_moves_each_sample_by_itself(norm: str) -> None:
    """A batch of gradients over sixty orders of magnitude: nobody's length leaks into another's step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, 10, generator=generator, dtype=torch.float64)
    grad = (
        torch.randn(7, 10, generator=generator, dtype=torch.float64)
        * 10.0 ** torch.linspace(-30, 30, 7)[:, None].double()
    )
    whole = ThreatModel(norm, 0.1).step(images, grad, 0.1)
    alone = torch.cat([ThreatModel(norm, 0.1).step(images[i : i + 1], grad[i : i + 1], 0.1) for i in range(7)])
    assert_close(whole, alone, rtol=1e-12, atol=0)
    assert ((whole - images) * grad.sign()).sum(dim=1).gt(0.09).all()  # sums are 1 (L-inf) or at least 0.1 (L2)


# Membership and the check of images


def test_contains_tells_ball_and_box() -> None:
    images = torch.full((1, 2), 0.5, dtype=torch.float64)
    linf, l2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.1)
    for offset, in_linf, in_l2 in [
        ((0.1, -0.1), True, False),
        ((0.1, 0.0), True, True),
        ((0.06, 0.08), True, True),
        ((0.07, 0.08), True, False),
        ((0.1001, 0.0), False, False),
        ((0.0, -0.1001), False, False),
        ((math.nan, 0.0), False, False),
        ((math.inf, 0.0), False, False),
    ]:
        adv_images = images + torch.tensor([offset], dtype=torch.float64)
        assert linf.contains(adv_images, images).tolist() == [in_linf], offset
        assert l2.contains(adv_images, images).tolist() == [in_l2], offset


@pytest.mark.parametrize("norm", NORMS)
def test_contains_is_a_verdict_for_each_image(norm: str) -> None:
    images = torch.zeros(4, 1, 2, 2)
    adv_images = images.clone()
    adv_images[1, 0, 0, 0] = 0.3  # outside the ball
    adv_images[2, 0, 1, 1] = -0.05  # outside the box
    adv_images[3, 0, 1, 1] = 0.05
    assert ThreatModel(norm, 0.1).contains(adv_images, images).tolist() == [True, False, False, True]
    assert ThreatModel(norm, 0.1, box=None).contains(adv_images, images).tolist() == [True, False, True, True]
    assert ThreatModel(norm, 0.1).contains(images[:0], images[:0]).shape == (0,)


@pytest.mark.parametrize("norm", NORMS)
def test_contains_tolerates_rounding_only(norm: str) -> None:
    threat, images = ThreatModel(norm, 0.1), torch.zeros(1, 1)
    assert threat.contains(images + 0.100005, images).item()
    assert not threat.contains(images + 0.10005, images).item()
    assert not threat.contains(images + 0.100005, images, tolerance=0).item()


@pytest.mark.parametrize("norm", NORMS)
def test_check_images_tolerates_rounding_only(norm: str) -> None:
    threat = ThreatModel(norm, 0.1)
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    threat.check_images(images)
    threat.check_images((images * 2 - 1) * (1 + 2e-6) / 2 + 0.5)  # from -1e-6 to 1 + 1e-6
    threat.check_images(images[:0])
    for outside in (images + 0.1, images - 0.1, images * 255, torch.full_like(images, math.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\].*Found.*normalisation belongs inside"):
            threat.check_images(outside)
    ThreatModel(norm, 0.1, box=None).check_images(images * 255)
    ThreatModel(norm, 0.1, box=(0, 255)).check_images(images * 255)
