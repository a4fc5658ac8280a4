"""A study's report: one page, the same as Markdown, its figures, and all numbers as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from robust_peft.files import write_json, write_text
from robust_peft.plots import plot_seed_fronts
from robust_peft.studies.comparisons import Comparison, Resamples, compare_fronts, compare_methods, representatives
from robust_peft.studies.records import Record
from robust_peft.studies.report_answer import STAGES, answer
from robust_peft.studies.report_blocks import Block, Figure, Paragraph, Section
from robust_peft.studies.report_fronts import points_of
from robust_peft.studies.report_numbers import numbers
from robust_peft.studies.report_origin import commands, environments, origin
from robust_peft.studies.report_page import to_html, to_markdown
from robust_peft.studies.report_tables import (
    audit_table,
    comparisons_table,
    cost_table,
    failures_table,
    hypervolumes_table,
    methods_table,
    missing_table,
    worst_case,
)
from robust_peft.studies.statistics import MethodResult, Panel, panels_of
from robust_peft.studies.study import Study


def write_report(study: Study, records: Sequence[Record], output: str | Path) -> Path:
    """Write what a study found so far: ``report.html``, ``report.md``, ``report.json`` and the figures as SVG.

    The page needs no other file and no network. The same records give the same files.

    Args:
        study: The study.
        records: What is known of its points, finished or not; one for each.
        output: The folder to write into; earlier reports there are replaced.

    Returns:
        The page's path.

    Raises:
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    output = Path(output)
    found = {stage: panels_of(study, records, stage) for stage in STAGES}
    panels = [panel for stage in STAGES for panel in found[stage]]
    fronts, methods = {}, {}
    for panel in panels:
        resamples = Resamples(panel) if panel.samples and len(panel.fronts) > 1 else None
        fronts[panel.name, panel.stage] = compare_fronts(panel, resamples)
        best = _best_of_the_search(panel, found["measured"])
        pairs = [(method, best[0]) for method in best[1:]]
        methods[panel.name, panel.stage] = compare_methods(panel, pairs, resamples)

    whole = [p for p in found["confirmed"] if _complete(p, found["measured"])]
    deciding = {panel.name: panel for panel in (*found["measured"], *whole)}
    first = list(deciding.values())
    sections = [Section("", tuple(answer(study, records, first, {p.name: fronts[p.name, p.stage] for p in first})))]
    names = list(dict.fromkeys(panel.name for panel in panels))
    for stage in reversed(STAGES):  # what decides comes first
        for panel in found[stage]:
            key = (panel.name, stage)
            figure = f"figures/front-{names.index(panel.name) + 1}-{_slug(panel.name)}-{stage}.svg"
            sections.append(_panel_section(study, panel, fronts[key], methods[key], output, figure))
    if study.extra is not None:
        sections += study.extra(study, records, output)
    sections += _other_sections(study, records, panels, output)
    title = f"Study {study.name}"
    made = [{**environment, "runs": folders} for environment, folders in environments(records)]
    found_out = numbers(study, records, panels, fronts, methods, output)
    write_json(output / "report.json", {**found_out, "environments": made, "commands": commands(records)})
    write_text(output / "report.md", to_markdown(title, sections))
    return write_text(output / "report.html", to_html(title, sections, output))


def _complete(confirmed: Panel, searched: Sequence[Panel]) -> bool:
    """Whether the final measurement has every run of every method that the search found to be non-dominated."""
    runs = {run.record.key for method in confirmed.methods for run in method.runs}
    best = [m for panel in searched if panel.name == confirmed.name for front in panel.fronts for m in front.best]
    return all(run.record.key in runs for method in best for run in method.runs)


def _panel_section(
    study: Study,
    panel: Panel,
    fronts: Sequence[Comparison],
    methods: Sequence[Comparison],
    output: Path,
    figure: str,
) -> Section:
    stage = STAGES[panel.stage]
    points = [point for front in panel.fronts for point in points_of(front)]
    plot_seed_fronts(
        points, output / figure, attack=worst_case(panel), title=f"{panel.name}: {stage}", samples=len(panel.samples)
    )
    families = ", ".join(dict.fromkeys(point.family for point in points))
    caption = (
        f"{panel.name}, {stage}. Large marks are means over seeds, small dots single seeds, whiskers 95 % t-intervals "
        "over seeds (three seeds or more). Filled marks are non-dominated within their family and joined by the edge "
        "of the area that they dominate. Points without a label had no room for one; the table has them all."
    )
    alt = f"Standard against adversarial accuracy ({worst_case(panel)}) of {families}."
    blocks: list[Block] = [Figure(figure, alt, caption), *map(Paragraph, _notes(study, panel))]
    measurement = study.confirm if panel.stage == "confirmed" else study.measure
    blocks += [methods_table(panel, measurement is not None and measurement.each, output), hypervolumes_table(panel)]
    if fronts:
        base = panel.fronts[0].family
        blocks.append(comparisons_table(f"{panel.name}, {stage}: fronts against {base}, in points.", fronts))
    if methods:
        chosen = "Of each family the point with the largest product of the two accuracies in the search"
        again = "" if panel.stage == "confirmed" else "; chosen on these very images, which flatters all of them alike"
        blocks.append(comparisons_table(f"{panel.name}, {stage}: methods, in points. {chosen}{again}.", methods))
    return Section(f"{panel.name}: {stage}", tuple(blocks))


def _notes(study: Study, panel: Panel) -> list[str]:
    notes = list(panel.notes)
    for method in panel.repeated:
        notes.append(f"{method.name} is the same training as {method.same_as}, which is counted in its place.")
    if panel.stage == "confirmed":
        notes.append("Measured are the methods that no other of their family beat in the search; all of them count.")
        tried = {f: sum(m.family == f for m in study.methods) for f in dict.fromkeys(m.family for m in study.methods)}
        if len(set(tried.values())) > 1:
            many = ", ".join(f"{family} {count}" for family, count in tried.items())
            notes.append(
                f"They were chosen from different numbers of tries ({many}): compare families of different size by the "
                "search, where the comparison is on equally many points."
            )
    elif len({front.size for front in panel.fronts}) > 1:
        many = ", ".join(f"{front.family} {front.size}" for front in panel.fronts)
        notes.append(
            f"Families differ in their number of points ({many}). Two of them are compared by the hypervolume expected "
            "of as many points as the smaller one has, drawn at random from the larger one's; a family of one point is "
            "compared as a method."
        )
    return notes


def _best_of_the_search(panel: Panel, searched: Sequence[Panel]) -> list[MethodResult]:
    """Each family's representative as the search sees it, where this measurement has it; else as this one does."""
    wanted = {m.name for other in searched if other.name == panel.name for m in representatives(other)}
    found = []
    for front, own in zip(panel.fronts, representatives(panel), strict=True):
        found.append(next((method for method in front.methods if method.name in wanted), own))
    return found


def _other_sections(study: Study, records: Sequence[Record], panels: Sequence[Panel], output: Path) -> list[Section]:
    sections = []
    for title, table in (
        ("Cost", cost_table(records, output)),
        ("Audits", audit_table(records, output)),
        ("Failures", failures_table(records, output)),
        ("Still to come", missing_table(records)),
    ):
        if table is not None:
            sections.append(Section(title, (table,)))
    sections.append(Section("Where the numbers come from", tuple(origin(study, records, panels, output))))
    return sections


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "panel"
