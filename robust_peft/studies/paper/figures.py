"""What the paper's figures show beside a front of the worst case: bars, the conflict over epochs, a front for each
attack, accuracy over budgets and over settings.

Each function makes further sections of a study's report from its records, with the pictures beside the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from robust_peft.pixel_units import as_number
from robust_peft.plots import plot_accuracies, plot_bars, plot_panels, plot_seed_fronts
from robust_peft.results import Accuracy
from robust_peft.studies.paper.tables import Column, short
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.report_answer import interval
from robust_peft.studies.report_blocks import Block, Figure, Section, Table
from robust_peft.studies.report_fronts import points_of
from robust_peft.studies.report_tables import link, methods_table
from robust_peft.studies.statistics import attacks_of, panel_name, panels_of, threat_of
from robust_peft.studies.study import Study


def bars(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    """Standard accuracy and accuracy under each attack, the runs side by side (Fig. 1)."""
    done = [record for record in records if record.measured]
    if not done:
        return []
    path = "figures/bars.svg"
    threat = threat_of(done[0].measured)
    groups = {
        _name(record, done).replace(" (", "\n("): {
            "standard" if v.attack == "clean" else v.attack: v.accuracy for v in record.measured
        }
        for record in done
    }
    plot_bars(groups, output / path, title=panel_name(done[0]), note=f"{threat}, test images; 95 % intervals")
    rows = []
    for record in done:
        for v in record.measured:
            what = f"{v.attack}, {v.threat}" if v.threat else "standard"
            rows.append((record.method, what, _figure_of(v.accuracy), (link(record, output, str(record.seed)),)))
    caption = "Each attack by itself, with 95 % Wilson intervals over images."
    figure = Figure(path, f"Accuracies of {', '.join(record.method for record in done)} as bars.", caption)
    return [
        Section("Fig. 1", (figure, Table(caption, ("method", "measured", "accuracy, %", "run by seed"), tuple(rows))))
    ]


def conflict_over_epochs(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    """mu and the cosine over the epochs, from what training logged (Fig. 3): one picture and table for each panel."""
    sections = []
    trained = [record for record in records if record.status in ("trained", "done")]
    for number, panel in enumerate(dict.fromkeys(panel_name(record) for record in trained), 1):
        mine = [record for record in trained if panel_name(record) == panel]
        mu: dict[str, Sequence[float]] = {}
        cos: dict[str, Sequence[float]] = {}
        rows = []
        for method in dict.fromkeys(record.method for record in mine):
            runs = [record for record in mine if record.method == method]
            logged = [conflict_by_epoch(record.folder / "metrics.jsonl") for record in runs]
            # Epochs that all seeds have; a mean over seeds.
            epochs = [
                [fmean(values) for values in zip(*of_epoch, strict=True)] for of_epoch in zip(*logged, strict=False)
            ]
            if not epochs:
                continue
            mu[method], cos[method] = [values[0] for values in epochs], [values[1] for values in epochs]
            figures = [f"{mu[method][0]:.3g}", f"{mu[method][-1]:.3g}", f"{fmean(mu[method]):.3g}"]
            links = tuple(link(run, output, str(run.seed)) for run in runs)
            rows.append((method, *figures, f"{fmean(cos[method]):.3f}", str(len(epochs)), links))
        if not mu:
            continue
        path = f"figures/conflict-{number}.svg"
        plot_panels({"mu": mu, "cosine": cos}, output / path, x_label="epoch, from 0", title=panel)
        caption = (
            f"{panel}: the conflict mu of a batch's clean and adversarial gradient, and their cosine, in training: "
            "means over each epoch's steps and over seeds."
        )
        header = ("method", "mu, first epoch", "mu, last epoch", "mu, mean", "cosine, mean", "epochs", "runs by seed")
        figure = Figure(path, f"mu and cosine over the epochs of {', '.join(mu)}.", caption)
        sections.append(Section(f"Fig. 3: {panel}", (figure, Table(caption, header, tuple(rows)))))
    return sections


def conflict_by_epoch(path: Path) -> list[tuple[float, float]]:
    """Means over each epoch's steps of mu and of the cosine; steps that were skipped are left out.

    Args:
        path: A run's ``metrics.jsonl``.

    Returns:
        A pair for each epoch in which anything was measured, in order.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train" and record.get("mu") is not None and record.get("cos") is not None:
            found.setdefault(record["epoch"], []).append((record["mu"], record["cos"]))
    return [(fmean(mu for mu, _ in found[epoch]), fmean(cos for _, cos in found[epoch])) for epoch in sorted(found)]


def fronts_by_attack(
    title: str, study: Study, records: Sequence[Record], output: Path, columns: Sequence[Column]
) -> list[Section]:
    """For each panel a front for each attack by itself (Fig. 7).

    Args:
        title: The figure's name in the paper.
        study: The study, whose measurement tries every attack on every image.
        records: What is known of its points.
        output: The report's folder.
        columns: The attacks with their threat models; one that was not tried has no front.
    """
    blocks: dict[str, list[Block]] = {}
    for column in columns:
        alone = [replace(record, measured=_under(record, column)) for record in records]
        for number, panel in enumerate(panels_of(study, alone, "measured"), 1):
            path = f"figures/front-{number}-{column.title.lower()}.svg"
            points = [point for front in panel.fronts for point in points_of(front)]
            attack = f"{panel.attacks[0]}, {panel.threat}"
            plot_seed_fronts(
                points, output / path, attack=attack, title=f"{panel.name}: {column.title}", samples=len(panel.samples)
            )
            alt = f"Standard against adversarial accuracy ({attack}) of {', '.join(f.family for f in panel.fronts)}."
            caption = f"{panel.name}: {column.title} by itself ({attack}), on the images of the search."
            blocks.setdefault(panel.name, []).append(Figure(path, alt, caption))
            table = methods_table(panel, True, output)
            blocks[panel.name].append(replace(table, caption=f"{column.title}. {table.caption}", folded=True))
    return [Section(f"{title}: {panel}, each attack by itself", tuple(found)) for panel, found in blocks.items()]


