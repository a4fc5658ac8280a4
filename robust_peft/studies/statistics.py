"""Fronts of a study's panels: points over seeds, who is non-dominated, and how large the dominated area is.

Standard accuracy is counted on clean images. Adversarial accuracy counts the samples that are right without an attack
and withstood every attack of the measurement under the run's own threat model. Hypervolumes are areas above (0, 0) that
the means over seeds dominate, as fractions of the unit square: a single seed's points scatter more, and the area under
the best of many scattered points is larger than that under their means. What the search measured and what the final
measurement found are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import comb
from statistics import fmean
from typing import Literal

import numpy as np

from robust_peft.results import FEWEST_SEEDS, mean_interval, non_dominated
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.study import Study
from robust_peft.studies.survey import counted

Stage = Literal["measured", "confirmed"]


@dataclass(frozen=True)
class SeedResult:
    """One run, measured.

    Attributes:
        record: Where it comes from.
        standard: Sample index to whether the model is right.
        adversarial: Sample index to whether it stays right under every attack.
    """

    record: Record
    standard: Mapping[int, bool]
    adversarial: Mapping[int, bool]

    @property
    def seed(self) -> int:
        return self.record.seed

    @property
    def accuracies(self) -> tuple[float, float]:
        """Standard and adversarial accuracy, as fractions."""
        return fmean(self.standard.values()), fmean(self.adversarial.values())


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds: a point of a front.

    Attributes:
        family: Its family.
        label: What tells it from the family's others.
        runs: Its measured runs, by seed.
        same_as: Another method that is the same training under another name and is counted in its place, or None.
    """

    family: str
    label: str
    runs: tuple[SeedResult, ...]
    same_as: str | None = None

    @property
    def name(self) -> str:
        return f"{self.family} ({self.label})" if self.label else self.family

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @cached_property
    def of_seeds(self) -> tuple[tuple[float, float], ...]:
        """Standard and adversarial accuracy of each seed."""
        return tuple(run.accuracies for run in self.runs)

    @property
    def mean(self) -> tuple[float, float]:
        """Mean over seeds of standard and adversarial accuracy."""
        return fmean(x for x, _ in self.of_seeds), fmean(y for _, y in self.of_seeds)

    @property
    def intervals(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """95 % t-intervals over seeds of the two means; None for fewer than three seeds."""
        if len(self.runs) < FEWEST_SEEDS:
            return None, None
        return mean_interval([x for x, _ in self.of_seeds]), mean_interval([y for _, y in self.of_seeds])


@dataclass(frozen=True)
class Front:
    """A family's methods in one panel.

    Attributes:
        family: The family.
        methods: Its measured methods, each training once.
        tries: Methods of the family in the study, each training once, measured or not.
        pending: Names of those that have neither a result nor failed for good.
    """

    family: str
    methods: tuple[MethodResult, ...]
    tries: int
    pending: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.methods)

    @cached_property
    def best(self) -> tuple[MethodResult, ...]:
        """The methods whose means no other of the family beats, by standard accuracy."""
        chosen = [self.methods[i] for i in non_dominated([method.mean for method in self.methods])]
        return tuple(sorted(chosen, key=lambda method: method.mean))

    def hypervolume(self, size: int | None = None) -> float:
        """Area that the means dominate; with a size, expected of so many settings drawn at random.

        Args:
            size: From 1 to ``tries``; settings without a model count as (0, 0) then. None: all points.
        """
        points = [method.mean for method in self.methods]
        if size is not None:
            points += [(0.0, 0.0)] * (self.tries - self.size)
        return float(expected_hypervolume(np.array(points), size))

    def dominated_by(self, other: Front) -> tuple[MethodResult, ...]:
        """The methods whose means one of the other front's means beats, as measured and without any test."""
        theirs = [method.mean for method in other.methods]
        return tuple(
            method
            for method in self.methods
            if any(x >= method.mean[0] and y >= method.mean[1] and (x, y) != method.mean for x, y in theirs)
        )


