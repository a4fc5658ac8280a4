"""Gramian -> weights: properties over scales and angles, references written with vectors, and TorchJD."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from robust_peft.surgery import (
    MGDA,
    SURGERIES,
    CAGrad,
    ConflictAware,
    GradVac,
    PCGrad,
    Vanilla,
    ascends_adv,
    cancelled,
    conflict,
    lambda_star,
    make_surgery,
    update_norm,
)

METHODS = [
    Vanilla(),
    Vanilla(lam=1),
    ConflictAware(),
    ConflictAware(gamma=0),
    ConflictAware(gamma=1),
    ConflictAware(gamma=0.9, rescale="adversarial"),
    ConflictAware(gamma=0.9, rescale="vanilla"),
    PCGrad(),
    MGDA(),
    CAGrad(),
    CAGrad(c=0),
    CAGrad(c=2),
    GradVac(),
    GradVac(target=1),
    GradVac(target=-1),
    GradVac(target=-0.3),
]
DTYPES = [torch.float32, torch.float64]
SCALES = [1e-15, 1e-6, 1.0, 1e6, 1e15]
COSINES = [-1.0, -0.999, -0.7, -0.6, -0.2, 0.0, 0.3, 0.79, 0.81, 0.999, 1.0]

properties = settings(deadline=None, derandomize=True, max_examples=60)
exponents = st.floats(-15, 15)
cosines = st.one_of(st.floats(-1, 1), st.sampled_from([*COSINES, -1 + 1e-12, -1 + 1e-7, 1 - 1e-7, 1 - 1e-12]))
gammas = st.one_of(st.floats(0, 0.99), st.sampled_from([0.0, 0.8, 0.9]))
dtypes = st.sampled_from(DTYPES)
methods = st.sampled_from(METHODS)

# Two dense orthonormal directions, so that every product in the Gramian really rounds.
DIRECTIONS = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].T


def gradients(cos: float, clean_norm: float = 1.0, adv_norm: float = 1.0, dtype=torch.float64) -> Tensor:
    """A pair `[2, 9]` (clean, adversarial) of the given lengths and cosine."""
    clean, normal = DIRECTIONS
    across = math.sqrt((1 - cos) * (1 + cos))
    return torch.stack([clean_norm * clean, adv_norm * (cos * clean + across * normal)]).to(dtype)


def gram(grads: Tensor) -> Tensor:
    return grads @ grads.mT


def combine(surgery: Callable[[Tensor], Tensor], grads: Tensor) -> Tensor:
    """The update, its weights from the Gramian in the gradients' dtype, itself in float64."""
    return surgery(gram(grads)).double() @ grads.double()


def true_angle(grads: Tensor) -> tuple[float, float]:
    """Cosine and sine of gradients as they are after rounding, in float64; the sine never 0, to be divided by."""
    clean, adv = grads.double()
    clean, adv = clean / clean.norm(), adv / adv.norm()
    cos = float(clean @ adv)
    return cos, max(float((adv - cos * clean).norm()), 1e-100)


def gramian_error(dtype: torch.dtype) -> float:
    """Bound on the error of a cosine from a Gramian: 9 products summed, two norms, in units of eps."""
    return 10 * torch.finfo(dtype).eps


def algorithm_1(grads: Tensor, gamma: float) -> Tensor:
    """The paper's Algorithm 1, lines 6 to 11, on float64 vectors."""
    clean, adv = grads
    phi = torch.dot(clean, adv) / (clean.norm() * adv.norm())
    if phi >= gamma:
        return clean
    gap = gamma * (1 - phi**2).clamp(min=0).sqrt() - phi * math.sqrt(1 - gamma**2)
    return adv + adv.norm() * gap / (clean.norm() * math.sqrt(1 - gamma**2)) * clean


