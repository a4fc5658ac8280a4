"""Is one family's front better than another's? Differences with intervals over samples and tests over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from robust_peft.results import holm, mean_interval, sign_flip_p_value
from robust_peft.studies.statistics import Front, MethodResult, Panel, expected_hypervolume

RESAMPLES = 4000
LEAST_SEEDS, MOST_SEEDS = 6, 40  # with fewer, no outcome of the exact test over seeds reaches 5 %
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One quantity of two families or methods on the same seeds and the same samples.

    Attributes:
        first: Who is compared.
        second: With whom: differences are first minus second.
        quantity: "hypervolume", "standard accuracy" or "adversarial accuracy"; fractions.
        size: Points of each family that are compared; None for methods.
        seeds: Seeds that both have.
        of_first: The quantity for each of the seeds.
        of_second: The same of the other.
        interval: 95 % bootstrap interval over samples (percentiles) of the mean difference, for these seeds.
        p_samples: Two-sided bootstrap p-value over samples.
        p_seeds: Exact sign-flip p-value over seeds; None for fewer than 6.
        p_adjusted: Holm's adjusted p-value among the comparisons of its table.
    """

    first: str
    second: str
    quantity: str
    size: int | None
    seeds: tuple[int, ...]
    of_first: tuple[float, ...]
    of_second: tuple[float, ...]
    interval: tuple[float, float]
    p_samples: float
    p_seeds: float | None
    p_adjusted: float = 1.0

    @property
    def differences(self) -> tuple[float, ...]:
        """First minus second, for each seed."""
        return tuple(a - b for a, b in zip(self.of_first, self.of_second, strict=True))

    @property
    def difference(self) -> float:
        """Mean over seeds."""
        return fmean(self.differences)

    @property
    def seed_interval(self) -> tuple[float, float] | None:
        """95 % t-interval over seeds of the difference; None for one seed."""
        return mean_interval(self.differences)

    @property
    def p_value(self) -> float:
        """The larger of the two: a difference counts only if neither other images nor other seeds would undo it."""
        return self.p_samples if self.p_seeds is None else max(self.p_samples, self.p_seeds)

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        excludes_zero = self.interval[0] > 0 or self.interval[1] < 0
        if self.p_value > LEVEL or not excludes_zero:
            return "not resolved"
        said = "resolved" if self.p_adjusted <= LEVEL else "resolved alone, not after Holm's correction"
        return said if self.p_seeds is not None else f"{said} (over images only)"

    @property
    def resolved(self) -> bool:
        """Whether it still stands after Holm's correction."""
        return self.verdict.split(" (")[0] == "resolved"


class Resamples:
    """Accuracies of a panel's runs on resampled images, the same images for all of them.

    Args:
        panel: The panel.
        count: How many times the images are drawn anew, with replacement.
        seed: Of the drawing.
    """

    def __init__(self, panel: Panel, count: int = RESAMPLES, seed: int = 0) -> None:
        runs = [run for method in panel.methods for run in method.runs]
        table = [[verdicts[i] for i in panel.samples] for r in runs for verdicts in (r.standard, r.adversarial)]
        correct = np.array(table, dtype=np.float64).T  # [samples, 2 * runs]
        rng = np.random.default_rng(seed)
        total, parts = len(panel.samples), []
        for start in range(0, count, 100):  # a few at a time: 10,000 images and 4,000 draws would be 320 MB
            drawn = rng.integers(total, size=(min(100, count - start), total))
            times = np.stack([np.bincount(row, minlength=total) for row in drawn])
            parts.append(times @ correct / total)
        # Run's key -> [count, 2]
        accuracies = np.concatenate(parts).reshape(count, len(runs), 2)
        self._of_run = {run.record.key: accuracies[:, i] for i, run in enumerate(runs)}
        exact = correct.mean(axis=0).reshape(len(runs), 2)
        self._exact = {run.record.key: exact[i] for i, run in enumerate(runs)}

    def hypervolume(self, front: Front, seed: int, size: int | None) -> tuple[float, np.ndarray]:
        """A seed's hypervolume, and on each resample: array of shape `[count]`."""
        keys = [_key(method, seed) for method in front.methods]
        exact = expected_hypervolume(np.stack([self._exact[key] for key in keys]), size)
        return float(exact), expected_hypervolume(np.stack([self._of_run[key] for key in keys], axis=1), size)

    def accuracy(self, method: MethodResult, seed: int, which: int) -> tuple[float, np.ndarray]:
        """A seed's standard (0) or adversarial (1) accuracy, and on each resample."""
        key = _key(method, seed)
        return float(self._exact[key][which]), self._of_run[key][:, which]


