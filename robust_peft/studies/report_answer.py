"""The study's answer in words, made from its comparisons: what is resolved, what is not, and what the tests can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robust_peft.studies.comparisons import LEAST_SEEDS, Comparison, is_single
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Block, Items, Paragraph
from robust_peft.studies.statistics import Front, Panel, Stage
from robust_peft.studies.study import Study

STAGES: dict[Stage, str] = {"measured": "search", "confirmed": "final measurement"}


def answer(
    study: Study, records: Sequence[Record], panels: Sequence[Panel], found: Mapping[str, Sequence[Comparison]]
) -> list[Block]:
    """The report's first paragraphs.

    Args:
        study: The study.
        records: What is known of its points.
        panels: Of each panel the one to answer by: the final measurement where there is one.
        found: Panel's name -> its families' comparisons with the first family.
    """
    blocks: list[Block] = [Paragraph(f"{study.question} {_in_short(study, panels, found)}".strip(), lead=True)]
    if left := _left(records):
        blocks.append(Paragraph(left))
    sentences = [f"{_where(panel)} {sentence(c)}" for panel in panels for c in found[panel.name]]
    if sentences:
        blocks += [Items(tuple(sentences)), Paragraph(_what_it_means(panels, found))]
    return blocks


def sentence(comparison: Comparison) -> str:
    """One comparison with everything that its verdict rests on."""
    c, unit = comparison, " points of the unit square" if comparison.quantity == "hypervolume" else " points"
    points = f", {c.size} point{'s' if c.size != 1 else ''} each" if c.size is not None else ""
    text = f"{c.first} against {c.second}: {c.quantity} {_share(_mean(c.of_first))} against "
    text += (
        f"{_share(_mean(c.of_second))}{points}, difference {c.difference * 100:+.2f}{unit}, 95 % interval over images "
    )
    text += f"{interval(c.interval, sign=True)}"
    if c.p_seeds is not None:
        positive = sum(d > 0 for d in c.differences)
        text += (
            f", larger on {positive} of {len(c.seeds)} seeds, exact sign-flip test over seeds p = {p_value(c.p_seeds)}"
        )
    else:
        text += f", {len(c.seeds)} seed{'s' if len(c.seeds) != 1 else ''} (no test over seeds below {LEAST_SEEDS})"
    return f"{text}; Holm's adjusted p = {p_value(c.p_adjusted)}: {c.verdict}."


def interval(ends: tuple[float, float] | None, sign: bool = False) -> str:
    """Fractions as percent: "[1.20, 3.40]", or nothing where there is no interval."""
    if ends is None:
        return ""
    return f"[{100 * ends[0]:+.2f}, {100 * ends[1]:+.2f}]" if sign else f"[{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def _in_short(study: Study, panels: Sequence[Panel], found: Mapping[str, Sequence[Comparison]]) -> str:
    if not panels:
        return "There is no answer yet: nothing has been measured."
    comparisons = [(panel, c) for panel in panels for c in found[panel.name]]
    singles = [_single(panel, front, len(panels)) for panel in panels for front in panel.fronts[1:]]
    singles = [said for said in singles if said]
    if not comparisons and not singles:
        families = dict.fromkeys(method.family for method in study.methods)
        return (
            f"{', '.join(families)} is the only family, so that there is nothing to compare it with."
            if len(families) == 1
            else "No two families have whole fronts on the same seed yet, so that there is nothing to compare."
        )
    sentences = []
    for first, second in dict.fromkeys((c.first, c.second) for _, c in comparisons):
        groups: dict[str, list[str]] = {}
        for panel, c in comparisons:
            if (c.first, c.second) == (first, second):
                groups.setdefault(_outcome(c), []).append(panel.name)
        said = "; ".join(outcome + _on(names, len(panels)) for outcome, names in groups.items())
        sentences.append(f"{first} against {second}: {said}.")
    return " ".join([*sentences, *singles])


def _single(panel: Panel, front: Front, panels: int) -> str:
    """What to say of a family of one point beside a front, or nothing."""
    base = panel.fronts[0]
    if not is_single(front, base):
        return ""
    alone, other = (front, base) if front.size == 1 else (base, front)
    x, y = alone.methods[0].mean
    above = [m.name for m in other.methods if m.mean[0] >= x and m.mean[1] >= y and m.mean != (x, y)]
    said = f"below {' and '.join(above)} in both accuracies" if above else f"not dominated by any of {other.family}'s"
    return f"{alone.family} is one point and no front,{_on([panel.name], panels)} {said}.".replace(",  ", ", ")


def _outcome(c: Comparison) -> str:
    if c.verdict == "not resolved":
        return f"no difference between the fronts is resolved ({100 * c.difference:+.2f} points of hypervolume)"
    better = "better" if c.difference > 0 else "worse"
    limits = []
    if not c.resolved:
        limits.append("as a comparison alone but not after Holm's correction")
    if c.p_seeds is None:
        seeds = "one seed is" if len(c.seeds) == 1 else f"{len(c.seeds)} seeds are"
        limits.append(f"over images only, {seeds} too few for a test over seeds")
    limit = f", resolved {', '.join(limits)}" if limits else ", resolved over images and seeds"
    return f"the front is {better} ({100 * c.difference:+.2f} points of hypervolume{limit})"


def _on(names: Sequence[str], panels: int) -> str:
    return "" if panels == 1 else f" on {' and '.join(names)}"


def _where(panel: Panel) -> str:
    images = f"{len(panel.samples)} images"
    return f"{panel.name} ({STAGES[panel.stage]}: {', '.join(panel.attacks)}, {panel.threat}, {images})."


def _what_it_means(panels: Sequence[Panel], found: Mapping[str, Sequence[Comparison]]) -> str:
    comparisons = [c for panel in panels for c in found[panel.name]]
    text = (
        "Hypervolume is the area, in percent of the unit square, above (0, 0) that a family's points dominate, for "
        "each seed by itself and then averaged. The interval comes from a paired bootstrap: the same images, drawn "
        "anew with replacement, for all points and seeds. The sign-flip test counts all ways to swap the two families "
        "on each seed. A difference is called resolved when the interval excludes zero and both p-values (over images; "
        "over seeds where there are 6 or more) are at most 0.05 after Holm's correction for the panel's comparisons."
    )
    least = {2 / 2 ** len(c.seeds) * len(found[panel.name]) for panel in panels for c in found[panel.name] if c.p_seeds}
    if any(smallest > 0.05 for smallest in least):
        few = min(len(c.seeds) for c in comparisons if c.p_seeds)
        text += (
            f" With {few} seeds the test over seeds cannot give less than p = {p_value(2 / 2**few)}, so that among "
            "several comparisons none can be resolved after the correction, whatever the figures."
        )
    return text


def _left(records: Sequence[Record]) -> str:
    count = {s: sum(r.status == s for r in records) for s in ("done", "failed", "running", "trained", "waiting")}
    if count["done"] == len(records):
        return ""
    said = [f"{count[s]} {name}" for s, name in (
        ("failed", "failed"), ("running", "running"), ("trained", "trained but not measured"), ("waiting", "waiting"),
    ) if count[s]]  # fmt: skip
    return f"The study is not complete: {count['done']} of {len(records)} runs are done, {', '.join(said)}."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(value: float) -> str:
    return f"{100 * value:.2f}"