def gradient_vaccine(grads: Tensor, target: float) -> Tensor:
    """GradVac with a fixed target on vectors: each gradient is the component across the other one, plus as much along
    it as makes the angle right."""
    total = torch.zeros_like(grads[0])
    for turned, other in (grads, grads.flip(0)):
        along = other / other.norm()
        if torch.dot(turned, along) / turned.norm() < target:
            across = turned - torch.dot(turned, along) * along
            turned = across + across.norm() * target / math.sqrt(1 - target**2) * along
        total = total + turned
    return total


# --- CA-AT ---------------------------------------------------------------------------------------------------------


@properties
@given(cosines, exponents, exponents, gammas, dtypes)
def test_ca_at_below_the_boundary_meets_gamma_and_its_length(cos, clean_exponent, adv_exponent, gamma, dtype):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent, dtype)
    cos, sin = true_angle(grads)
    error = gramian_error(dtype)
    assume(cos < gamma - error)
    # An error e of the cosine is e / sin of the sine, and the update is as long as the sine: relative error e / sin^2.
    # Nearly opposite gradients, where that exceeds a hundredth, are the business of `cancelled`.
    assume(error / sin**2 < 0.01)

    update = combine(ConflictAware(gamma), grads)

    clean, adv = grads.double()
    wanted = adv.norm() * sin / math.sqrt(1 - gamma**2)
    assert_close(update.norm(), wanted, rtol=2 * error / sin**2, atol=0)
    # Both lengths divided out before the product, which would leave float64's range for nothing.
    assert torch.dot(update / update.norm(), clean / clean.norm()).item() == pytest.approx(
        gamma, abs=2 * error / sin**2
    )


@properties
@given(cosines, exponents, exponents, gammas, dtypes)
def test_ca_at_is_algorithm_1(cos, clean_exponent, adv_exponent, gamma, dtype):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent, dtype)
    cos, sin = true_angle(grads)
    error = gramian_error(dtype)
    assume(abs(cos - gamma) > error)  # at the boundary rounding decides the branch, and the branches differ

    difference = combine(ConflictAware(gamma), grads) - algorithm_1(grads.double(), gamma)

    # In units of the longest part: lambda* times ||g_c|| is off by the error of the sine over sqrt(1 - gamma^2), and
    # that error is e / sin, or sqrt(2 e) where the sine is smaller than that.
    sine_error = min(error / sin, math.sqrt(2 * error))
    longest = grads.double().norm(dim=1)[1 if cos < gamma else 0]
    assert difference.norm() <= 2 * (sine_error + error) / math.sqrt(1 - gamma**2) * longest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cos", [c for c in COSINES if c < 0])
def test_gamma_zero_projects_off_the_clean_gradient(cos, dtype):
    grads = gradients(cos, 3e4, 2e-7, dtype)
    clean, adv = grads.double()
    projected = adv - torch.dot(adv, clean) / torch.dot(clean, clean) * clean  # A-GEM
    # lambda* is -cos ||g_a|| / ||g_c|| then, without a sine in it: the error of the cosine is all there is.
    assert (combine(ConflictAware(gamma=0), grads) - projected).norm() <= gramian_error(dtype) * adv.norm()


@pytest.mark.parametrize("gamma", [0.0, 0.28, 0.6, 0.8])
def test_the_boundary_belongs_to_the_clean_gradient(gamma):
    # Pythagorean triples: the cosine is exactly the float that gamma is.
    sides = {0.0: (0, 1), 0.28: (7, 24), 0.6: (3, 4), 0.8: (4, 3)}[gamma]
    grads = torch.tensor([[1, 0], sides], dtype=torch.float64)
    assert ConflictAware(gamma)(gram(grads)).tolist() == [1, 0]
    # From below the update tends to g_a itself: lambda* to 0.
    turned = torch.tensor([sides[0] - 1e-9, sides[1]], dtype=torch.float64)
    weights = ConflictAware(gamma)(gram(torch.stack([grads[0], turned])))
    assert weights[1] == 1
    assert 0 < weights[0] < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", ["none", "adversarial", "vanilla"])
