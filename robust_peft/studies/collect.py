"""From a study's folder to the table that fronts, statistics and reports are made from; without torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from robust_peft.files import read_json
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.store import PointFolder
from robust_peft.studies.study import Study
from robust_peft.studies.survey import WITHSTOOD, Finding, survey


def collect(study: Study, output: str | Path) -> list[Record]:
    """One record for each point of the study, in its order, finished or not.

    Args:
        study: The study.
        output: Its folder; need not exist yet.
    """
    return [_record(finding) for finding in survey(study, output)]


def _record(finding: Finding) -> Record:
    point, audit = finding.point, finding.audit or {}
    reports = {"measured": finding.measured or {}, "confirmed": finding.confirmed or {}}
    return Record(
        key=point.key,
        panel=dict(point.panel),
        family=point.method.family,
        label=point.method.label,
        seed=point.seed,
        folder=finding.files.run,
        status=finding.status,
        error=finding.error,
        measured=_verdicts(finding.measured),
        confirmed=_verdicts(finding.confirmed),
        audit=_audit_status(audit),
        audit_failures=tuple(check["name"] for check in audit.get("checks", ()) if check["status"] == "failed"),
        confirmation=_confirmation(finding),
        versions={stage: found["versions"] for stage, found in reports.items() if found.get("versions")},
        images={stage: found["images_sha256"] for stage, found in reports.items() if found.get("images_sha256")},
        training=training_of(finding.files),
    )


def _confirmation(finding: Finding) -> str | None:
    """How far the final measurement is (`robust_peft.studies.records.Record.confirmation`)."""
    if not finding.chosen:
        return None
    if finding.confirmed is not None and finding.audit is not None:
        return "done"
    return "running" if finding.confirming else "failed" if finding.error else "waiting"


def _verdicts(report: dict[str, Any] | None) -> tuple[Verdicts, ...]:
    found = []
    for row in () if report is None else report["results"]:
        correct = {index: verdict == WITHSTOOD for index, verdict in enumerate(row["verdicts"])}
        found.append(Verdicts(row["attack"], row.get("threat", ""), correct))
    return tuple(found)


def _audit_status(audit: dict[str, Any]) -> str | None:
    statuses = {check["status"] for check in audit.get("checks", ())}
    if not statuses:
        return None
    return "failed" if "failed" in statuses else "warnings" if "warning" in statuses else "passed"


def training_of(files: PointFolder) -> dict[str, float]:
    """What training took, as far as known (`robust_peft.studies.records.Record.training`)."""
    if not files.trained:
        return {}
    found: dict[str, float] = dict(read_json(files.run / "evaluation.json")["training"])
    steps = []
    with suppress(FileNotFoundError):
        for line in (files.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "images_per_second" in record:
                steps.append(record["images"] / record["images_per_second"])
    if steps:
        found["seconds_per_step"] = median(steps)
    with suppress(FileNotFoundError):
        found["peak_memory_bytes"] = read_json(files.notes / "memory.json")["peak_memory_bytes"]
    return found