@dataclass(frozen=True)
class Panel:
    """One panel of a study in one measurement.

    Attributes:
        name: Its labels, e.g. "MNIST"; "all" where the study has no axes.
        stage: "measured" or "confirmed".
        fronts: The families with anything measured, in the study's order.
        repeated: Methods that are another one's training under a second name, outside the fronts.
        attacks: The attacks that the adversarial accuracy is the worst case over.
        threat: Their threat model; several where the panel's runs differ.
        seeds: Seeds that every method of the fronts was measured with; all of its figures are of these. Empty where
            there is none: then each method is shown with the seeds that it has, and nothing is compared.
        samples: Indices of the samples that every run was measured on.
        comparable: Whether all runs faced the same attacks on the same images, and share a seed.
        notes: What a reader has to know before comparing.
    """

    name: str
    stage: Stage
    fronts: tuple[Front, ...]
    repeated: tuple[MethodResult, ...]
    attacks: tuple[str, ...]
    threat: str
    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    comparable: bool
    notes: tuple[str, ...]

    @property
    def methods(self) -> tuple[MethodResult, ...]:
        return tuple(method for front in self.fronts for method in front.methods)

    @property
    def size(self) -> int:
        """Settings of the smallest family, families of one left out: so many points each make equal terms."""
        return min((front.tries for front in self.fronts if front.tries > 1), default=1)


def expected_hypervolume(points: np.ndarray, size: int | None = None) -> np.ndarray:
    """Mean hypervolume, above (0, 0), of a set's subsets of one size; all subsets count alike.

    So a family with more points can be compared with a smaller one: taking its best subset would reward it for having
    had more tries. In closed form: a place that m of P points dominate is missed by a subset of k points with
    probability C(P - m, k) / C(P, k).

    Args:
        points: Array of shape `[..., P, 2]`, not negative.
        size: k, from 1 to P; None: P, the hypervolume of all of them.

    Returns:
        Array of shape `[...]`.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim < 2 or points.shape[-1] != 2 or points.shape[-2] == 0 or not (points >= 0).all():
        raise ValueError(f"points should be of shape [..., P, 2] and not negative. Found shape {points.shape}.")
    count = points.shape[-2]
    drawn = count if size is None else size
    if not 1 <= drawn <= count:
        raise ValueError(f"size should be from 1 to {count}. Found size = {size!r}.")
    hit = 1 - np.array([comb(count - m, drawn) / comb(count, drawn) for m in range(1, count + 1)])
    order = np.argsort(-points[..., 0], axis=-1, kind="stable")
    x = np.take_along_axis(points[..., 0], order, axis=-1)
    y = np.take_along_axis(points[..., 1], order, axis=-1)
    edges = np.concatenate([x, np.zeros_like(x[..., :1])], axis=-1)
    area = np.zeros(points.shape[:-2])
    for i in range(count):  # the strip left of the i-th largest x, which i + 1 points reach
        heights = np.concatenate([-np.sort(-y[..., : i + 1], axis=-1), np.zeros_like(y[..., :1])], axis=-1)
        area += (edges[..., i] - edges[..., i + 1]) * ((heights[..., :-1] - heights[..., 1:]) @ hit[: i + 1])
    return area


def panels_of(study: Study, records: Sequence[Record], stage: Stage) -> list[Panel]:
    """The panels of a study in which anything was measured, with their fronts.

    Args:
        study: The study.
        records: What is known of its points.
        stage: "measured" for what every point gets, "confirmed" for the final measurement.
    """
    repeated = study.repeated()
    names = dict.fromkeys(panel_name(record) for record in records)
    found = [_panel(name, [r for r in records if panel_name(r) == name], stage, repeated) for name in names]
    return [panel for panel in found if panel is not None]


def panel_name(record: Record) -> str:
    """The record's panel as `robust_peft.studies.study.Point.panel_name` calls it."""
    return ", ".join(record.panel.values()) or "all"


