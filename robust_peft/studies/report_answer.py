"""The study's answer in words, made from its comparisons: what is resolved, what is not, and what the tests can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robust_peft.studies.comparisons import LEAST_SEEDS, Comparison, is_single
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Block, Items, Paragraph
from robust_peft.studies.statistics import Panel, Stage, panel_name
from robust_peft.studies.study import Study

STAGES: dict[Stage, str] = {"measured": "search", "confirmed": "final measurement"}


def answer(
    study: Study,
    records: Sequence[Record],
    panels: Mapping[Stage, Sequence[Panel]],
    found: Mapping[tuple[str, str], Sequence[Comparison]],
) -> list[Block]:
    """The report's first paragraphs.

    What decides is the search, which every setting went through, unless the final measurement is complete, the families
    had equally many settings to choose from, and no fewer seeds stand behind it; the other one is told beside it.

    Args:
        study: The study.
        records: What is known of its points.
        panels: Stage -> the panels with anything measured in it.
        found: (panel's name, stage) -> its families' comparisons with the first family.
    """
    searched, confirmed = panels.get("measured", ()), panels.get("confirmed", ())
    decided = [panel for panel in confirmed if _decides(panel, searched, records)]
    names = {panel.name for panel in decided}
    first = [*decided, *(panel for panel in searched if panel.name not in names)]
    order = {panel.name: place for place, panel in enumerate(searched)}
    first.sort(key=lambda panel: order.get(panel.name, len(order)))
    second = [p for p in confirmed if p.name not in names and is_complete(p.name, records)]
    second += [panel for panel in searched if panel.name in names]
    lead = f"{study.question} {_in_short(study, first, second, found)}".strip()
    blocks: list[Block] = [Paragraph(lead, lead=True)]
    if left := _left(study, records):
        blocks.append(Paragraph(left))
    sentences = [f"{_where(p)} {sentence(c)}" for p in (*first, *second) for c in found[p.name, p.stage]]
    sentences += [f"{_where(panel)} {said}" for panel in first for said in _dominated(panel)]
    if sentences:
        blocks.append(Items(tuple(sentences)))
    if any(found[panel.name, panel.stage] for panel in (*first, *second)):
        blocks.append(Paragraph(METHOD))
    return blocks


def is_complete(panel: str, records: Sequence[Record]) -> bool:
    """Whether every run of the panel that was chosen for the final measurement has it, with its audit.

    Args:
        panel: The panel's name.
        records: What is known of the study's points.
    """
    states = {record.confirmation for record in records if panel_name(record) == panel} - {None}
    return states == {"done"}


def _decides(confirmed: Panel, searched: Sequence[Panel], records: Sequence[Record]) -> bool:
    tries = {front.tries for front in confirmed.fronts if not is_single(front)}
    seeds = max((len(panel.seeds) for panel in searched if panel.name == confirmed.name), default=0)
    enough = len(confirmed.seeds) >= min(seeds, LEAST_SEEDS)
    return is_complete(confirmed.name, records) and confirmed.comparable and len(tries) < 2 and enough


def sentence(comparison: Comparison) -> str:
    """One comparison with everything that its verdict rests on."""
    c, unit = comparison, " points of the unit square" if comparison.quantity == "hypervolume" else " points"
    points = f", {c.size} points each" if c.size is not None else ""
    text = f"{c.first} against {c.second}: {c.quantity} {_share(c.of_first)} against {_share(c.of_second)}{points}, "
    drawn = "images and seeds" if c.over_seeds else "images"
    text += f"difference {c.difference * 100:+.2f}{unit}, 95 % interval over {drawn} {interval(c.interval, sign=True)}"
    seeds = f"{len(c.seeds)} seed{'s' if len(c.seeds) != 1 else ''}"
    few = "" if c.over_seeds else f" (too few to draw seeds: {LEAST_SEEDS} are needed)"
    return f"{text}, {seeds}{few}; p = {p_value(c.p_value)}, Holm's adjusted {p_value(c.p_adjusted)}: {c.verdict}."


def interval(ends: tuple[float, float] | None, sign: bool = False) -> str:
    """Fractions as percent: "[1.20, 3.40]", or nothing where there is no interval."""
    if ends is None:
        return ""
    low, high = (round(100 * end, 2) + 0.0 for end in ends)  # the sum makes a plain zero of -0.00
    return f"[{low:+.2f}, {high:+.2f}]" if sign else f"[{low:.2f}, {high:.2f}]"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def _in_short(
    study: Study,
    first: Sequence[Panel],
    second: Sequence[Panel],
    found: Mapping[tuple[str, str], Sequence[Comparison]],
) -> str:
    if not first:
        return "There is no answer yet: nothing has been measured."
    pairs = dict.fromkeys((c.first, c.second) for panel in first for c in found[panel.name, panel.stage])
    singles = _singles(first)
    if not pairs and not singles:
        families = dict.fromkeys(method.family for method in study.methods)
        return (
            f"{', '.join(families)} is the only family, so that there is nothing to compare it with."
            if len(families) == 1
            else "No two families can be compared yet: see what is missing and the notes below."
        )
    sentences = []
    for pair in pairs:
        said, again = (_pair(pair, panels, found, several=len(first) > 1) for panels in (first, second))
        sentences.append(f"{' against '.join(pair)}: {said}." + (f" Beside it: {again}." if again else ""))
    return " ".join([*sentences, *singles])


def _pair(
    pair: tuple[str, str], panels: Sequence[Panel], found: Mapping[tuple[str, str], Sequence[Comparison]], several: bool
) -> str:
    """The outcome on each panel, panels of one outcome together."""
    groups: dict[str, list[str]] = {}
    for panel in panels:
        for c in found[panel.name, panel.stage]:
            if (c.first, c.second) == pair:
                groups.setdefault(_outcome(c, panel), []).append(panel.name)
    return "; ".join((f"on {' and '.join(names)} " if several else "") + outcome for outcome, names in groups.items())


def _outcome(c: Comparison, panel: Panel) -> str:
    seeds = f"{len(c.seeds)} seed{'s' if len(c.seeds) != 1 else ''}"
    figures = f"{100 * c.difference:+.2f} points of hypervolume, 95 % {interval(c.interval, sign=True)}; "
    where = f"{STAGES[panel.stage]}, {seeds}"
    if c.of_first == c.of_second == 0:
        return f"no model is right under attack, so that there are no fronts to compare ({where})"
    figures += where
    if c.verdict == "not resolved":
        return f"no difference between the fronts is resolved ({figures})"
    if c.tries is not None and c.size is not None and len(set(c.tries)) > 1:
        larger = c.first if c.tries[0] > c.tries[1] else c.second
        said = f"on equally many settings, {c.size} of {larger}'s {max(c.tries)} drawn at random, its front is"
    else:
        said = "its front is"
    said += " better" if c.difference > 0 else " worse"
    if not c.over_seeds:
        alone = len(c.seeds) == 1
        whose = "this seed's" if alone else f"these {seeds}'"
        said += f" for {whose} models and other images; "
        said += f"{seeds} {'is' if alone else 'are'} too few to speak of the methods"
    if "after Holm" in c.verdict:
        said += ", as a comparison alone but not after Holm's correction"
    return f"{said} ({figures})"


def _singles(panels: Sequence[Panel]) -> list[str]:
    """What to say of families of one setting, as measured and without a test."""
    found: dict[str, list[str]] = {}
    for panel in panels:
        base = panel.fronts[0]
        for front in panel.fronts[1:]:
            if not is_single(front) and not is_single(base):
                continue
            alone, other = (front, base) if is_single(front) else (base, front)
            above = [m.name for m in other.methods if _beats(m.mean, alone.methods[0].mean)]
            where = f"on {panel.name} " if len(panels) > 1 else ""
            said = f"dominated by {' and '.join(above)}" if above else f"not dominated by any setting of {other.family}"
            found.setdefault(alone.family, []).append(where + said)
    return [f"{family} is one setting and no front, as measured {'; '.join(said)}." for family, said in found.items()]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one != other


def _dominated(panel: Panel) -> list[str]:
    """How many of each two families' means the other's means beat: the plain reading of the figure."""
    base, found = panel.fronts[0], []
    for front in panel.fronts[1:] if panel.comparable else ():
        if is_single(front) or is_single(base) or front.pending or base.pending:
            continue
        ours, theirs = len(front.dominated_by(base)), len(base.dominated_by(front))
        found.append(
            f"As measured, without a test, {ours} of the {front.size} means of {front.family} are dominated by a mean "
            f"of {base.family}, and {theirs} of {base.family}'s {base.size} by one of {front.family}."
        )
    return found


def _where(panel: Panel) -> str:
    images = f"{len(panel.samples)} images"
    return f"{panel.name} ({STAGES[panel.stage]}: {', '.join(panel.attacks)}, {panel.threat}, {images})."


METHOD = (
    "Hypervolume is the area, in percent of the unit square, above (0, 0) that a family's points dominate, each point "
    "a mean over seeds. The interval is a basic bootstrap interval: the same images, drawn anew with replacement, for "
    f"all points, and with {LEAST_SEEDS} seeds or more the same seeds drawn anew too, spread so that few seeds count "
    "as in Student's interval; it takes out the bias of an area under points that scatter. A difference is called "
    "resolved when the p-value of this bootstrap is at most 0.05 after Holm's correction for the panel's comparisons. "
    f"It speaks of the methods only with {LEAST_SEEDS} seeds or more; with fewer, of these very models on other images."
)


def _left(study: Study, records: Sequence[Record]) -> str:
    count = {s: sum(r.status == s for r in records) for s in ("done", "failed", "running", "trained", "waiting")}
    final = [record.confirmation for record in records if record.confirmation is not None]
    sentences = []
    if count["done"] < len(records):
        said = [f"{count[s]} {name}" for s, name in (
            ("failed", "failed"), ("running", "running"), ("trained", "trained but not measured"),
            ("waiting", "waiting"),
        ) if count[s]]  # fmt: skip
        sentences.append(f"{count['done']} of {len(records)} runs are done, {', '.join(said)}.")
    if final.count("done") < len(final):
        failed = f", {final.count('failed')} failed" if "failed" in final else ""
        sentences.append(f"{final.count('done')} of {len(final)} final measurements are done{failed}.")
    if study.confirm is not None and count["done"] + count["failed"] < len(records):
        sentences.append("The final measurement is chosen, and shown, once all runs of a panel are measured.")
    return " ".join(["The study is not complete:", *sentences]) if sentences else ""


def _share(value: float) -> str:
    return f"{100 * value:.2f}"
