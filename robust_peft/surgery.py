"""From the Gramian of the clean and the adversarial gradient to the two weights of the update.

With `grads = [g_c, g_a]` of shape `[2, P]` (clean first, adversarial second) and `gramian = grads @ grads.T` of shape
`[2, 2]`, every method here maps the Gramian to weights of shape `[2]`, and the update is `weights @ grads`:

    weights = ConflictAware(gamma=0.8)(gramian)

What holds for all of them:

- Leading dimensions are batched: `[..., 2, 2]` gives `[..., 2]`, one independent 2x2 problem each. Weights have the
  dtype and device of the Gramian and carry no autograd graph. Nothing waits for the device, and nothing branches on
  data, so the functions run under `torch.compile(fullgraph=True)`.
- The Gramian is float32 or float64; half precision is refused, because a cosine from an 8- or 11-bit product is noise.
  The algebra here is float64 whatever comes in (a device without float64, such as Apple's MPS, cannot run it).
- Gradients (s g_c, s g_a) get the weights of (g_c, g_a), so the update scales with s: no threshold is absolute.
- A Gramian with NaN or inf anywhere gives NaN weights, never a finite answer: such a step is the caller's to skip.
- A gradient whose squared norm underflows to zero in the Gramian's own dtype (norm below about 1e-23 in float32) counts
  as zero. The weights themselves may overflow to inf in float32 when the two norms differ by more than 1e38.

Accuracy. A Gramian with unit roundoff u (6e-8 for float32) gives the cosine to a few u, and no better: the weights
inherit it. The sine comes from the same cosine, so its error is a few u / sin, at worst about sqrt(8 u) for collinear
gradients (7e-4 in float32, 3e-8 in float64). That matters for the two ends: near cos = 1 only for a gamma as near to 1,
and near cos = -1 for the direction of an update that is itself all cancellation; `cancelled` marks those.
"""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MGDA",
    "SURGERIES",
    "CAGrad",
    "Conflict",
    "ConflictAware",
    "GradVac",
    "PCGrad",
    "Surgery",
    "Vanilla",
    "ascends_adv",
    "cancelled",
    "conflict",
    "lambda_star",
    "make_surgery",
    "update_norm",
]


class Conflict(NamedTuple):
    """How the clean and the adversarial gradient stand to each other; four tensors of shape `[...]`."""

    cos: Tensor
    """Cosine of the angle between them, in [-1, 1]; 0 where a gradient is zero."""
    mu: Tensor
    """The paper's conflict `||g_c|| ||g_a|| (1 - cos)`; 0 where a gradient is zero."""
    clean_norm: Tensor
    """`||g_c||`."""
    adv_norm: Tensor
    """`||g_a||`."""


def conflict(gramian: Tensor) -> Conflict:
    """Measure the conflict between the two gradients (paper, section 3: `mu = ||g_c|| ||g_a|| (1 - cos)`).

    mu has the unit of a squared gradient norm, and is per batch when the gradients are means over a batch, per sample
    when the Gramians are per sample: say which beside every number.

    Args:
        gramian: `[..., 2, 2]`, float32 or float64, order (clean, adversarial).

    Returns:
        `Conflict` of tensors `[...]` in the Gramian's dtype. A zero gradient has no angle: its cosine is set to 0 and
        mu is then 0, since one norm is. A non-finite Gramian gives NaN in all four.
    """
    pair = _measure(gramian)
    mu = pair.clean_norm * pair.adv_norm * (1 - pair.cos)
    fields = (pair.cos, mu, pair.clean_norm, pair.adv_norm)
    return Conflict(*(_nan_unless(pair.finite, field).to(gramian.dtype) for field in fields))


