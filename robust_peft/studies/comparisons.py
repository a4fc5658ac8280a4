"""Is one family's front better than another's? Differences with intervals and tests over images and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import numpy as np

from robust_peft.results import holm, sign_flip_p_value, t_quantile
from robust_peft.studies.statistics import Front, MethodResult, Panel, expected_hypervolume

RESAMPLES = 4000
LEAST_SEEDS, MOST_SEEDS = 6, 40  # with fewer, no outcome of the exact test over seeds reaches 5 %
LEVEL = 0.05

Quantity = Callable[[np.ndarray], np.ndarray]
"""Accuracies of a panel's methods, array of shape `[..., methods, 2]`, to one number each, `[...]`."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of two families or methods on the same seeds and the same samples.

    Attributes:
        first: Who is compared.
        second: With whom: differences are first minus second.
        quantity: "hypervolume", "standard accuracy" or "adversarial accuracy"; fractions.
        tries: How many settings each of the two families has in the study; None for methods.
        size: Points of each family that are compared, drawn at random from the larger one; None: all, or methods.
        seeds: Seeds that both have.
        of_first: The quantity of the means over seeds.
        of_second: The same of the other.
        by_seed: The difference for each seed by itself. Of hypervolumes these show the spread and nothing else: the
            area under scattered points is too large.
        interval: 95 % basic bootstrap interval of the difference, which takes out the area's bias.
        p_value: Two-sided p-value of the same bootstrap.
        over_seeds: Whether the bootstrap draws seeds as well as images, with 6 seeds or more; else it speaks of these
            models on other images.
        p_seeds: Exact sign-flip p-value over seeds, for methods' accuracies with 6 seeds or more.
        p_adjusted: Holm's adjustment of ``p_value`` among the comparisons of its table.
    """

    first: str
    second: str
    quantity: str
    tries: tuple[int, int] | None
    size: int | None
    seeds: tuple[int, ...]
    of_first: float
    of_second: float
    by_seed: tuple[float, ...]
    interval: tuple[float, float]
    p_value: float
    over_seeds: bool
    p_seeds: float | None
    p_adjusted: float = 1.0

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.of_first - self.of_second

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        if self.p_value > LEVEL or (self.p_seeds or 0.0) > LEVEL:
            return "not resolved"
        said = "resolved" if self.p_adjusted <= LEVEL else "resolved alone, not after Holm's correction"
        return said if self.over_seeds else f"{said} (for these models, on other images)"

    @property
    def resolved(self) -> bool:
        """Whether it holds for other images and other seeds, after Holm's correction."""
        return self.verdict == "resolved"


class Resamples:
    """Mean accuracies of a panel's methods with images drawn anew, and seeds where there are 6 or more.

    All methods get the same images and the same seeds in a draw. Seeds are drawn by themselves, for all images alike.
    A bootstrap of few seeds is too narrow: their weights are spread by t / z * sqrt(n / (n - 1)), with the quantiles of
    Student's t and of the normal distribution, so that of n seeds alone it would be as wide as Student's interval.

    Args:
        panel: The panel; should be comparable.
        count: How many draws.
        seed: Of the drawing.
    """

    def __init__(self, panel: Panel, count: int = RESAMPLES, seed: int = 0) -> None:
        if not panel.comparable:
            raise ValueError(f"panel should be comparable. Found {panel.name}: {' '.join(panel.notes)}")
        self.names = [method.name for method in panel.methods]
        self.over_seeds = len(panel.seeds) >= LEAST_SEEDS
        runs = [run for method in panel.methods for run in method.runs]
        table = [[verdicts[i] for i in panel.samples] for r in runs for verdicts in (r.standard, r.adversarial)]
        correct = np.array(table, dtype=np.float64).T  # [samples, methods * seeds * 2]
        shape = (len(self.names), len(panel.seeds), 2)
        self.of_seeds = np.moveaxis(correct.mean(axis=0).reshape(shape), 1, 0)  # [seeds, methods, 2]
        weights = self._seed_weights(len(panel.seeds), count, np.random.default_rng([seed, 1]))
        rng, total, parts = np.random.default_rng(seed), len(panel.samples), []
        for start in range(0, count, 100):  # a few at a time: 10,000 images and 4,000 draws would be 320 MB
            drawn = rng.integers(total, size=(min(100, count - start), total))
            times = np.stack([np.bincount(row, minlength=total) for row in drawn])
            accuracies = (times @ correct / total).reshape(-1, *shape)
            parts.append(np.einsum("cmsk,cs->cmk", accuracies, weights[start : start + 100]))
        self.drawn = np.concatenate(parts)  # [count, methods, 2]

    @property
    def exact(self) -> np.ndarray:
        """The means as measured, `[methods, 2]`."""
        return self.of_seeds.mean(axis=0)

    def _seed_weights(self, seeds: int, count: int, rng: np.random.Generator) -> np.ndarray:
        equal = np.full((count, seeds), 1 / seeds)
        if not self.over_seeds:
            return equal
        drawn = rng.multinomial(seeds, equal[0], size=count) / seeds
        spread = t_quantile(seeds - 1, 0.95) / NormalDist().inv_cdf(0.975) * sqrt(seeds / (seeds - 1))
        return equal + spread * (drawn - equal)


