"""What is known of each point of a study, read from its folder without torch, and what is to be done next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from robust_peft.pixel_units import as_number
from robust_peft.results import non_dominated
from robust_peft.studies.store import CONFIRMED, MEASURED, PointFolder
from robust_peft.studies.study import Point, Study

WITHSTOOD = "1"  # as an evaluation's report writes it


@dataclass(frozen=True)
class Finding:
    """What is known of a point.

    Attributes:
        point: The point.
        files: Its files.
        status: "waiting", "running", "trained" (not measured yet), "done" (measured) or "failed".
        error: What went wrong, in one line; also of a point that is done, where its final measurement failed.
        measured: The report of the measurement, or None.
        chosen: Whether it gets the final measurement: True or False once its panel is through, None before.
        confirmed: The report of the final measurement, or None.
        audit: The audit that goes with it, or None.
        confirming: Whether a process is at the final measurement.
    """

    point: Point
    files: PointFolder
    status: str
    error: str | None = None
    measured: dict[str, Any] | None = None
    chosen: bool | None = None
    confirmed: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    confirming: bool = False

    @property
    def to_measure(self) -> bool:
        """Whether it waits for its training or measurement."""
        return self.status in ("waiting", "trained")

    @property
    def to_confirm(self) -> bool:
        """Whether it waits for its final measurement."""
        return bool(self.chosen) and not self.error and not self.confirming and not self._through

    @property
    def left(self) -> bool:
        """Whether there is something to be done for it, by whomever."""
        return self.to_measure or self.status == "running" or self.to_confirm or self.confirming

    @property
    def _through(self) -> bool:
        return self.confirmed is not None and self.audit is not None


def survey(study: Study, output: str | Path) -> list[Finding]:
    """What is known of each point, in the study's order."""
    found = [_look(study, point, PointFolder(output, point)) for point in study.points()]
    if study.confirm is None:
        return [replace(finding, chosen=False) for finding in found]
    chosen: dict[str, set[str] | None] = {}
    repeated = study.repeated()
    for panel in {finding.point.panel_name for finding in found}:
        members = [finding for finding in found if finding.point.panel_name == panel]
        through = all(finding.status in ("done", "failed") for finding in members)
        chosen[panel] = _front(members, repeated) if through else None
    return [_look_again(study, finding, chosen[finding.point.panel_name]) for finding in found]


def _look(study: Study, point: Point, files: PointFolder) -> Finding:
    mismatch = files.mismatch()
    if mismatch is not None:
        return Finding(point, files, "failed", mismatch)
    measured = files.report(MEASURED, study.measure)
    if measured is not None:
        return Finding(point, files, "done", measured=measured)
    error = files.failure("train", None) or files.failure(MEASURED, study.measure)
    if error is not None:  # also of a process that is just about to end; one that tries again forgets it first
        return Finding(point, files, "failed", error)
    if files.busy:
        return Finding(point, files, "running")
    return Finding(point, files, "trained" if files.trained else "waiting")


def _look_again(study: Study, finding: Finding, names: set[str] | None) -> Finding:
    """With the final measurement, as far as the point was chosen for it."""
    if names is None or finding.measured is None or study.confirm is None:
        return replace(finding, chosen=None if names is None else False)
    seeds = study.seeds_of(finding.point.panel)[: study.confirm_seeds]
    if finding.point.method.name not in names or finding.point.seed not in seeds:
        return replace(finding, chosen=False)
    files = finding.files
    confirmed = files.report(CONFIRMED, study.confirm)
    audit = files.read_audit(study.confirm) if study.confirm.audit else {}
    if confirmed is not None and audit is not None:
        return replace(finding, chosen=True, confirmed=confirmed, audit=audit)
    error = files.failure(CONFIRMED, study.confirm)
    confirming = error is None and files.busy
    return replace(finding, chosen=True, confirmed=confirmed, audit=audit, confirming=confirming, error=error)


def _front(members: list[Finding], repeated: Mapping[tuple[str, str], str]) -> set[str]:
    """Names of a panel's methods that no other of their family beats, both accuracies as means over shared seeds."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for finding in members:
        if finding.measured is not None:
            of_method = points.setdefault(finding.point.method.name, {})
            of_method[finding.point.seed] = accuracies(finding.point, finding.measured)
    replaced, shared = counted(repeated, members[0].point.panel_name, points)
    families: dict[str, dict[str, tuple[float, float]]] = {}
    for method in {finding.point.method.name: finding.point.method for finding in members}.values():
        if method.name in points and method.name not in replaced:
            pairs = [points[method.name][seed] for seed in shared or points[method.name]]
            mean = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
            families.setdefault(method.family, {})[method.name] = mean
    return {list(means)[index] for means in families.values() for index in non_dominated(list(means.values()))}


def counted(
    repeated: Mapping[tuple[str, str], str], panel: str, measured: Mapping[str, Collection[int]]
) -> tuple[dict[str, str], tuple[int, ...]]:
    """Which of a panel's methods count, each training once, and on which seeds they are compared.

    Of the methods that train alike the one with the most measured seeds counts, of equals the one that the others
    repeat: so one whose twin failed or was never run stands in for it.

    Args:
        repeated: `Study.repeated` of the study.
        panel: The panel's name.
        measured: Each method's name -> the seeds that it was measured with; methods without any may be absent.

    Returns:
        Each method that does not count -> the one that counts in its place; and the seeds that all measured methods
        that count have, ascending, empty where there is none.
    """
    groups: dict[str, list[str]] = {}
    for (where, name), kept in repeated.items():
        if where == panel:
            groups.setdefault(kept, [kept]).append(name)
    replaced = {}
    for names in groups.values():
        first = max(names, key=lambda name: len(measured.get(name, ())))
        replaced |= {name: first for name in names if name != first}
    seeds = [set(of_method) for name, of_method in measured.items() if of_method and name not in replaced]
    return replaced, tuple(sorted(set.intersection(*seeds))) if seeds else ()


def accuracies(point: Point, report: dict[str, Any]) -> tuple[float, float]:
    """Standard accuracy, and adversarial accuracy: right without an attack and under each with the run's own budget."""
    rows = report["results"]
    (clean,) = [row["verdicts"] for row in rows if "norm" not in row]
    own = (point.config.threat.norm, as_number(point.config.threat.eps))
    attacked = [row["verdicts"] for row in rows if "norm" in row and (row["norm"], row["eps"]) == own]
    withstood = sum(
        all(verdict == WITHSTOOD for verdict in of_sample) for of_sample in zip(clean, *attacked, strict=True)
    )
    return clean.count(WITHSTOOD) / len(clean), withstood / len(clean)
