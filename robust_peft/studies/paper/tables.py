"""Accuracies under attacks as the paper tabulates them, each computed from run folders and beside the paper's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from robust_peft.results import Accuracy, mean_interval
from robust_peft.studies.paper.published import MEAN, STANDARD, Published
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.report_answer import interval
from robust_peft.studies.report_blocks import Cell, Section, Table
from robust_peft.studies.report_tables import link
from robust_peft.studies.statistics import panel_name

WORST = "worst case of these"


@dataclass(frozen=True)
class Column:
    """One attack of a table.

    Attributes:
        title: The paper's name for it.
        attack: Its name here, without a number of steps, which differs between scales.
        threat: Its threat model, e.g. "L2 0.5"; empty where each row has its own.
    """

    title: str
    attack: str
    threat: str = ""


def attack_section(
    title: str,
    records: Sequence[Record],
    output: Path,
    columns: Sequence[Column],
    published: Published,
    *,
    threats: Sequence[str] = ("",),
    mean: bool = False,
) -> list[Section]:
    """A table of accuracies: a row for each panel, method and threat model, a column for each attack.

    Args:
        title: The paper's name of the table and what it shows.
        records: What is known of the study's points; only what is measured is shown.
        output: The report's folder.
        columns: The attacks; one that was not tried has no column.
        published: The paper's numbers.
        threats: Threat models of the rows, e.g. ("L-inf 8/255", "L-inf 16/255"); ("",) where the columns name them.
            Rows with one also get the worst case over their columns.
        mean: Whether to add the mean over the columns, which is no measure of robustness, as the paper does.

    Returns:
        One section; none where nothing was measured.
    """
    done = [record for record in records if record.measured]
    tried = {(short(v.attack), v.threat) for record in done for v in record.measured}
    shown = [c for c in columns if any((c.attack, c.threat or threat) in tried for threat in threats)]
    by_threat = tuple(threats) != ("",)
    rows = []
    for panel, method in dict.fromkeys((panel_name(record), record.method) for record in done):
        runs = [record for record in done if (panel_name(record), record.method) == (panel, method)]
        for threat in threats:
            of_paper = published.get((panel, method, threat), {})
            accuracies = {STANDARD: [_find(run, "clean", "") for run in runs]}
            accuracies |= {c.title: [_find(run, c.attack, c.threat or threat) for run in runs] for c in shown}
            cells: list[Cell] = [panel, method]
            cells += [threat] if by_threat else []
            cells += [_cell(found, of_paper.get(name)) for name, found in accuracies.items()]
            if by_threat:
                cells.append(_cell([_worst(run, shown, threat) for run in runs], None))
            if mean:
                cells.append(_mean_cell([accuracies[c.title] for c in shown], of_paper.get(MEAN)))
            rows.append((*cells, tuple(link(run, output, str(run.seed)) for run in runs)))
    if not rows:
        return []
    titles = [f"{c.title}, {c.threat}, %" if c.threat else f"{c.title}, %" for c in shown]
    header = ("panel", "method", *(("threat model",) if by_threat else ()), f"{STANDARD}, %", *titles)
    header += ((f"{WORST}, %",) if by_threat else ()) + ((f"{MEAN}, %",) if mean else ()) + ("runs by seed",)
    total = max(v.accuracy.total for record in done for v in record.measured)
    caption = (
        f"Each attack by itself, on {total} images; in brackets the 95 % Wilson interval over images, with several "
        "seeds their mean and its 95 % t-interval. The paper's own figure follows where it prints one: another "
        "evaluation, in which attacks were weaker."
    )
    return [Section(title, (Table(caption, header, tuple(rows)),))]


def short(attack: str) -> str:
    """An attack's name without a number of steps: "pgd-100" is "pgd"."""
    return re.sub(r"-\d+$", "", attack)


def _find(record: Record, attack: str, threat: str) -> Accuracy | None:
    found = _verdicts(record, attack, threat)
    return None if found is None else found.accuracy


def _verdicts(record: Record, attack: str, threat: str) -> Verdicts | None:
    return next((v for v in record.measured if (short(v.attack), v.threat) == (attack, threat)), None)


def _worst(record: Record, columns: Sequence[Column], threat: str) -> Accuracy | None:
    """Images that are right without an attack and withstood all of a row's attacks."""
    attacked = [v for c in columns if (v := _verdicts(record, c.attack, c.threat or threat)) is not None]
    clean = _verdicts(record, "clean", "")
    if clean is None or not attacked:
        return None
    right = [i for i in clean.correct if clean.correct[i] and all(v.correct[i] for v in attacked)]
    return Accuracy(len(right), len(clean.correct))


def _cell(found: Sequence[Accuracy | None], of_paper: float | None) -> str:
    """Mean over seeds with an interval, and the paper's figure."""
    known = [accuracy for accuracy in found if accuracy is not None]
    if not known:
        return ""
    shares = [accuracy.accuracy for accuracy in known]
    ends = known[0].interval if len(known) == 1 else mean_interval(shares)
    return f"{100 * fmean(shares):.2f} {interval(ends)}{_beside(of_paper)}"


def _mean_cell(columns: Sequence[Sequence[Accuracy | None]], of_paper: float | None) -> str:
    means = [fmean(a.accuracy for a in column if a) for column in columns if any(column)]
    return f"{100 * fmean(means):.2f}{_beside(of_paper)}" if means else ""


def _beside(of_paper: float | None) -> str:
    return "" if of_paper is None else f" (paper: {100 * of_paper:.2f})"
