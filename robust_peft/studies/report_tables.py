"""A study's tables: accuracies, hypervolumes, comparisons, cost, audits, failures, and where each number comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from robust_peft.results import wilson_interval
from robust_peft.studies.comparisons import Comparison
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.report_answer import STAGES, interval, p_value
from robust_peft.studies.report_blocks import Cell, Link, Table
from robust_peft.studies.statistics import MethodResult, Panel, SeedResult, panel_name

COST = {  # what training took -> its column, and how the number is shown
    "trainable_parameters": ("trainable parameters", lambda n: f"{n:,.0f}"),
    "bytes_on_disk": ("MB on disk", lambda n: f"{n / 1e6:.3g}"),
    "seconds_per_step": ("s per step", lambda n: f"{n:.3g}"),
    "seconds": ("s of training", lambda n: f"{n:,.0f}"),
    "peak_memory_bytes": ("peak memory, MB", lambda n: f"{n / 1e6:,.0f}"),
}


def link(record: Record, output: Path, text: str) -> Link:
    """A link from the report to a run's folder."""
    return Link(text, Path(os.path.relpath(record.folder, output)).as_posix())


def methods_table(panel: Panel, each: bool, output: Path) -> Table:
    """Accuracies of each method: means over seeds with their intervals, by attack, and the runs they come from."""
    attacks = list(dict.fromkeys(
        (v.attack, v.threat) for method in (*panel.methods, *panel.repeated) for run in method.runs
        for v in _verdicts(run.record, panel) if v.attack != "clean"
    ))  # fmt: skip
    single = len(panel.attacks) == 1
    header = ["method", "standard, %", f"adversarial, %: {worst_case(panel)}"]
    shown = [pair for pair in attacks if not single or pair[0] not in panel.attacks or pair[1] != panel.threat]
    seen: dict[str, int] = {}
    for attack, threat in shown:
        place = seen[threat] = seen.get(threat, -1) + 1
        header.append(f"{attack if each or place == 0 else f'left after {attack}'}, {threat}, %")
    rows = []
    for method in (*panel.methods, *panel.repeated):
        best = any(method in front.best for front in panel.fronts)
        name = f"{method.name} = {method.same_as}" if method.same_as else method.name
        cells: list[Cell] = [f"{name} (non-dominated)" if best else name]
        cells += [_mean_cell(method, axis) for axis in (0, 1)]
        for attack, threat in shown:
            values = [
                v.accuracy.accuracy for run in method.runs for v in _verdicts(run.record, panel)
                if (v.attack, v.threat) == (attack, threat)
            ]  # fmt: skip
            cells.append(f"{100 * fmean(values):.2f}" if values else "")
        cells += [str(len(method.runs)), tuple(link(run.record, output, str(run.seed)) for run in method.runs)]
        rows.append(tuple(cells))
    caption = (
        f"{panel.name}, {STAGES[panel.stage]}: means over seeds with 95 % t-intervals over seeds, {len(panel.samples)} "
        "images each; with one or two seeds the 95 % Wilson interval of the mean over images."
    )
    return Table(caption, (*header, "seeds", "runs by seed"), tuple(rows))


def _mean_cell(method: MethodResult, axis: int) -> str:
    ends = method.intervals[axis]
    if ends is None:  # the seeds share their images: two of them are not twice as many
        total = len(method.runs[0].standard)
        ends = wilson_interval(round(method.mean[axis] * total), total)
    ends = max(ends[0], 0.0), min(ends[1], 1.0)  # Student's interval of few seeds goes beyond what is possible
    return f"{100 * method.mean[axis]:.2f} {interval(ends)}"


def _verdicts(record: Record, panel: Panel) -> tuple[Verdicts, ...]:
    return getattr(record, panel.stage)


def worst_case(panel: Panel) -> str:
    """The attack's name for an axis or a column."""
    *first, last = panel.attacks
    names = f"worst case over {', '.join(first)} and {last}" if first else last
    return f"{names}, {panel.threat}" if panel.threat else names


def hypervolumes_table(panel: Panel) -> Table:
    """Each family's hypervolume: with all its points and, in the search, on as many as the smallest family tried."""
    size = panel.size
    unequal = panel.stage == "measured" and any(front.tries > size for front in panel.fronts)
    rows = []
    for front in panel.fronts:
        best = ", ".join(method.label or method.family for method in front.best)
        cells = [front.family, str(front.tries), str(front.size), best, f"{100 * front.hypervolume():.2f}"]
        rows.append((*cells, *([f"{100 * front.hypervolume(min(size, front.tries)):.2f}"] if unequal else [])))
    equal = [f"expected of {_counted(size, 'setting')}, %"] if unequal else []
    header = ("family", "settings tried", "points here", "non-dominated", "hypervolume, %", *equal)
    caption = (
        f"{panel.name}, {STAGES[panel.stage]}: hypervolume of the means over {_counted(len(panel.seeds), 'seed')}, "
        "above (0, 0), in percent of the unit square."
    )
    more = " The expectation is over all subsets of so many of a family's settings: more settings are more tries."
    return Table(caption + (more if unequal else ""), header, tuple(rows))


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def comparisons_table(caption: str, comparisons: Sequence[Comparison]) -> Table:
    """Differences with everything that their verdicts rest on."""
    exact = any(c.p_seeds is not None for c in comparisons)
    header = (
        "first", "second", "quantity", "points each", "difference", "95 % interval", "drawn anew", "by seed", "p",
        *(["p, sign-flip over seeds"] if exact else []), "Holm's p", "verdict",
    )  # fmt: skip
    rows = [
        (
            c.first, c.second, c.quantity, str(c.size or ("all" if c.quantity == "hypervolume" else "")),
            f"{100 * c.difference:+.2f}", interval(c.interval, sign=True),
            "images and seeds" if c.over_seeds else "images", " ".join(f"{100 * d:+.2f}" for d in c.by_seed),
            p_value(c.p_value), *([p_value(c.p_seeds) if c.p_seeds is not None else ""] if exact else []),
            p_value(c.p_adjusted), c.verdict,
        )
        for c in comparisons
    ]  # fmt: skip
    return Table(caption, header, tuple(rows))


