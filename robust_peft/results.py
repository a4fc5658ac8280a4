"""Numbers of an evaluation with what they are worth: counts, intervals, differences, and fronts of two objectives.

Standard library only, so that a finished run can be read and compared where torch is not installed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

__all__ = [
    "Accuracy",
    "difference_interval",
    "hypervolume",
    "mcnemar_p_value",
    "non_dominated",
    "paired_resolved",
    "resolved",
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


def _check_finite(points: Sequence[tuple[float, float]]) -> None:
    for point in points:
        if len(point) != 2 or not all(math.isfinite(coordinate) for coordinate in point):
            raise ValueError(f"points should be pairs of finite numbers. Found {point!r}.")