def _panel(name: str, records: list[Record], stage: Stage, repeated: Mapping[tuple[str, str], str]) -> Panel | None:
    done = [record for record in records if len(verdicts_of(record, stage)) > 1]
    if not done:
        return None
    # The search says what counts; the final measurement has less of it, and maybe fewer seeds.
    same, seeds = counted(repeated, name, _measured_seeds(records, "measured"))
    if stage == "confirmed":
        of_methods = {m: s for m, s in _measured_seeds(records, stage).items() if m not in same}
        seeds = counted({}, name, of_methods)[1]
    methods = []
    for method in dict.fromkeys(record.method for record in done):
        mine = sorted((r for r in done if r.method == method), key=lambda record: record.seed)
        runs = tuple(_seed_result(record, verdicts_of(record, stage)) for record in mine)
        methods.append(MethodResult(mine[0].family, mine[0].label, runs, same.get(method)))
    notes = [*_seed_notes(methods, seeds), *_version_notes(done, stage)]
    if seeds:
        kept = [replace(m, runs=tuple(run for run in m.runs if run.seed in seeds)) for m in methods]
        methods = [method for method in kept if method.runs]  # of the repeated ones some may have none
    fronts = _fronts(records, [method for method in methods if method.same_as is None], set(same), stage)
    failed = [f"{f.family} {n}" for f in fronts if (n := f.tries - f.size - len(f.pending)) and stage == "measured"]
    if failed:
        notes.append(f"Methods without a single model count as tries that reached nothing: {', '.join(failed)}.")
    runs = [run for method in methods for run in method.runs]
    shared = set.intersection(*(set(run.standard) for run in runs))
    if len(shared) < max(len(run.standard) for run in runs):
        notes.append(f"Runs were measured on different images; comparisons use the {len(shared)} that all have.")
    plans = list(dict.fromkeys((attacks_of(v), threat_of(v)) for v in (verdicts_of(r, stage) for r in done)))
    if len(plans) > 1:
        notes.append(
            "Runs were attacked differently ("
            + "; ".join(f"{', '.join(attacks)}, {threat}" for attacks, threat in plans)
            + "): their adversarial accuracies are no fair comparison, so that none is made."
        )
    contents = {record.images[stage] for record in done if stage in record.images}
    if len(contents) > 1:
        notes.append("Runs were measured on images of different content, so that they are not compared.")
    return Panel(
        name, stage, tuple(fronts), tuple(method for method in methods if method.same_as is not None),
        plans[0][0], " or ".join(dict.fromkeys(threat for _, threat in plans)), seeds, tuple(sorted(shared)),
        len(plans) == 1 and len(contents) < 2 and bool(seeds) and bool(shared), tuple(notes),
    )  # fmt: skip


def _measured_seeds(records: Sequence[Record], stage: Stage) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for record in records:
        if len(verdicts_of(record, stage)) > 1:
            found.setdefault(record.method, set()).add(record.seed)
    return found


def _seed_notes(methods: Sequence[MethodResult], seeds: tuple[int, ...]) -> list[str]:
    of_fronts = [method for method in methods if method.same_as is None]
    others = sorted({seed for method in of_fronts for seed in method.seeds} - set(seeds))
    if not others:
        return []
    if not seeds:
        return ["No seed has all methods, so that nothing is compared; each is shown with the seeds that it has."]
    lacking = [method.name for method in of_fronts if not set(others) <= set(method.seeds)]
    few = ", ".join(lacking) if len(lacking) < 4 else f"{len(lacking)} methods"
    without = f"without seed{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
    return [f"Shown are the seeds that all methods have; {few} {'is' if len(lacking) == 1 else 'are'} {without}."]


def _version_notes(records: Sequence[Record], stage: Stage) -> list[str]:
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.versions.get(stage, {}).items():
            found.setdefault(package, set()).add(version)
    mixed = [f"{package} {' and '.join(sorted(each))}" for package, each in found.items() if len(each) > 1]
    return [f"Runs were measured with different versions: {', '.join(mixed)}."] if mixed else []


def _fronts(records: Sequence[Record], methods: Sequence[MethodResult], repeats: set[str], stage: Stage) -> list[Front]:
    fronts = []
    for family in dict.fromkeys(method.family for method in methods):
        members = tuple(method for method in methods if method.family == family)
        names = dict.fromkeys(r.method for r in records if r.family == family and r.method not in repeats)
        missing = [name for name in names if name not in {method.name for method in members} and stage == "measured"]
        pending = [m for m in missing if any(r.method == m and r.status != "failed" for r in records)]
        fronts.append(Front(family, members, len(names), tuple(pending)))
    return fronts


def verdicts_of(record: Record, stage: Stage) -> tuple[Verdicts, ...]:
    """A run's verdicts in one of the measurements."""
    return record.measured if stage == "measured" else record.confirmed


def attacks_of(verdicts: Sequence[Verdicts]) -> tuple[str, ...]:
    """The attacks under the run's own threat model, which a measurement lists before other budgets."""
    return tuple(v.attack for v in verdicts if v.attack != "clean" and v.threat == threat_of(verdicts))


def threat_of(verdicts: Sequence[Verdicts]) -> str:
    """The run's own threat model in words: that of the first attack."""
    return next(v.threat for v in verdicts if v.attack != "clean")


def _seed_result(record: Record, verdicts: Sequence[Verdicts]) -> SeedResult:
    (clean,) = [v for v in verdicts if v.attack == "clean"]
    own = [v for v in verdicts if v.attack != "clean" and v.threat == threat_of(verdicts)]
    # Right throughout, whether the attacks were tried on every sample or only on what the one before left standing.
    withstood = {i: right and all(v.correct[i] for v in own) for i, right in clean.correct.items()}
    return SeedResult(record, clean.correct, withstood)