@pytest.mark.parametrize("cos", COSINES)
def test_gamma_one_is_the_clean_direction(cos, rescale, dtype):
    weights = ConflictAware(1, rescale)(gram(gradients(cos, 2, 5, dtype)))
    assert weights[1] == 0
    assert weights[0] > 0 or cos == -1
    if rescale == "none":
        assert weights[0] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("ratio", [2.0**-40, 0.5, 1.0, 2.0**40])
def test_collinear_pairs(ratio, gamma, dtype):
    # A power of two times the same vector is collinear exactly; the Gramian's rounding is not obliged to know.
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        clean = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
        aligned, opposed = torch.stack([clean, ratio * clean]), torch.stack([clean, -ratio * clean])
        assert ConflictAware(gamma)(gram(aligned)).tolist() == [1, 0]

        gramian = gram(opposed)
        for rescale in ("none", "adversarial", "vanilla"):
            weights = ConflictAware(gamma, rescale)(gramian)
            assert weights.isfinite().all()
            assert cancelled(gramian, weights)
            assert not ascends_adv(gramian, weights)
            # Zero up to sqrt(eps), the sine's resolution, over sqrt(1 - 0.99^2) = 0.14.
            limit = 30 * math.sqrt(torch.finfo(dtype).eps) * ratio * clean.double().norm()
            assert (weights.double() @ opposed.double()).norm() <= limit


@properties
@given(cosines, exponents, exponents, gammas, dtypes, st.sampled_from(["adversarial", "vanilla"]))
def test_rescaled_length(cos, clean_exponent, adv_exponent, gamma, dtype, rescale):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent, dtype)
    cos, sin = true_angle(grads)
    error = gramian_error(dtype)
    assume(error / sin**2 < 0.01 or cos > gamma + error)
    clean, adv = grads.double()
    wanted = adv.norm() if rescale == "adversarial" else (0.5 * (clean + adv)).norm()

    update = combine(ConflictAware(gamma, rescale), grads)

    # The length of a sum of nearly opposite vectors is known only to sqrt(e) of its parts.
    slack = 3 * error / sin**2 * wanted if cos < gamma + error else torch.zeros(())
    slack = slack + (0.0 if rescale == "adversarial" else 4 * error / max(sin, math.sqrt(error)) * clean.norm())
    assert (update.norm() - wanted).abs() <= slack + error * wanted
    # Scaled only: the direction is that of the paper's update.
    plain = combine(ConflictAware(gamma), grads)
    if wanted > 100 * slack:
        assert_close(update / update.norm(), plain / plain.norm(), rtol=0, atol=max(error, error / sin))


def test_scaling_one_gradient():
    surgery = ConflictAware(0.8)
    for cos in (-0.9, -0.3, 0.0, 0.5):  # below the boundary
        update = combine(surgery, gradients(cos))
        assert_close(combine(surgery, gradients(cos, adv_norm=1e9)), 1e9 * update)
        assert_close(combine(surgery, gradients(cos, clean_norm=1e9)), update)  # only its direction counts
    update = combine(surgery, gradients(0.9))
    assert_close(combine(surgery, gradients(0.9, adv_norm=1e9)), update)
    assert_close(combine(surgery, gradients(0.9, clean_norm=1e9)), 1e9 * update)


def test_default_parameters():
    assert ConflictAware() == ConflictAware(gamma=0.8, rescale="none")
    assert Vanilla() == Vanilla(lam=0.5)
    assert CAGrad() == CAGrad(c=0.5)
    assert GradVac() == GradVac(target=0.8)


# --- Every method --------------------------------------------------------------------------------------------------