def lambda_star(gramian: Tensor, gamma: float) -> Tensor:
    """How much of g_c CA-AT adds to g_a (paper, Eq. 4).

    Args:
        gramian: `[..., 2, 2]`, float32 or float64, order (clean, adversarial).
        gamma: the target cosine, in [0, 1]. ValueError otherwise.

    Returns:
        `[...]`: `||g_a|| (gamma sqrt(1 - cos^2) - cos sqrt(1 - gamma^2)) / (||g_c|| sqrt(1 - gamma^2))` where
        `cos < gamma`. Zero where Algorithm 1 adds nothing to g_a: at `cos >= gamma`, for a zero gradient, and for
        gamma = 1, whose coefficient diverges (`ConflictAware` takes its limit direction instead).
    """
    _check_between("gamma", gamma, 0, 1)
    pair = _measure(gramian)
    coefficient = torch.where(_below(pair, gamma), _toward(pair.adv_norm, pair.clean_norm, pair, gamma), 0.0)
    return _nan_unless(pair.finite, coefficient).to(gramian.dtype)


def update_norm(gramian: Tensor, weights: Tensor) -> Tensor:
    """Norm of the update `weights @ grads`, that is `sqrt(w^T G w)`.

    Args:
        gramian: `[..., 2, 2]`, float32 or float64, order (clean, adversarial).
        weights: `[..., 2]`.

    Returns:
        `[...]`, non-negative, in the Gramian's dtype. Its error is about sqrt(u) times
        `|w_c| ||g_c|| + |w_a| ||g_a||` where the two parts cancel (u: the Gramian's unit roundoff).
        NaN for a non-finite Gramian.
    """
    pair = _measure(gramian)
    norm, _ = _length(pair, *weights.double().unbind(-1))
    return _nan_unless(pair.finite, norm).to(gramian.dtype)


def cancelled(gramian: Tensor, weights: Tensor) -> Tensor:
    """Whether the update vanished although both gradients are nonzero, as in CA-AT at cos = -1.

    The test is `||w @ grads|| <= 16 sqrt(eps) (|w_c| ||g_c|| + |w_a| ||g_a||)` with eps of the Gramian's dtype (5.5e-3
    in float32, 2.4e-7 in float64). Below that the length may be rounding of the Gramian and no measurement: a cosine
    off by a few eps leaves opposite gradients a sine of some sqrt(eps), which CA-AT divides by `sqrt(1 - gamma^2)`.

    Args:
        gramian: `[..., 2, 2]`, float32 or float64, order (clean, adversarial).
        weights: `[..., 2]`.

    Returns:
        `[...]` bool. False for a non-finite Gramian.
    """
    pair = _measure(gramian)
    norm, parts = _length(pair, *weights.double().unbind(-1))
    return (norm <= pair.tolerance * parts) & pair.both & pair.finite


def ascends_adv(gramian: Tensor, weights: Tensor) -> Tensor:
    """Whether a small step against the update raises the adversarial loss: `(G w)[adv] = <update, g_a> < 0`.

    Under CA-AT this happens for `cos < -sqrt(1 - gamma^2)`. An update that `cancelled` marks has no direction left to
    judge and counts as not ascending.

    Args:
        gramian: `[..., 2, 2]`, float32 or float64, order (clean, adversarial).
        weights: `[..., 2]`.

    Returns:
        `[...]` bool. False for a non-finite Gramian.
    """
    pair = _measure(gramian)
    clean_weight, adv_weight = weights.double().unbind(-1)
    along_adv = clean_weight * pair.clean_norm * pair.cos + adv_weight * pair.adv_norm
    norm, parts = _length(pair, clean_weight, adv_weight)
    return (along_adv < 0) & (norm > pair.tolerance * parts) & pair.both & pair.finite


