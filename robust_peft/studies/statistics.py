"""Fronts of a study's panels: points over seeds, who is non-dominated, and how large the dominated area is.

Standard accuracy is counted on clean images. Adversarial accuracy counts the samples that are right without an attack
and withstood every attack of the measurement under the run's own threat model. Hypervolumes are areas above (0, 0), as
fractions of the unit square. What the search measured and what the final measurement found are never mixed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from statistics import fmean
from typing import Literal

import numpy as np

from robust_peft.config import RunConfig, SurgeryConfig, to_dict
from robust_peft.results import hypervolume, mean_interval, non_dominated
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.study import Study

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
        """95 % t-intervals over seeds of the two means; None for one seed."""
        return mean_interval([x for x, _ in self.of_seeds]), mean_interval([y for _, y in self.of_seeds])


@dataclass(frozen=True)
class Front:
    """A family's methods in one panel.

    Attributes:
        family: The family.
        methods: Its measured methods, each training once.
        seeds: Seeds that all of them were measured with, so that each seed has a whole front.
    """

    family: str
    methods: tuple[MethodResult, ...]
    seeds: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.methods)

    @cached_property
    def best(self) -> tuple[MethodResult, ...]:
        """The methods whose means no other of the family beats, by standard accuracy."""
        chosen = [self.methods[i] for i in non_dominated([method.mean for method in self.methods])]
        return tuple(sorted(chosen, key=lambda method: method.mean))

    @property
    def hypervolume_of_means(self) -> float:
        """Area that the means over seeds dominate."""
        return hypervolume([method.mean for method in self.methods])

    def of_seed(self, seed: int) -> list[tuple[float, float]]:
        """The points of one of `seeds`."""
        return [method.of_seeds[method.seeds.index(seed)] for method in self.methods]

    def hypervolumes(self, size: int | None = None) -> tuple[float, ...]:
        """Area that each seed's points dominate; with a size, expected over the subsets of so many points."""
        return tuple(float(expected_hypervolume(np.array(self.of_seed(seed)), size)) for seed in self.seeds)


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
        samples: Indices of the samples that every run was measured on.
        notes: What a reader has to know before comparing.
    """

    name: str
    stage: Stage
    fronts: tuple[Front, ...]
    repeated: tuple[MethodResult, ...]
    attacks: tuple[str, ...]
    threat: str
    samples: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def methods(self) -> tuple[MethodResult, ...]:
        return tuple(method for front in self.fronts for method in front.methods)

    @property
    def size(self) -> int:
        """Points of the smallest front: on so many each the families are compared."""
        return min(front.size for front in self.fronts)


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
    same = _same_training(study)
    names = dict.fromkeys(panel_name(record) for record in records)
    found = [_panel(name, [r for r in records if panel_name(r) == name], stage, same) for name in names]
    return [panel for panel in found if panel is not None]


def panel_name(record: Record) -> str:
    """The record's panel as `robust_peft.studies.study.Point.panel_name` calls it."""
    return ", ".join(record.panel.values()) or "all"


def _panel(name: str, records: list[Record], stage: Stage, same: Mapping[tuple[str, str], str]) -> Panel | None:
    verdicts = {record.key: getattr(record, stage) for record in records}
    done = [record for record in records if len(verdicts[record.key]) > 1]
    if not done:
        return None
    runs = {record.key: _seed_result(record, verdicts[record.key]) for record in done}
    shared = set.intersection(*(set(run.standard) for run in runs.values()))
    notes = []
    largest = max(len(run.standard) for run in runs.values())
    if len(shared) < largest:
        notes.append(f"Runs were measured on different images; comparisons use the {len(shared)} that all have.")
    methods = []
    for method in dict.fromkeys(record.method for record in done):
        mine = sorted((r for r in done if r.method == method), key=lambda record: record.seed)
        of_method = tuple(runs[record.key] for record in mine)
        methods.append(MethodResult(mine[0].family, mine[0].label, of_method, same.get((name, method))))
    counted = [method for method in methods if method.same_as is None]
    fronts = []
    for family in dict.fromkeys(method.family for method in counted):
        members = tuple(method for method in counted if method.family == family)
        whole = set.intersection(*(set(method.seeds) for method in members))
        fronts.append(Front(family, members, tuple(sorted(whole))))
    plans = list(dict.fromkeys((attacks_of(v), threat_of(v)) for v in verdicts.values() if len(v) > 1))
    if len(plans) > 1:
        notes.append(
            "Runs were attacked differently ("
            + "; ".join(f"{', '.join(attacks)}, {threat}" for attacks, threat in plans)
            + "): their adversarial accuracies are no fair comparison."
        )
    threats = " or ".join(dict.fromkeys(threat for _, threat in plans))
    repeated = tuple(method for method in methods if method.same_as is not None)
    samples = tuple(sorted(shared))
    return Panel(name, stage, tuple(fronts), repeated, plans[0][0], threats, samples, tuple(notes))


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


def _same_training(study: Study) -> dict[tuple[str, str], str]:
    """(panel's name, method's name) -> the method that it repeats, for each method that is another by definition."""
    groups: dict[tuple[str, str], dict[str, RunConfig]] = {}
    for point in study.points():
        trained = to_dict(_plain_form(dataclasses.replace(point.config, seed=0)))
        key = (point.panel_name, json.dumps(trained, sort_keys=True))
        groups.setdefault(key, {}).setdefault(point.method.name, point.config)
    found = {}
    for (panel, _), methods in groups.items():
        # The one that says what it is comes first: Vanilla(0) and not CA-AT's gamma 1.
        kept = min(methods, key=lambda name: methods[name].surgery.name != "vanilla")
        found |= {(panel, name): kept for name in methods if name != kept}
    return found


def _plain_form(config: RunConfig) -> RunConfig:
    """CA-AT with gamma 1 as what it is: the adversarial gradient alone, Vanilla(0)."""
    surgery = config.surgery
    limit = surgery.name == "ca-at" and surgery.gamma == 1 and surgery.rescale != "vanilla"
    if limit or (surgery.name == "vanilla" and surgery.lam == 0):
        alone = SurgeryConfig(name="vanilla", lam=0.0)
        return dataclasses.replace(config, surgery=alone, measure_conflict=True)
    return config
