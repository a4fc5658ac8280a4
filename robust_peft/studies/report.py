"""A study's report: one page, the same as Markdown, its figures, and all numbers as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from robust_peft.files import write_json, write_text
from robust_peft.plots import plot_seed_fronts
from robust_peft.studies.comparisons import (
    LEVEL,
    Comparison,
    Resamples,
    compare_fronts,
    compare_methods,
    representatives,
)
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
from robust_peft.studies.report_training import trained_with, training_section
from robust_peft.studies.statistics import MethodResult, Panel, Stage, panels_of
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
    found: dict[Stage, list[Panel]] = {stage: panels_of(study, records, stage) for stage in STAGES}
    panels = [panel for stage in STAGES for panel in found[stage]]
    fronts, methods = {}, {}
    for panel in panels:
        resamples = Resamples(panel) if panel.comparable and len(panel.fronts) > 1 else None
        fronts[panel.name, panel.stage] = compare_fronts(panel, resamples)
        methods[panel.name, panel.stage] = compare_methods(panel, _pairs(panel, found["measured"]), resamples)
    sections = [Section("", tuple(answer(study, records, found, fronts)))]
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
    found_out |= {"trained_with": asdict(trained_with(study))}
    write_json(output / "report.json", {**found_out, "environments": made, "commands": commands(records)})
    write_text(output / "report.md", to_markdown(title, sections))
    return write_text(output / "report.html", to_html(title, sections, output))


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
    families = "; ".join(dict.fromkeys(point.family for point in points))
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
        blocks.append(comparisons_table(f"{panel.name}, {stage}: methods, in points. {_choice(panel)}", methods))
        if unreachable := _unreachable(methods):
            blocks.append(Paragraph(unreachable))
    return Section(f"{panel.name}: {stage}", tuple(blocks))


def _notes(study: Study, panel: Panel) -> list[str]:
    notes = list(panel.notes)
    for method in panel.repeated:
        notes.append(f"{method.name} is the same training as {method.same_as}, which is counted in its place.")
    tries = {front.family: front.tries for front in panel.fronts}
    several = {count for count in tries.values() if count > 1}
    many = ", ".join(f"{family} {count}" for family, count in tries.items())
    if panel.stage == "confirmed":
        notes.append("Measured are the methods that no other of their family beat in the search; all of them count.")
        if len(several) > 1:
            notes.append(
                f"They were chosen from different numbers of settings ({many}), which favours the family with more: "
                "the search decides, where the comparison is on equally many."
            )
    elif len(several) > 1:
        notes.append(
            f"Families differ in their number of settings ({many}). Two of them are compared by the hypervolume "
            "expected of as many points as the smaller one has, drawn at random from the larger one's."
        )
    if panel.stage == "measured" and any(front.pending for front in panel.fronts):
        waiting = ", ".join(front.family for front in panel.fronts if front.pending)
        notes.append(f"Not all settings have been measured yet, so that no front is compared of: {waiting}.")
    return notes


def _pairs(panel: Panel, searched: Sequence[Panel]) -> list[tuple[MethodResult, MethodResult]]:
    """Each family's representative beside the first family's.

    A point that was chosen by its figures cannot be tested by the same figures: in the search only families of one
    setting are compared so, and in the final measurement those that the search chose.
    """
    if panel.stage == "measured":
        chosen = {front.family: front.methods[0] for front in panel.fronts if front.tries == 1}
    else:
        wanted = {m.name for other in searched if other.name == panel.name for m in representatives(other)}
        chosen = {m.family: m for m in panel.methods if m.name in wanted}
    base = chosen.get(panel.fronts[0].family)
    return [] if base is None else [(method, base) for method in chosen.values() if method is not base]


def _choice(panel: Panel) -> str:
    if panel.stage == "measured":
        return "Of each family that has one setting."
    return "Of each family the point with the largest product of the two accuracies in the search."


def _unreachable(methods: Sequence[Comparison]) -> str:
    """Where the exact test cannot come out at 5 % for all of a table's comparisons, that is said."""
    exact = [2 / 2 ** len(c.seeds) for c in methods if c.p_seeds is not None]
    if not exact or len(exact) * max(exact) <= LEVEL:
        return ""
    return (
        f"The exact test over {len(methods[0].seeds)} seeds cannot give less than p = {max(exact):.3f}: it is shown "
        "without a correction for the number of comparisons, and asked beside the bootstrap, not instead of it."
    )


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
    sections.append(training_section(study, records))
    sections.append(Section("Where the numbers come from", tuple(origin(study, records, panels, output))))
    return sections


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "panel"