@properties
@given(methods, cosines, exponents, exponents, st.integers(-20, 20), dtypes)
def test_scaling_both_gradients_leaves_the_weights(method, cos, clean_exponent, adv_exponent, power, dtype):
    grads = gradients(cos, 10 ** (clean_exponent / 3), 10 ** (adv_exponent / 3), dtype)
    # A power of two changes no mantissa on the way, so not even the last bit may differ.
    assert torch.equal(method(gram(grads * 2.0**power)), method(gram(grads)))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_scale_gives_the_weights_of_float64(method):
    # Angles away from the methods' own jumps, where rounding to float32 would pick the other branch.
    for clean_norm, adv_norm, cos in itertools.product(SCALES, SCALES, (-0.93, -0.4, 0.35, 0.95)):
        grads = gradients(cos, clean_norm, adv_norm, torch.float32)
        weights, exact = method(gram(grads)), method(gram(grads.double()))
        norms = grads.double().norm(dim=1)
        parts = (exact * norms).abs().sum()
        assert weights.dtype == torch.float32 and exact.dtype == torch.float64
        # Each weight in terms of what it moves. 1e-5: a float32 cosine's 1e-6, times 1 / sin = 3 and a few such terms.
        assert_close(weights * norms, exact * norms, rtol=0, atol=1e-5 * parts.item())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_algebra_is_float64(method):
    for cos in (-0.93, -0.4, 0.35, 0.95):
        gramian = gram(gradients(cos, 2, 3, torch.float32))
        assert torch.equal(method(gramian), method(gramian.double()).float())  # rounded once, at the end


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_gramian_rounded_unevenly(method):
    gramian = torch.tensor([[1.0, -0.5], [-0.5000001, 1.0]])  # as a matmul may leave it
    assert torch.equal(method(gramian), method(gramian.mT))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_ends_of_float64(method):
    for sign in (-1, 1):
        gramian = torch.tensor([[1, sign * 0.5], [sign * 0.5, 0.7]], dtype=torch.float64)
        for scale in (1e-300, 1.7e308):
            assert_close(method(scale * gramian), method(gramian), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_batches_equal_a_loop(method, dtype):
    gramians = torch.stack([gram(gradients(cos, 2, 3, dtype)) for cos in COSINES])
    gramians = torch.cat([gramians, torch.zeros(1, 2, 2, dtype=dtype)]).reshape(2, 3, 2, 2, 2)
    weights = method(gramians)
    assert weights.shape == (2, 3, 2, 2)
    one_by_one = torch.stack([method(g) for g in gramians.reshape(-1, 2, 2)]).reshape(weights.shape)
    # Vectorised square roots may differ in the last float64 bit; where gradients cancel CA-AT's rescaling magnifies it.
    assert_close(weights, one_by_one, rtol=1e-7, atol=0)
    assert method(gramians[:, :0]).shape == (2, 0, 2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gramians_give_nan(value, dtype):
    for place in range(4):
        gramian = torch.eye(2, dtype=dtype).repeat(2, 1, 1)
        gramian[0].view(-1)[place] = value
        for method in METHODS:
            weights = method(gramian)
            assert weights[0].isnan().all()
            assert weights[1].isfinite().all()  # its neighbour in the batch is untouched
        assert all(field[0].isnan() and field[1].isfinite() for field in conflict(gramian))
        assert update_norm(gramian, torch.ones(2, 2))[0].isnan()
        assert lambda_star(gramian, 0.5)[0].isnan()
        assert not cancelled(gramian, torch.zeros(2, 2))[0]
        assert not ascends_adv(gramian, -torch.ones(2, 2))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("method", "clean_zero", "adv_zero", "both_zero"),
    [
        (Vanilla(lam=0.3), (0.7, 0.3), (0.7, 0.3), (0.7, 0.3)),
        (ConflictAware(), (0, 1), (1, 0), (0, 0)),
        (ConflictAware(gamma=0), (0, 1), (1, 0), (0, 0)),
        (ConflictAware(gamma=1), (0, 1), (1, 0), (0, 0)),
        (ConflictAware(rescale="adversarial"), (0, 1), (0, 0), (0, 0)),
        (ConflictAware(rescale="vanilla"), (0, 0.5), (0.5, 0), (0, 0)),
        (PCGrad(), (1, 1), (1, 1), (1, 1)),
        (MGDA(), (1, 0), (0, 1), (0.5, 0.5)),
        (CAGrad(), (0, 0), (0, 0), (0, 0)),
        (CAGrad(c=0), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5)),
        (CAGrad(c=1), (0, 0), (0, 0), (0, 0)),
        (GradVac(), (1, 1), (1, 1), (1, 1)),
        (GradVac(target=1), (1, 1), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_zero_gradients(method, clean_zero, adv_zero, both_zero, dtype):
    grads = gradients(0.3, 2, 3, dtype)
    for kept, wanted in (((0, 1), clean_zero), ((1, 0), adv_zero), ((0, 0), both_zero)):
        gramian = gram(grads * torch.tensor(kept, dtype=dtype)[:, None])
        weights = method(gramian)
        assert_close(weights, torch.tensor(wanted, dtype=dtype))
        assert not cancelled(gramian, weights)  # nothing cancelled: there was nothing to begin with
        assert not ascends_adv(gramian, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_half_precision_is_refused(dtype):
    for function in [*METHODS, conflict]:
        with pytest.raises(ValueError, match=r"float32 or better .* Found torch\."):
            function(torch.eye(2, dtype=dtype))


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 2, 1), (4, 1, 2)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 2, 2\]\. Found"):
        PCGrad()(torch.ones(shape))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_carry_no_graph(method):
    grads = gradients(-0.5).requires_grad_()
    assert not method(gram(grads)).requires_grad


def everything(method: Callable[[Tensor], Tensor], gramian: Tensor) -> tuple[Tensor, ...]:
    """All that a training step asks of this module."""
    weights = method(gramian)
    flags = cancelled(gramian, weights), ascends_adv(gramian, weights)
    return weights, *conflict(gramian), lambda_star(gramian, 0.8), update_norm(gramian, weights), *flags


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_waits_for_the_device(method, dtype):
    # Tensors without data: .item(), bool(tensor) or a copy to the host would raise, and the device must be kept.
    for results in (
        everything(method, torch.empty(3, 2, 2, dtype=dtype, device="meta")),
        _under_fake_tensors(method, dtype),
    ):
        assert [r.shape for r in results] == [(3, 2)] + 8 * [(3,)] and len(results) == 9
        assert [r.dtype for r in results] == 7 * [dtype] + 2 * [torch.bool]
        assert len({r.device for r in results}) == 1


def _under_fake_tensors(method, dtype):
    with FakeTensorMode():
        results = everything(method, torch.empty(3, 2, 2, dtype=dtype))
    assert all(r.device.type == "cpu" for r in results)
    return results


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_compiles_into_one_graph(method):
    # Tracing alone ("eager" backend) is what breaks on data-dependent Python; code generation is not ours to test.
    torch.compiler.reset()  # each method is a graph of its own, and Dynamo gives up after eight of one function
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    gramian = torch.stack([gram(gradients(cos)) for cos in (-1.0, -0.5, 0.9)])
    assert_close(compiled(method, gramian), everything(method, gramian), rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_cuda():
    gramian = torch.stack([gram(gradients(cos)) for cos in COSINES])
    on_device = gramian.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [everything(method, on_device) for method in METHODS]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for method, (weights, *_) in zip(METHODS, results, strict=True):
        # Device square roots and hypot may differ in the last bits, magnified to sqrt where the two gradients cancel.
        assert_close(weights.cpu(), method(gramian), rtol=1e-6, atol=1e-6)


# --- The relatives of CA-AT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean_norm", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("cos", COSINES)
def test_pcgrad_is_torchjd(cos, clean_norm):
    aggregation = pytest.importorskip("torchjd.aggregation")
    gramian = gram(gradients(cos, clean_norm, 2))
    assert_close(PCGrad()(gramian), aggregation.PCGrad().gramian_weighting(gramian), rtol=1e-12, atol=1e-12)


def test_pcgrad_removes_the_conflict_with_both():
    grads = gradients(-0.7, 3, 0.2)
    clean, adv = grads
    off_adv = clean - torch.dot(clean, adv) / torch.dot(adv, adv) * adv
    off_clean = adv - torch.dot(clean, adv) / torch.dot(clean, clean) * clean
    assert_close(combine(PCGrad(), grads), off_adv + off_clean)
    # Its half of g_a is CA-AT with gamma = 0.
    assert_close(combine(ConflictAware(gamma=0), grads), off_clean)


@pytest.mark.parametrize("clean_norm", [1e-3, 0.5, 1.0, 1e3])
@pytest.mark.parametrize("cos", [c for c in COSINES if c < 1])
def test_mgda_is_torchjd(cos, clean_norm):
    aggregation = pytest.importorskip("torchjd.aggregation")
    gramian = gram(gradients(cos, clean_norm, 0.7))
    # One exact line search solves the problem for two; epsilon small so that it does not stop short.
    assert_close(MGDA()(gramian), aggregation.MGDA(epsilon=1e-12).gramian_weighting(gramian), rtol=1e-9, atol=1e-9)


@properties
@given(cosines, st.floats(-6, 6), st.floats(-6, 6))
def test_mgda_is_the_shortest_combination(cos, clean_exponent, adv_exponent):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent)
    weights = MGDA()(gram(grads))
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    share = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    shortest = (share * grads[0] + (1 - share) * grads[1]).norm(dim=1).min()
    # The Gramian knows a length to sqrt(eps) of the longer of the two that cancel.
    assert (weights @ grads).norm() <= shortest * (1 + 1e-9) + 1e-7 * (weights * grads.norm(dim=1)).sum()


@properties
@given(cosines, st.floats(-6, 6), st.floats(-6, 6), st.one_of(st.floats(0.01, 3), st.sampled_from([0.5, 1.0])))
def test_cagrad_is_optimal(cos, clean_exponent, adv_exponent, c):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent)
    mean = grads.mean(0)
    gramian = gram(grads)
    weights = CAGrad(c)(gramian)
    update = weights @ grads
    unit = mean.norm() * grads.norm(dim=1).min()  # of the value below
    assume(mean.norm() > 1e-6 * grads.norm(dim=1).max())  # opposite and as long: the ball is a point, the update zero

    # In the ball ...
    assert (update - mean).norm() <= c * mean.norm() * (1 + 1e-6) or (weights == 0).all()
    # ... and no worse than the dual at the convex combination that the weights hold. Any dual value bounds the optimum
    # from above, so that proves the update optimal.
    value = (grads @ update).min()
    share = (weights - 0.5) / (weights - 0.5).sum() if (weights != 0).any() else MGDA()(gramian)
    convex = share @ grads
    bound = torch.dot(convex, mean) + c * mean.norm() * convex.norm()
    assert (share >= 0).all()
    assert value >= bound - 1e-6 * (1 + c) * unit
    if (weights == 0).all():
        assert c >= 1 - 1e-6 and cos < -1 + 1e-9  # Pareto-stationary, and the ball holds the origin


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_cagrad_is_torchjd(c):
    aggregation = pytest.importorskip("torchjd.aggregation")
    for solver in ("cvxpy", "clarabel"):  # not needed for the proof of optimality above
        pytest.importorskip(solver, reason=f"TorchJD's CAGrad needs {solver}")
    # norm_eps, which TorchJD adds to the normalised Gramian's diagonal, made small.
    weighting = aggregation.CAGrad(c=c, norm_eps=1e-9).gramian_weighting
    for clean_norm in (0.05, 0.6, 1.0, 1.5, 20.0):
        for cos in (-0.95, -0.6, 0.0, 0.4, 0.9):
            gramian = gram(gradients(cos, clean_norm, 1.0))
            # TorchJD's answer is an iterative cone solver's.
            assert_close(CAGrad(c)(gramian), weighting(gramian), rtol=2e-3, atol=2e-3)


def test_cagrad_with_no_ball_is_the_mean():
    for cos in COSINES:
        assert torch.equal(CAGrad(c=0)(gram(gradients(cos, 3))), torch.full((2,), 0.5, dtype=torch.float64))


@properties
@given(st.floats(-0.999, 1), st.floats(-6, 6), st.floats(-6, 6), st.floats(-0.99, 0.99))
def test_gradvac_is_its_vector_form(cos, clean_exponent, adv_exponent, target):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent)
    assume(abs(true_angle(grads)[0] - target) > 1e-14)
    # 1e-7: the sine of nearly collinear gradients, from the Gramian, over sqrt(1 - 0.99^2).
    slack = 1e-7 / math.sqrt(1 - target**2) * grads.norm(dim=1).sum()
    assert (combine(GradVac(target), grads) - gradient_vaccine(grads, target)).norm() <= slack