@dataclass(frozen=True)
class Vanilla:
    """Weighted sum of the two losses: `(1 - lam, lam)` (paper, Eq. 2; lam is the weight of the adversarial loss).

    The weights do not depend on the gradients, zero ones included: the update is always the gradient of
    `(1 - lam) L_c + lam L_a`. A non-finite Gramian still gives NaN, so that every method skips the same steps.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        _check_between("lam", self.lam, 0, 1)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        return _weights(pair, torch.full_like(pair.cos, 1 - self.lam), torch.full_like(pair.cos, self.lam))


@dataclass(frozen=True)
class ConflictAware:
    """CA-AT: turn g_a toward g_c until their cosine is gamma (paper, Algorithm 1 and Eq. 4).

    `cos < gamma` gives `(lambda*, 1)`, else `(1, 0)`: at the boundary the update jumps from g_a to g_c, as in
    Algorithm 1 (Eq. 4 has `cos <= gamma`; it differs on the boundary only).

    Where paper and official code are silent or wrong:

    - gamma = 1 is `(1, 0)`, the limit direction; the official code divides by zero there. gamma = 0 projects g_a onto
      the plane normal to g_c (A-GEM, Chaudhry et al. 2018).
    - Zero gradients: clean zero `(0, 1)`, adversarial zero `(1, 0)`, both `(0, 0)`.
    - Opposite gradients (cos = -1) give an update of zero, against the paper's section 4: `g_a + lambda* g_c` with
      `lambda* = ||g_a|| / ||g_c||`. Kept, and marked by `cancelled`.
    - For `cos < -sqrt(1 - gamma^2)` the step raises the adversarial loss to first order. Kept, see `ascends_adv`.

    The length of the update is `||g_a|| sin(angle) / sqrt(1 - gamma^2)` where `cos < gamma`: up to 1.67 `||g_a||` at
    gamma = 0.8, an effective learning rate that the paper does not control for. `rescale` does:

    - "none": as in the paper.
    - "adversarial": scaled to the length `||g_a||` (so a zero g_a gives a zero update).
    - "vanilla": scaled to the length that `Vanilla(0.5)` would have, `||g_c + g_a|| / 2`.

    An update that is zero to rounding (the tolerance of `cancelled`) is not scaled up: it stays zero.
    """

    gamma: float = 0.8
    rescale: Literal["none", "adversarial", "vanilla"] = "none"

    def __post_init__(self) -> None:
        _check_between("gamma", self.gamma, 0, 1)
        if self.rescale not in ("none", "adversarial", "vanilla"):
            raise ValueError(f"rescale should be 'none', 'adversarial' or 'vanilla'. Found rescale = {self.rescale!r}.")

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        below = _below(pair, self.gamma)
        only_adv = (pair.clean_norm == 0) & (pair.adv_norm > 0)
        clean_weight = torch.where(
            below, _toward(pair.adv_norm, pair.clean_norm, pair, self.gamma), (pair.clean_norm > 0).double()
        )
        adv_weight = (below | only_adv).double()

        if self.rescale != "none":
            norm, parts = _length(pair, clean_weight, adv_weight)
            wanted = pair.adv_norm if self.rescale == "adversarial" else _sum_norm(pair) / 2
            factor = torch.where(norm > pair.tolerance * parts, wanted / norm, 1.0)
            clean_weight, adv_weight = factor * clean_weight, factor * adv_weight
        return _weights(pair, clean_weight, adv_weight)


@dataclass(frozen=True)
class PCGrad:
    """Project each gradient off the other where they conflict, and add (Yu et al. 2020, Algorithm 1).

    The sum of the two projected gradients, as in the paper; without conflict (`cos >= 0`) that is `(1, 1)`, so twice
    the update of `Vanilla(0.5)`. With two gradients the paper's random order has nothing to order: deterministic. A
    zero gradient is in conflict with nothing.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        opposed = -pair.cos.clamp(max=0)
        clean_weight = 1 + opposed * _ratio(pair.adv_norm, pair.clean_norm)
        adv_weight = 1 + opposed * _ratio(pair.clean_norm, pair.adv_norm)
        return _weights(pair, clean_weight, adv_weight)


