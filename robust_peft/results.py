"""Numbers of an evaluation with what they are worth: counts, intervals, differences, and fronts of two objectives.

Standard library only, so that a finished run can be read and compared where torch is not installed.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

__all__ = [
    "Accuracy",
    "difference_interval",
    "holm",
    "hypervolume",
    "mcnemar_p_value",
    "mean_interval",
    "non_dominated",
    "paired_resolved",
    "resolved",
    "sign_flip_p_value",
    "wilson_interval",
]


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927; no continuity correction).

    It covers the sampling of test images only: not the seed of training, nor an attack that could have been stronger.

    Args:
        correct: successes, from 0 to `total`.
        total: trials, at least 1.
        confidence: two-sided level, in (0, 1).

    Returns:
        (low, high) as fractions, within [0, 1]: the proportions p whose distance from `correct / total` is at most
        `z sqrt(p (1 - p) / total)`.
    """
    _check_counts(correct, total)
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    margin = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # The ends are 0 and 1 exactly at the extremes, where the formula is off by rounding.
    low = 0.0 if correct == 0 else max(0.0, centre - margin)
    high = 1.0 if correct == total else min(1.0, centre + margin)
    return low, high


@dataclass(frozen=True)
class Accuracy:
    """Correct answers out of a number of samples; prints as `58.3 % [55.2, 61.3] (n=1000)`."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        _check_counts(self.correct, self.total)

    @property
    def accuracy(self) -> float:
        """Fraction correct, in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval as fractions."""
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n={self.total})"


def difference_interval(a: Accuracy, b: Accuracy, confidence: float = 0.95) -> tuple[float, float]:
    """Newcombe's hybrid score interval for `a.accuracy - b.accuracy` (Newcombe 1998, method 10).

    For accuracies measured on SEPARATE, independent samples. Two models on the same images are paired: there
    `paired_resolved` is the right test, and usually the sharper one.

    Returns:
        (low, high) as fractions, within [-1, 1].
    """
    difference = a.accuracy - b.accuracy
    a_low, a_high = wilson_interval(a.correct, a.total, confidence)
    b_low, b_high = wilson_interval(b.correct, b.total, confidence)
    low = difference - math.hypot(a.accuracy - a_low, b_high - b.accuracy)
    high = difference + math.hypot(a_high - a.accuracy, b.accuracy - b_low)
    return low, high


def resolved(a: Accuracy, b: Accuracy, confidence: float = 0.95) -> bool:
    """Whether two accuracies measured on SEPARATE samples differ: `difference_interval` excludes zero.

    The level is that of this one comparison: among twenty, one comes out resolved by chance.
    """
    low, high = difference_interval(a, b, confidence)
    return low > 0 or high < 0


def mcnemar_p_value(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test: are two models equally often right on the SAME samples?

    Only samples that exactly one of them got right count. Were the two equally good, each such sample would fall to
    either with probability 1/2 (McNemar 1947, in its exact binomial form).

    Args:
        a_correct: one verdict per sample.
        b_correct: the other model's, in the same order of samples.

    Returns:
        Probability of a split at least as uneven, in (0, 1]; 1 where they never differ.
    """
    if len(a_correct) != len(b_correct) or len(a_correct) == 0:
        raise ValueError(
            "a_correct and b_correct should be the verdicts on the same samples, at least one. "
            f"Found {len(a_correct)} and {len(b_correct)}."
        )
    only_a = sum(bool(a) and not b for a, b in zip(a_correct, b_correct, strict=True))
    only_b = sum(bool(b) and not a for a, b in zip(a_correct, b_correct, strict=True))
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    # Integers: exact, and no float underflows with thousands of discordant samples.
    tail = term = 1
    for k in range(fewer):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def paired_resolved(a_correct: Sequence[bool], b_correct: Sequence[bool], confidence: float = 0.95) -> bool:
    """Whether two models differ on the SAME samples: `mcnemar_p_value` is at most `1 - confidence`.

    The level is that of this one comparison: among twenty, one comes out resolved by chance (at most: the exact test
    errs on the careful side).
    """
    _check_confidence(confidence)
    return mcnemar_p_value(a_correct, b_correct) <= 1 - confidence


