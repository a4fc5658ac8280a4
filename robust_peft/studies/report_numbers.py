"""All numbers of a report as plain JSON values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_peft.studies.comparisons import Comparison
from robust_peft.studies.records import Record
from robust_peft.studies.statistics import Front, MethodResult, Panel
from robust_peft.studies.study import Study

ByPanel = Mapping[tuple[str, str], Sequence[Comparison]]
"""(panel's name, stage) -> comparisons."""


def numbers(
    study: Study, records: Sequence[Record], panels: Sequence[Panel], fronts: ByPanel, methods: ByPanel, output: Path
) -> dict[str, Any]:
    """Everything that the page shows and the runs' own numbers, as fractions; folders relative to the report."""
    return {
        "study": study.name,
        "question": study.question,
        "reference": [0.0, 0.0],
        "panels": [
            {
                "panel": panel.name,
                "stage": panel.stage,
                "attacks": list(panel.attacks),
                "threat": panel.threat,
                "samples": len(panel.samples),
                "notes": list(panel.notes),
                "seeds": list(panel.seeds),
                "comparable": panel.comparable,
                "equal_size": panel.size,
                "fronts": [_front(front, panel, output) for front in panel.fronts],
                "repeated": [_method(method, output) for method in panel.repeated],
                "comparisons": [_comparison(c) for c in (*fronts[key], *methods[key])],
            }
            for panel in panels
            for key in [(panel.name, panel.stage)]
        ],
        "runs": [_run(record, output) for record in records],
    }


def _front(front: Front, panel: Panel, output: Path) -> dict[str, Any]:
    search = panel.stage == "measured"  # later fewer points are no fewer tries
    return {
        "family": front.family,
        "tries": front.tries,
        "methods": [_method(method, output) for method in front.methods],
        "non_dominated": [method.name for method in front.best],
        "hypervolume": front.hypervolume(),
        "hypervolume_at_equal_size": front.hypervolume(min(panel.size, front.tries)) if search else None,
    }


def _method(method: MethodResult, output: Path) -> dict[str, Any]:
    return {
        "method": method.name,
        "same_as": method.same_as,
        "standard_accuracy": method.mean[0],
        "standard_interval": method.intervals[0],
        "adversarial_accuracy": method.mean[1],
        "adversarial_interval": method.intervals[1],
        "runs": [
            {"seed": run.seed, "standard_accuracy": x, "adversarial_accuracy": y, "folder": _folder(run.record, output)}
            for run, (x, y) in zip(method.runs, method.of_seeds, strict=True)
        ],
    }


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "first": c.first,
        "second": c.second,
        "quantity": c.quantity,
        "tries": c.tries,
        "points": c.size,
        "seeds": list(c.seeds),
        "of_first": c.of_first,
        "of_second": c.of_second,
        "difference": c.difference,
        "by_seed": list(c.by_seed),
        "interval": c.interval,
        "over_seeds": c.over_seeds,
        "p": c.p_value,
        "p_sign_flip": c.p_seeds,
        "p_holm": c.p_adjusted,
        "verdict": c.verdict,
    }


def _run(record: Record, output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"key": record.key, "panel": dict(record.panel), "method": record.method}
    found |= {"seed": record.seed, "folder": _folder(record, output), "status": record.status, "error": record.error}
    for stage in ("measured", "confirmed"):
        found[stage] = [
            {
                "attack": v.attack,
                "threat": v.threat,
                "correct": v.accuracy.correct,
                "total": v.accuracy.total,
                # One letter for each sample, in the order of their numbers: all that the statistics are made from.
                "verdicts": "".join("1" if v.correct[index] else "0" for index in sorted(v.correct)),
            }
            for v in getattr(record, stage)
        ]
    found |= {"audit": record.audit, "audit_failures": list(record.audit_failures)}
    found |= {"confirmation": record.confirmation, "training": dict(record.training)}
    return found


def _folder(record: Record, output: Path) -> str:
    return Path(os.path.relpath(record.folder, output)).as_posix()