@dataclass(frozen=True)
class MGDA:
    """The shortest convex combination of the two gradients (Desideri 2012; Sener & Koltun 2018, Eq. 4).

    Weights are non-negative with sum 1, from the closed form for two: the point of the segment from g_a to g_c nearest
    to the origin. Where every point is as near (equal gradients, or both zero) the weights are `(1/2, 1/2)`. A zero
    gradient is the shortest combination, so it takes weight 1 and the update is zero: the point is Pareto-stationary.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        return _weights(pair, *_on_segment(pair, 0.0))


@dataclass(frozen=True)
class CAGrad:
    """The update near the mean gradient that helps the worse-off loss most (Liu et al. 2021, Algorithm 1).

    `max_d min_i <g_i, d>` over the ball of radius `c ||g_0||` about the mean gradient `g_0 = (g_c + g_a) / 2`. The
    solution is `d = g_0 + c ||g_0|| g_w / ||g_w||`, where `g_w` is the convex combination of the two gradients that
    minimises `<g_w, g_0> + c ||g_0|| ||g_w||`; for two gradients that has a closed form, used here in place of the
    official code's scipy.optimize and TorchJD's cone solver.

    Not rescaled, as in the paper and in TorchJD (the official code's `rescale=0`; its multi-task runs divide the
    update by `1 + c^2`). c = 0 is the mean gradient, `Vanilla(0.5)`; the paper's convergence to a stationary point of
    the mean loss needs c < 1, a larger c reaches some Pareto-stationary point.

    Where `g_w` is zero the point is Pareto-stationary and the weights are `(0, 0)`, as in TorchJD; that covers a zero
    gradient (for c > 0). Zero means here within the tolerance of `cancelled`, relative and not absolute
    (TorchJD: 1e-4 after normalising).
    """

    c: float = 0.5

    def __post_init__(self) -> None:
        _check_between("c", self.c, 0, math.inf)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        if self.c == 0:
            half = torch.full_like(pair.cos, 0.5)
            return _weights(pair, half, half)

        # On the line of combinations let x be the distance from the foot of the perpendicular dropped from the origin,
        # growing toward g_c, and h that perpendicular. The objective is then slope * x + radius * sqrt(x^2 + h^2) up to
        # a constant, with its minimum at x = -h t / sqrt(1 - t^2), t = slope / radius, if |t| < 1; otherwise it is
        # monotone and the minimum is an end of the segment.
        mean_norm = _sum_norm(pair) / 2
        radius = self.c * mean_norm
        difference = pair.clean_norm - pair.adv_norm
        gap = torch.hypot(pair.clean_norm - pair.adv_norm * pair.cos, pair.adv_norm * pair.sin)  # ||g_c - g_a||
        slope = _ratio(difference, gap) * (pair.clean_norm + pair.adv_norm) / 2  # <g_0, g_c - g_a> / ||g_c - g_a||
        steepness = _ratio(slope, radius)
        inside = steepness.abs() < 1
        tangent = torch.where(inside, steepness, 0.0)
        tangent = tangent / ((1 - tangent) * (1 + tangent)).sqrt()
        clean_share, adv_share = _on_segment(pair, tangent)
        clean_share = torch.where(inside, clean_share, (steepness < 0).double())
        adv_share = torch.where(inside, adv_share, (steepness > 0).double())

        norm, parts = _length(pair, clean_share, adv_share)
        resolved = norm > pair.tolerance * parts
        stretch = _ratio(radius, norm)
        return _weights(
            pair,
            torch.where(resolved, 0.5 + stretch * clean_share, 0.0),
            torch.where(resolved, 0.5 + stretch * adv_share, 0.0),
        )


@dataclass(frozen=True)
class GradVac:
    """Turn each gradient toward the other until their cosine is `target`, and add (Wang et al. 2021).

    The paper's symmetric rule, with its target held FIXED where the paper tracks an exponential moving average of the
    observed cosine (which would make the method stateful). Where `cos < target` each original gradient g_i becomes
    `g_i + lambda_i g_j`, with cosine `target` to the original g_j; otherwise the weights are `(1, 1)`. The sum of the
    two, as in the paper.

    CA-AT is its one-sided form: `ConflictAware(gamma)` turns g_a alone and leaves g_c out of the sum. target = 0 is
    PCGrad; target = -1 is the plain sum; at target = 1 the coefficients diverge and the limit direction is taken,
    each gradient keeping its length and pointing along the other. The default matches CA-AT's. A zero gradient is
    neither turned nor turned toward.
    """

    target: float = 0.8

    def __post_init__(self) -> None:
        _check_between("target", self.target, -1, 1)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights `[..., 2]` of a Gramian `[..., 2, 2]`."""
        pair = _measure(gramian)
        below = (pair.cos < self.target) & pair.both
        if self.target == 1:
            turned_adv = _ratio(pair.adv_norm, pair.clean_norm)  # weight on g_c
            turned_clean = _ratio(pair.clean_norm, pair.adv_norm)  # weight on g_a
        else:
            turned_adv = 1 + _toward(pair.adv_norm, pair.clean_norm, pair, self.target)
            turned_clean = 1 + _toward(pair.clean_norm, pair.adv_norm, pair, self.target)
        return _weights(pair, torch.where(below, turned_adv, 1.0), torch.where(below, turned_clean, 1.0))