def compare_fronts(panel: Panel, resamples: Resamples | None = None) -> list[Comparison]:
    """Each family's hypervolume against that of the panel's first family, on equally many points.

    In the search the larger of two families counts with the mean over its subsets of the smaller one's size. In the
    final measurement all points count: they were chosen before, and fewer of them is no fewer tries. One point alone is
    no front beside several, so that such pairs are left to `compare_methods`.

    Args:
        panel: The panel.
        resamples: Its resampled accuracies; None: made here.

    Returns:
        One comparison for each other family that has a whole front on a seed together with the first.
    """
    if not panel.samples or len(panel.fronts) < 2:
        return []
    resamples = resamples or Resamples(panel)
    base, found = panel.fronts[0], []
    for front in panel.fronts[1:]:
        size = min(front.size, base.size)
        if is_single(front, base):
            continue

        def measure(which: Front, seed: int, size: int = size) -> tuple[float, np.ndarray]:
            return resamples.hypervolume(which, seed, size if panel.stage == "measured" else None)

        seeds = tuple(sorted(set(front.seeds) & set(base.seeds)))
        shown = size if panel.stage == "measured" else None
        found += _compare(front, base, (front.family, base.family, "hypervolume", shown), seeds, measure)
    return _adjusted(found)


def is_single(front: Front, other: Front) -> bool:
    """Whether one of the two has one point and the other several: how balanced that point is decides, no front."""
    return min(front.size, other.size) == 1 < max(front.size, other.size)


def compare_methods(
    panel: Panel, pairs: Sequence[tuple[MethodResult, MethodResult]], resamples: Resamples | None = None
) -> list[Comparison]:
    """Standard and adversarial accuracy of pairs of methods, on the seeds that both have."""
    if not panel.samples or not pairs:
        return []
    resamples = resamples or Resamples(panel)
    found = []
    for first, second in pairs:
        seeds = tuple(sorted(set(first.seeds) & set(second.seeds)))
        for which, quantity in enumerate(("standard accuracy", "adversarial accuracy")):

            def measure(method: MethodResult, seed: int, which: int = which) -> tuple[float, np.ndarray]:
                return resamples.accuracy(method, seed, which)

            found += _compare(first, second, (first.name, second.name, quantity, None), seeds, measure)
    return _adjusted(found)


def representatives(panel: Panel) -> list[MethodResult]:
    """Of each family the point with the largest area of its own, i.e. product of its two mean accuracies."""
    return [max(front.methods, key=lambda method: method.mean[0] * method.mean[1]) for front in panel.fronts]


def _key(method: MethodResult, seed: int) -> str:
    return method.runs[method.seeds.index(seed)].record.key


def _compare(
    first: Front | MethodResult,
    second: Front | MethodResult,
    names: tuple[str, str, str, int | None],
    seeds: tuple[int, ...],
    measure: Callable[..., tuple[float, np.ndarray]],
) -> list[Comparison]:
    if not seeds:
        return []
    firsts = [measure(first, seed) for seed in seeds]
    seconds = [measure(second, seed) for seed in seeds]
    of_first, of_second = tuple(exact for exact, _ in firsts), tuple(exact for exact, _ in seconds)
    drawn = np.mean([a - b for (_, a), (_, b) in zip(firsts, seconds, strict=True)], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    fewer = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    p_samples = float(min(1.0, 2 * (fewer + 1) / (len(drawn) + 1)))
    differences = [a - b for a, b in zip(of_first, of_second, strict=True)]
    p_seeds = sign_flip_p_value(differences) if LEAST_SEEDS <= len(seeds) <= MOST_SEEDS else None
    interval = (float(low), float(high))
    return [Comparison(*names, seeds, of_first, of_second, interval, p_samples, p_seeds)]


def _adjusted(comparisons: list[Comparison]) -> list[Comparison]:
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [replace(c, p_adjusted=p) for c, p in zip(comparisons, adjusted, strict=True)]