FEWEST_SEEDS = 3
"""From so many on a `mean_interval` over seeds is worth showing: that of two is twelve standard errors wide."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t-interval for the mean that the values scatter about, such as accuracies of several seeds.

    Returns:
        (low, high) in the values' unit, not cut off at any bound; None for fewer than two values.
    """
    _check_confidence(confidence)
    _check_numbers("values", values)
    if len(values) < 2:
        return None
    margin = t_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - margin, fmean(values) + margin


def t_quantile(degrees: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence for Student's T with that many degrees of freedom, at least 1."""

    def probability(angle: float) -> float:
        # Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: a finite sum in the angle atan(t / sqrt(degrees)).
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(2 + odd, degrees + 1, 2):
            total += term
            term *= (k - 1) / k * math.cos(angle) ** 2
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact sign-flip test: do paired differences, one for each seed, scatter about zero?

    Were the two methods alike, each difference would come with either sign equally often (Fisher 1935). All 2^n ways
    to choose the signs are counted, none is drawn. n differences cannot give less than 2 / 2^n.

    Args:
        differences: One number for each pair, from 1 to 40 of them.

    Returns:
        Share of the sign choices whose sum is at least as far from zero, in (0, 1].
    """
    _check_numbers("differences", differences)
    if not 1 <= len(differences) <= 40:
        raise ValueError(f"differences should be 1 to 40 numbers. Found {len(differences)}.")
    # Each half's sums by themselves, so that 40 differences make two lists of 2^20 and not one of 2^40.
    half = len(differences) // 2
    first, second = _signed_sums(differences[:half]), _signed_sums(differences[half:])
    # Equal sums differ by rounding; they are to count as equal.
    least = abs(sum(differences)) - 1e-12 * sum(map(abs, differences))
    if least <= 0:
        return 1.0
    extreme = sum(len(second) - bisect_left(second, least - x) + bisect_right(second, -least - x) for x in first)
    return extreme / 2 ** len(differences)


def _signed_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums = [s + value for s in sums] + [s - value for s in sums]
    return sorted(sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the order given.

    Those at most 0.05 can all be called resolved, with a chance of at most 5 % that any of them is so by luck.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, both coordinates maximised.

    A point is dominated by one at least as good in both coordinates and better in one. Equal points do not dominate
    each other: all of them are kept.

    Returns:
        Indices in the order of `points`.
    """
    _check_finite(points)
    front, best = [], -math.inf
    # From the best first coordinate down; of those that share it only the best second ones can stand.
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    for i in order:
        x, y = points[i]
        if y > best or (front and tuple(points[front[-1]]) == (x, y)):
            front.append(i)
            best = y
    return sorted(front)


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area dominated by the points above the reference, both coordinates maximised.

    The union of the rectangles that have `reference` as lower left and a point as upper right corner. A point that is
    not above the reference in both coordinates adds nothing; no points, no area. In squared units of the coordinates
    (for accuracies as fractions with reference (0, 0): between 0 and 1).
    """
    _check_finite([*points, reference])
    area, top = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        if x > reference[0] and y > top:
            area += (x - reference[0]) * (y - top)
            top = y
    return area


def _check_counts(correct: int, total: int) -> None:
    if not isinstance(correct, int) or not isinstance(total, int) or total < 1 or not 0 <= correct <= total:
        raise ValueError(
            "correct and total should be integers with 0 <= correct <= total and total >= 1. "
            f"Found correct = {correct!r}, total = {total!r}."
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence should be in (0, 1). Found confidence = {confidence!r}.")


def _check_numbers(name: str, values: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} should be finite numbers. Found {list(values)!r}.")


def _check_finite(points: Sequence[tuple[float, float]]) -> None:
    for point in points:
        if len(point) != 2 or not all(math.isfinite(coordinate) for coordinate in point):
            raise ValueError(f"points should be pairs of finite numbers. Found {point!r}.")