Surgery = Vanilla | ConflictAware | PCGrad | MGDA | CAGrad | GradVac
"""Any of the methods. Where one is expected, any callable from `[..., 2, 2]` to `[..., 2]` serves."""

SURGERIES: dict[str, type[Surgery]] = {
    "vanilla": Vanilla,
    "ca-at": ConflictAware,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "gradvac": GradVac,
}
"""The methods by the name that configs and the command line use."""


def make_surgery(name: str, **parameters: Any) -> Surgery:
    """Build a method by its name in `SURGERIES`.

    Args:
        name: a key of `SURGERIES`.
        **parameters: the method's own parameters. None counts as not given.

    Raises:
        ValueError: for an unknown name, a parameter that the method does not have, or a value out of its range.
    """
    if name not in SURGERIES:
        raise ValueError(f"surgery should be one of {', '.join(SURGERIES)}. Found {name!r}.")
    method = SURGERIES[name]
    known = [field.name for field in dataclasses.fields(method)]
    given = {key: value for key, value in parameters.items() if value is not None}
    foreign = [key for key in given if key not in known]
    if foreign:
        raise ValueError(
            f"surgery {name!r} has no parameter {', '.join(repr(key) for key in foreign)}. "
            f"It has {', '.join(known) or 'none'}."
        )
    return method(**given)


class _Pair(NamedTuple):
    """The two gradients as lengths and an angle: all that a rule for two needs. Tensors `[...]`, float64."""

    clean_norm: Tensor
    adv_norm: Tensor
    cos: Tensor
    sin: Tensor
    both: Tensor  # bool: neither gradient is zero
    finite: Tensor  # bool
    tolerance: float  # relative length below which a combination is rounding of the Gramian
    dtype: torch.dtype  # the Gramian's


def _measure(gramian: Tensor) -> _Pair:
    if gramian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gramian should be float32 or better (float32, float64). Found {gramian.dtype}.")
    if gramian.shape[-2:] != (2, 2):
        raise ValueError(f"gramian should have shape [..., 2, 2]. Found {list(gramian.shape)}.")
    wide = gramian.detach().double()
    clean_norm = wide[..., 0, 0].sqrt()
    adv_norm = wide[..., 1, 1].sqrt()
    # The mean of the two off-diagonal entries: a matmul need not round them alike.
    inner = wide[..., 0, 1] / 2 + wide[..., 1, 0] / 2
    cos = _ratio(inner, clean_norm * adv_norm).clamp(-1, 1)  # rounding takes collinear pairs past 1
    sin = ((1 - cos) * (1 + cos)).sqrt()
    both = (clean_norm > 0) & (adv_norm > 0)
    finite = wide.isfinite().flatten(-2).all(-1)
    return _Pair(
        clean_norm, adv_norm, cos, sin, both, finite, 16 * math.sqrt(torch.finfo(gramian.dtype).eps), gramian.dtype
    )