def _under(record: Record, column: Column) -> tuple[Verdicts, ...]:
    """The record's measurement with this attack alone; nothing where it was not tried."""
    attacked = [v for v in record.measured if (short(v.attack), v.threat) == (column.attack, column.threat)]
    return (*(v for v in record.measured if v.attack == "clean"), *attacked) if attacked else ()


def accuracy_over_budgets(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    """Accuracy over the evaluation's budgets, a line for each run, a picture for each attack (Fig. 8)."""
    done = [record for record in records if record.measured]
    attacks = dict.fromkeys(v.attack for record in done for v in record.measured if v.attack != "clean")
    blocks: list[Block] = []
    for attack in attacks:
        series, rows = {}, []
        for record in done:
            name = f"{_name(record, done)}, {panel_name(record)}"
            points = [(0.0, v.accuracy) for v in record.measured if v.attack == "clean"]
            points += [(_budget(v.threat), v.accuracy) for v in record.measured if v.attack == attack]
            series[name] = sorted(points, key=lambda point: point[0])
            for budget, accuracy in series[name]:
                rows.append((name, f"{budget:g}/255", _figure_of(accuracy), (link(record, output, str(record.seed)),)))
        path = f"figures/budgets-{short(attack)}.svg"
        plot_accuracies(series, output / path, x_label="budget of the attack, n/255 (L-inf)", title=f"under {attack}")
        caption = f"Accuracy under {attack} by itself, over its budget; budget 0 is no attack. 95 % Wilson intervals."
        blocks.append(Figure(path, f"Accuracy under {attack} over budgets, of {', '.join(series)}.", caption))
        header = ("trained with", "budget", "accuracy, %", "run by seed")
        blocks.append(Table(caption, header, tuple(rows), folded=True))
    return [Section("Fig. 8: accuracy over budgets", tuple(blocks))] if blocks else []


def accuracy_over_settings(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    """Both accuracies over learning rates and over batch sizes, each at the first run's other setting (Fig. 12)."""
    configs = {point.key: point.config for point in study.points()}
    first = study.points()[0].config
    blocks: list[Block] = []
    for what, value, held in (
        ("learning rate", lambda c: c.optim.lr, lambda c: c.data.batch_size == first.data.batch_size),
        ("batch size", lambda c: c.data.batch_size, lambda c: c.optim.lr == first.optim.lr),
    ):
        done = [record for record in records if record.measured and held(configs[record.key])]
        if not done:
            continue
        names = attacks_of(done[0].measured)
        attacks = f"{'worst case over ' if len(names) > 1 else ''}{' and '.join(names)}"
        series: dict[str, list[tuple[float, Accuracy]]] = {}
        rows = []
        for record in sorted(done, key=lambda record: value(configs[record.key])):
            x, name = value(configs[record.key]), _name(record, done)
            (clean,) = [v for v in record.measured if v.attack == "clean"]
            withstood = [all(v.correct[i] for v in record.measured) for i in clean.correct]
            for kind, accuracy in (
                ("standard", clean.accuracy),
                ("adversarial", Accuracy(sum(withstood), len(withstood))),
            ):
                series.setdefault(f"{name}, {kind}", []).append((x, accuracy))
                rows.append((name, f"{x:g}", kind, _figure_of(accuracy), (link(record, output, str(record.seed)),)))
        path = f"figures/over-{what.replace(' ', '-')}.svg"
        threat = threat_of(done[0].measured)
        series = {name: series[name] for name in sorted(series, key=lambda name: name.endswith("adversarial"))}
        plot_accuracies(series, output / path, x_label=what, title=f"adversarial: {attacks}, {threat}")
        caption = f"Accuracies over the {what}; adversarial: {attacks}, {threat}. 95 % Wilson intervals."
        blocks.append(Figure(path, f"Standard and adversarial accuracy over the {what}.", caption))
        header = ("method", what, "measured", "accuracy, %", "run by seed")
        blocks.append(Table(caption, header, tuple(rows), folded=True))
    return [Section("Fig. 12: learning rate and batch size", tuple(blocks))] if blocks else []


def _name(record: Record, among: Sequence[Record]) -> str:
    """The method's name, with the seed where there are several."""
    return f"{record.method}, seed {record.seed}" if len({other.seed for other in among}) > 1 else record.method


def _figure_of(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.accuracy:.2f} {interval(accuracy.interval)}"


def _budget(threat: str) -> float:
    """The 8 of "L-inf 8/255"."""
    eps = as_number(threat.rpartition(" ")[2])
    return math.nan if eps is None else round(255 * eps, 6)