@pytest.mark.parametrize("target", [-0.5, 0.0, 0.4, 0.9])
@pytest.mark.parametrize("cos", [-0.9, -0.3, 0.2, 0.7, 0.95])
def test_gradvac_is_torchjd_with_its_target_held(cos, target):
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = aggregation.GradVac(beta=1.0, eps=0.0).gramian_weighting
    weighting(gram(gradients(target)))  # beta = 1: the target is now the cosine just seen ...
    weighting.beta = 0.0  # ... and moves no more
    gramian = gram(gradients(cos, 2, 0.3))
    assert_close(GradVac(target)(gramian), weighting(gramian), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cos", COSINES)
def test_gradvac_and_its_kin(cos):
    gramian = gram(gradients(cos, 2, 0.3))
    assert_close(GradVac(target=0)(gramian), PCGrad()(gramian))
    assert GradVac(target=-1)(gramian).tolist() == [1, 1]
    # One-sided, and without g_c in the sum, it is CA-AT.
    if cos < 0.8:
        assert_close(lambda_star(gramian, 0.8), GradVac(target=0.8)(gramian)[0] - 1)
    # target = 1 is the limit direction; the coefficients grow like 1 / sqrt(1 - target^2), times the sine.
    if abs(cos) < 1:
        near, limit = GradVac(target=1 - 1e-12)(gramian), GradVac(target=1)(gramian)
        assert_close(near / near.sum(), limit / limit.sum(), rtol=1e-3, atol=0)


def test_vanilla_is_the_weighted_sum():
    grads = gradients(-0.4, 3, 7)
    assert_close(combine(Vanilla(lam=0.25), grads), 0.75 * grads[0] + 0.25 * grads[1])


# --- Measures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cos", COSINES)
def test_conflict(cos, dtype):
    error = gramian_error(dtype)
    for clean_norm, adv_norm in itertools.product(SCALES, SCALES):
        measured = conflict(gram(gradients(cos, clean_norm, adv_norm, dtype)))
        assert all(field.dtype == dtype for field in measured)
        assert -1 <= measured.cos <= 1
        assert measured.cos.item() == pytest.approx(cos, abs=error)
        assert measured.clean_norm.item() == pytest.approx(clean_norm, rel=error)
        assert measured.adv_norm.item() == pytest.approx(adv_norm, rel=error)
        # mu is a difference: known to the cosine's error times the norms.
        product = clean_norm * adv_norm
        assert measured.mu.item() == pytest.approx(product * (1 - cos), abs=4 * error * product)


def test_conflict_of_a_zero_gradient_is_none():
    measured = conflict(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert [field.item() for field in measured] == [0, 0, 2, 0]


@properties
@given(methods, cosines, exponents, exponents, dtypes)
def test_update_norm_is_the_updates(method, cos, clean_exponent, adv_exponent, dtype):
    grads = gradients(cos, 10**clean_exponent, 10**adv_exponent, dtype)
    gramian = gram(grads)
    weights = method(gramian)
    parts = (weights.double() * grads.double().norm(dim=1)).abs().sum()
    difference = update_norm(gramian, weights).double() - (weights.double() @ grads.double()).norm()
    # As its docstring says: sqrt of the Gramian's error, of the parts.
    assert difference.abs() <= 2 * math.sqrt(gramian_error(dtype)) * parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8, 0.9])