def _weights(pair: _Pair, clean_weight: Tensor, adv_weight: Tensor) -> Tensor:
    """Stack to `[..., 2]` in the Gramian's dtype, NaN where the Gramian was not finite."""
    return torch.stack([_nan_unless(pair.finite, w) for w in (clean_weight, adv_weight)], dim=-1).to(pair.dtype)


def _nan_unless(finite: Tensor, value: Tensor) -> Tensor:
    return torch.where(finite, value, math.nan)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient with 0 where the (non-negative) denominator is 0: a zero gradient contributes nothing."""
    nonzero = denominator != 0
    return torch.where(nonzero, numerator / torch.where(nonzero, denominator, 1.0), 0.0)


def _below(pair: _Pair, gamma: float) -> Tensor:
    """Where Algorithm 1 turns g_a instead of taking g_c."""
    if gamma == 1:  # the limit: g_c alone, also where rounding left the cosine a hair below 1
        return torch.zeros_like(pair.both)
    return (pair.cos < gamma) & pair.both


def _toward(turned_norm: Tensor, other_norm: Tensor, pair: _Pair, target: float) -> Tensor:
    """Coefficient of the other gradient that brings the turned one to cosine `target` with it (target < 1)."""
    if target in (-1, 1):
        return torch.zeros_like(turned_norm)  # never applied: no cosine is below -1, and 1 is the callers' limit case
    target_sin = math.sqrt((1 - target) * (1 + target))
    return _ratio(turned_norm, other_norm) * (target * pair.sin / target_sin - pair.cos)


def _length(pair: _Pair, clean_weight: Tensor, adv_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Length of a combination, and the sum of its two parts' lengths against which its rounding is judged."""
    clean_part = clean_weight * pair.clean_norm
    adv_part = adv_weight * pair.adv_norm
    # Components along and across g_c: unlike w^T G w this can be neither negative nor overflow before its root.
    norm = torch.hypot(clean_part + adv_part * pair.cos, adv_part * pair.sin)
    return norm, clean_part.abs() + adv_part.abs()


def _sum_norm(pair: _Pair) -> Tensor:
    """`||g_c + g_a||`."""
    one = torch.ones_like(pair.cos)
    return _length(pair, one, one)[0]


def _on_segment(pair: _Pair, tangent: Tensor | float) -> tuple[Tensor, Tensor]:
    """Convex weights of the point of the segment from g_a to g_c that is seen from the origin at a given angle.

    `tangent` is that of the angle from the perpendicular onto the segment's line, positive toward g_a; a point past an
    end is moved to that end. `(1/2, 1/2)` where the segment is a point.

    Both weights are computed as such, not one as 1 minus the other: for very unequal norms the small one carries half
    of the update.
    """
    largest = torch.maximum(pair.clean_norm, pair.adv_norm)  # so that the sum of squares below cannot overflow
    clean, adv = _ratio(pair.clean_norm, largest), _ratio(pair.adv_norm, largest)
    clean_share = (adv * (adv - clean * pair.cos - tangent * clean * pair.sin)).clamp(min=0)
    adv_share = (clean * (clean - adv * pair.cos + tangent * adv * pair.sin)).clamp(min=0)
    total = clean_share + adv_share
    point = total == 0
    total = torch.where(point, 1.0, total)
    return torch.where(point, 0.5, clean_share / total), torch.where(point, 0.5, adv_share / total)


def _check_between(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails, and an infinite end is open.
    if not isinstance(value, Real) or not low <= value <= high or math.isinf(value):
        wanted = f"in [{low}, {high}]" if math.isfinite(high) else f"finite and at least {low}"
        raise ValueError(f"{name} should be {wanted}. Found {name} = {value!r}.")
