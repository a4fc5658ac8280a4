"""Where a report's numbers come from: measurements, software, hardware, commands and run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_peft.files import read_json
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Block, Code, Items, Paragraph, Table
from robust_peft.studies.report_tables import runs_table
from robust_peft.studies.statistics import Panel
from robust_peft.studies.store import other_runs, others_said
from robust_peft.studies.study import Study

MOST_COMMANDS = 10  # on the page; report.json has them all


def origin(study: Study, records: Sequence[Record], panels: Sequence[Panel], output: Path) -> list[Block]:
    """Seeds, measurements, software, hardware, commands, and all runs with their folders."""
    seeds = ", ".join(map(str, sorted({record.seed for record in records})))
    plans = [f"Seeds: {seeds}."]
    for name, plan in (("Search", study.measure), ("Final measurement", study.confirm)):
        if plan is not None:
            images = "all images" if plan.limit is None else f"at most the first {plan.limit} images"
            each = ", each attack on every image" if plan.each else ""
            budgets = f"; at the run's own budget and at {', '.join(plan.eps)}" if plan.eps else ""
            plans.append(f"{name}: {', '.join(plan.attacks)} on {images} of the {plan.split} split{each}{budgets}.")
    blocks: list[Block] = [Items(tuple(plans))]
    if records and (others := other_runs(study, records[0].folder.parents[1])):
        blocks.append(Paragraph(others_said(len(others))))
    made = environments(records)
    if made:
        merged: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        for environment, folders in made:
            versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
            cells = [str(environment.get(key) or "") for key in ("device", "processes", "precision", "python")]
            merged.setdefault((*cells, versions), []).append((environment.get("commit") or "", len(folders)))
        rows = []
        for cells, commits in merged.items():
            # The code often moves on while a study runs; what else it ran with is told once.
            said = ", ".join(f"{name} ({runs})" if len(commits) > 1 else name for name, runs in commits if name)
            rows.append((str(sum(runs for _, runs in commits)), *cells, said))
        header = ("runs", "device", "processes", "precision", "Python", "versions", "commit")
        blocks.append(Table("What the runs were made with.", header, tuple(rows)))
        typed = commands(records)
        more = (f"... and {len(typed) - MOST_COMMANDS} more in report.json",) if len(typed) > MOST_COMMANDS else ()
        blocks += [Paragraph("Commands:"), Code((*typed[:MOST_COMMANDS], *more))] if typed else []
    return [*blocks, runs_table(panels, records, output)]


def descriptions(records: Sequence[Record]) -> dict[Path, dict[str, Any]]:
    """Run folder -> what its config.json says, for the runs that have one."""
    found = {}
    for record in records:
        path = record.folder / "config.json"
        if path.is_file():
            found[record.folder] = read_json(path)
    return found


def environments(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[str]]]:
    """What runs were made with, each different one with the names of its run folders."""
    keys = ("device", "processes", "precision", "python", "versions", "commit")
    found: list[tuple[dict[str, Any], list[str]]] = []
    for folder, description in descriptions(records).items():
        environment = {name: description.get(name) for name in keys}
        environment["versions"] = environment["versions"] or {}
        for other, names in found:
            if other == environment:
                names.append(folder.name)
                break
        else:
            found.append((environment, [folder.name]))
    return found


def commands(records: Sequence[Record]) -> list[str]:
    """The commands that the runs were started with, each once."""
    return list(dict.fromkeys(found["command"] for found in descriptions(records).values() if found.get("command")))