def test_ascends_adv_below_the_papers_blind_angle(gamma, dtype):
    turn = -math.sqrt(1 - gamma**2)
    for cos in torch.linspace(-0.99, 0.99, 100).tolist():
        grads = gradients(cos, 0.1, 30, dtype)
        gramian = gram(grads)
        weights = ConflictAware(gamma)(gramian)
        assert not cancelled(gramian, weights)
        inner = torch.dot(weights.double() @ grads.double(), grads[1].double())
        if cos < gamma and abs(cos - turn) > 1e-4:
            assert ascends_adv(gramian, weights).item() == (cos < turn) == bool(inner < 0)


def test_lambda_star_rises_then_falls():
    # The peak is where g_a is at a right angle to the boundary's cone.
    gamma = 0.8
    values = {cos: lambda_star(gram(gradients(cos, 1, 1)), gamma).item() for cos in (0.8, 0.5, 0.0, -0.6, -0.9, -1.0)}
    assert values[0.5] < values[0.0] < values[-0.6] > values[-0.9] > values[-1.0]
    assert values[-0.6] == pytest.approx(1 / 0.6)  # 1 / sqrt(1 - gamma^2), at cos = -sqrt(1 - gamma^2)
    assert values[-1.0] == pytest.approx(1, abs=1e-7)
    assert lambda_star(gram(gradients(0.9)), gamma) == 0
    assert lambda_star(gram(gradients(-0.9)), 1.0) == 0
    assert lambda_star(torch.zeros(2, 2), gamma) == 0