def cost_table(records: Sequence[Record], output: Path) -> Table | None:
    """What each method's training took, means over the panel's runs; None where nothing is known."""
    known = [key for key in COST if any(key in record.training for record in records)]
    if not known:
        return None
    rows = []
    for panel, method in dict.fromkeys((panel_name(record), record.method) for record in records):
        mine = [r for r in records if panel_name(r) == panel and r.method == method and r.training]
        if not mine:
            continue
        cells: list[Cell] = [panel, method]
        for key in known:
            values = [record.training[key] for record in mine if key in record.training]
            cells.append(COST[key][1](fmean(values)) if values else "")
        rows.append((*cells, tuple(link(record, output, str(record.seed)) for record in mine)))
    header = ("panel", "method", *(COST[key][0] for key in known), "runs by seed")
    caption = (
        "What training took, means over runs. Seconds are those of the training loop, as it went: other work of the "
        "machine, such as runs side by side, is in them."
    )
    return Table(caption, header, tuple(rows))


def audit_table(records: Sequence[Record], output: Path) -> Table | None:
    """What the audit said of each run that had one."""
    rows = [
        (panel_name(r), r.method, (link(r, output, f"seed {r.seed}"),), r.audit, ", ".join(r.audit_failures))
        for r in records
        if r.audit is not None
    ]
    header = ("panel", "method", "run", "verdict", "failed checks")
    return Table("Audits of the final measurement's models.", header, tuple(rows)) if rows else None


def failures_table(records: Sequence[Record], output: Path) -> Table | None:
    """Every run that went wrong, with what it said."""
    rows = [
        (panel_name(r), r.method, str(r.seed), _links_of_failure(r, output), r.error or "no error was kept")
        for r in records
        if r.status == "failed" or r.error
    ]
    header = ("panel", "method", "seed", "files", "error")
    return Table("Runs that failed, or whose final measurement did.", header, tuple(rows)) if rows else None


def _links_of_failure(record: Record, output: Path) -> Cell:
    """What there is to look into: a run that failed early has no folder yet."""
    trace = record.folder.parents[1] / "points" / record.folder.name / "error.txt"
    found = [link(record, output, "run")] if record.folder.is_dir() else []
    found += [Link("error.txt", Path(os.path.relpath(trace, output)).as_posix())] if trace.is_file() else []
    return tuple(found)


def missing_table(records: Sequence[Record]) -> Table | None:
    """Runs that are not done and have not failed, and final measurements still to come, by method."""
    left: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        if record.status not in ("done", "failed"):
            status = "not measured yet" if record.status == "trained" else record.status
        elif record.confirmation in ("waiting", "running"):
            status = f"final measurement {record.confirmation}"
        else:
            continue
        left.setdefault((panel_name(record), record.method, status), []).append(str(record.seed))
    rows = [(*key, ", ".join(seeds)) for key, seeds in left.items()]
    return Table("What is still to come.", ("panel", "method", "state", "seeds"), tuple(rows)) if rows else None


def runs_table(panels: Sequence[Panel], records: Sequence[Record], output: Path) -> Table:
    """Every run with its numbers and its folder."""
    results: dict[tuple[Path, str], SeedResult] = {}
    for panel in panels:
        for method in (*panel.methods, *panel.repeated):
            for run in method.runs:
                results[run.record.folder, panel.stage] = run
    rows = []
    for record in records:
        cells: list[Cell] = [panel_name(record), record.method, str(record.seed), record.status]
        for stage in STAGES:
            run = results.get((record.folder, stage))
            cells += ["", ""] if run is None else [f"{100 * value:.2f}" for value in run.accuracies]
        folder = record.folder
        rows.append((*cells, (link(record, output, folder.name),) if folder.is_dir() else folder.name))
    columns = [f"{kind}, {name}, %" for name in STAGES.values() for kind in ("standard", "adversarial")]
    header = ("panel", "method", "seed", "state", *columns, "run folder")
    return Table(f"All {len(records)} runs with their folders.", header, tuple(rows), folded=True)