def compare_fronts(panel: Panel, resamples: Resamples | None = None) -> list[Comparison]:
    """Each family's hypervolume against that of the panel's first family, on equally many points.

    In the search the larger of two families counts with the mean over its subsets of the smaller one's size, a method
    that failed with (0, 0); families with methods still to come are left out. In the final measurement all points
    count: they were chosen before, and fewer of them is no fewer tries. A family of one setting makes no front, so that
    it is left to `compare_methods`.

    Args:
        panel: The panel.
        resamples: Its resampled accuracies; None: made here.

    Returns:
        One comparison for each other family of several settings; none where the panel is not comparable.
    """
    fronts = [front for front in panel.fronts if not front.pending]
    if not panel.comparable or panel.fronts[0] not in fronts:
        return []
    base, found = panel.fronts[0], []
    for front in fronts[1:]:
        if is_single(front) or is_single(base):
            continue
        resamples = resamples or Resamples(panel)
        size = min(front.tries, base.tries) if panel.stage == "measured" else None
        of_first, of_second = (_area(resamples, which, size) for which in (front, base))
        tries = (front.tries, base.tries)
        found.append(_compare(panel, resamples, front.family, base.family, "hypervolume", of_first, of_second))
        found[-1] = replace(found[-1], tries=tries, size=size)
    return _adjusted(found)


def is_single(front: Front) -> bool:
    """Whether the family has one setting in the study: how balanced that is decides, and it makes no front."""
    return front.tries == 1


def compare_methods(
    panel: Panel, pairs: Sequence[tuple[MethodResult, MethodResult]], resamples: Resamples | None = None
) -> list[Comparison]:
    """Standard and adversarial accuracy of pairs of a panel's methods; none where the panel is not comparable.

    Unbiased only for methods that were not chosen by their figures in this very measurement.
    """
    if not panel.comparable or not pairs:
        return []
    resamples = resamples or Resamples(panel)
    found = []
    for first, second in pairs:
        for which, quantity in enumerate(("standard accuracy", "adversarial accuracy")):
            of_first, of_second = (_accuracy(resamples, method, which) for method in (first, second))
            found.append(_compare(panel, resamples, first.name, second.name, quantity, of_first, of_second))
            if LEAST_SEEDS <= len(panel.seeds) <= MOST_SEEDS:
                found[-1] = replace(found[-1], p_seeds=sign_flip_p_value(found[-1].by_seed))
    return _adjusted(found)


def representatives(panel: Panel) -> list[MethodResult]:
    """Of each family the point with the largest area of its own, i.e. product of its two mean accuracies."""
    return [max(front.methods, key=lambda method: method.mean[0] * method.mean[1]) for front in panel.fronts]


def _area(resamples: Resamples, front: Front, size: int | None) -> Quantity:
    places = [resamples.names.index(method.name) for method in front.methods]
    failed = 0 if size is None else front.tries - front.size

    def area(accuracies: np.ndarray) -> np.ndarray:
        points = np.maximum(accuracies[..., places, :], 0.0)  # spread weights may go below
        if failed:
            points = np.concatenate([points, np.zeros((*points.shape[:-2], failed, 2))], axis=-2)
        return expected_hypervolume(points, size)

    return area


def _accuracy(resamples: Resamples, method: MethodResult, which: int) -> Quantity:
    place = resamples.names.index(method.name)
    return lambda accuracies: accuracies[..., place, which]


def _compare(
    panel: Panel,
    resamples: Resamples,
    first: str,
    second: str,
    quantity: str,
    of_first: Quantity,
    of_second: Quantity,
) -> Comparison:
    def difference(accuracies: np.ndarray) -> np.ndarray:
        return np.round(of_first(accuracies) - of_second(accuracies), 12)  # models that are alike differ by rounding

    found, drawn = float(difference(resamples.exact)), difference(resamples.drawn)
    # The basic interval (Davison and Hinkley 1997, section 5.2): what the draws scatter about is the difference found,
    # and that scatters in the same way about the true one, the bias of an area under scattered points included.
    low, high = np.quantile(drawn, [0.025, 0.975])
    fewer = min(np.sum(drawn <= 2 * found), np.sum(drawn >= 2 * found))
    return Comparison(
        first=first,
        second=second,
        quantity=quantity,
        tries=None,
        size=None,
        seeds=panel.seeds,
        of_first=float(of_first(resamples.exact)),
        of_second=float(of_second(resamples.exact)),
        by_seed=tuple(float(value) for value in difference(resamples.of_seeds)),
        interval=(float(2 * found - high), float(2 * found - low)),
        p_value=float(min(1.0, 2 * (fewer + 1) / (len(drawn) + 1))),
        over_seeds=resamples.over_seeds,
        p_seeds=None,
    )


def _adjusted(comparisons: list[Comparison]) -> list[Comparison]:
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [replace(c, p_adjusted=p) for c, p in zip(comparisons, adjusted, strict=True)]