# --- Names and mistakes --------------------------------------------------------------------------------------------


def test_make_surgery():
    assert make_surgery("ca-at", gamma=0.9, rescale=None, lam=None) == ConflictAware(0.9)
    assert make_surgery("vanilla", lam=1.0) == Vanilla(1.0)
    assert make_surgery("cagrad", c=0.2) == CAGrad(0.2)
    assert make_surgery("gradvac", target=0.1, gamma=None) == GradVac(0.1)
    for name, method in SURGERIES.items():
        assert isinstance(make_surgery(name), method)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ca_at", {}, r"surgery should be one of vanilla, ca-at, pcgrad, mgda, cagrad, gradvac\. Found 'ca_at'\."),
        ("vanilla", {"gamma": 0.8}, r"surgery 'vanilla' has no parameter 'gamma'\. It has lam\."),
        ("mgda", {"c": 1, "lam": 1}, r"surgery 'mgda' has no parameter 'c', 'lam'\. It has none\."),
        ("ca-at", {"gamma": 1.2}, r"gamma should be in \[0, 1\]\. Found gamma = 1\.2\."),
        ("ca-at", {"gamma": math.nan}, r"gamma should be in \[0, 1\]\. Found gamma = nan\."),
        ("ca-at", {"gamma": "0.8"}, r"gamma should be in \[0, 1\]\. Found gamma = '0\.8'\."),
        ("ca-at", {"rescale": "clean"}, r"rescale should be 'none', .* Found rescale = 'clean'\."),
        ("vanilla", {"lam": -0.1}, r"lam should be in \[0, 1\]\. Found lam = -0\.1\."),
        ("cagrad", {"c": -1}, r"c should be finite and at least 0\. Found c = -1\."),
        ("cagrad", {"c": math.inf}, r"c should be finite and at least 0\. Found c = inf\."),
        ("gradvac", {"target": 1.5}, r"target should be in \[-1, 1\]\. Found target = 1\.5\."),
    ],
)
def test_mistakes(name: str, parameters: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_surgery(name, **parameters)


def test_lambda_star_refuses_a_wrong_gamma():
    with pytest.raises(ValueError, match=r"gamma should be in \[0, 1\]"):
        lambda_star(torch.eye(2), 1.5)
