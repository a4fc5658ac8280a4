"""What the synthetic experiment found, as tables, files and pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from robust_peft.files import write_json, write_text
from robust_peft.plots import plot_bars, plot_lines, plot_scatter
from robust_peft.results import Accuracy
from robust_peft.studies.synthetic import BOXES


def describe(results: dict[str, Any]) -> str:
    """The study's figures as tables in Markdown, the paper's claim beside them."""
    settings = results["settings"]
    lines = [
        f"Digits {settings['digits'][0]} and {settings['digits'][1]}, {settings['train_images']} for training and "
        f"{settings['test_images']} for test, d = {settings['pixels']} pixels, {settings['norm']}, lam "
        f"{settings['lam']:g}, {settings['epochs']} epochs, learning rate {settings['lr']:g}, batch "
        f"{settings['batch_size']}, seed {settings['seed']}.",
    ]
    for name in BOXES:
        rows = [row for row in results["rows"] if row["box"] == name]
        lines += ["", f"Models trained at each budget, {name}. Accuracies on test images, 95 % intervals.", ""]
        lines += ["| budget | standard accuracy, % | adversarial accuracy (exact), % | neighbours of the other kind |"]
        lines += ["| --- | --- | --- | --- |"]
        for row in rows:
            figures = [_as_percent(row[f"{kind}_accuracy"]) for kind in ("standard", "adversarial")]
            lines.append(f"| {row['budget']:g} | {' | '.join(figures)} | {row['neighbours_of_other_kind']:.2f} |")
        for scope in ("per sample", "per batch"):
            of = "means over the training images" if scope == "per sample" else "all training images as one batch"
            lines += ["", f"{scope.capitalize()} ({of}), {name}:", ""]
            lines += _conflict_table(rows, scope)
            lines += [
                "",
                _exponent_line(
                    results["exponents"][name][scope], f"{rows[0]['budget']:g} to {rows[-1]['budget']:g}, retrained"
                ),
            ]
    lines += ["", f"Around one fixed model (trained without box at budget {settings['budgets'][0]:g}), no box."]
    for scope in ("per sample", "per batch"):
        lines += ["", f"{scope.capitalize()}:", "", *_conflict_table(results["fixed"], scope), ""]
        for said, found in results["fixed_exponents"].items():
            lines.append(_exponent_line(found[scope], said))
    return "\n".join(lines) + "\n"


def _conflict_table(rows: list[dict[str, Any]], scope: str) -> list[str]:
    names = ("norm of g_c", "norm of g_a", "1 - cos", "mu", "mu, linearised", "bound", "mu above its bound")
    keys = ("clean_norm", "adv_norm", "one_minus_cos", "mu", "mu_linearised", "bound", "above_bound")
    lines = [f"| budget | {' | '.join(names)} |", f"| {' | '.join(['---'] * (len(names) + 1))} |"]
    for row in rows:
        cells = [f"{row[scope][key]:.3g}" for key in keys[:-1]]
        above = row[scope]["above_bound"]
        cells.append(f"{100 * above:.0f} % of samples" if scope == "per sample" else ("yes" if above else "no"))
        lines.append(f"| {row['budget']:.3g} | {' | '.join(cells)} |")
    return lines


def _exponent_line(found: dict[str, float | None], said: str) -> str:
    names = {"mu": "mu", "mu_linearised": "linearised mu", "bound": "bound"}
    figures = [
        f"{names[k]} {'has none (a value is zero)' if v is None else format(v, '.2f')}" for k, v in found.items()
    ]
    return f"Exponent in the budget ({said}): {', '.join(figures)}; the paper: almost 2."


def _as_percent(counted: dict[str, Any]) -> str:
    low, high = counted["interval"]
    return f"{100 * counted['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def as_csv(results: dict[str, Any]) -> str:
    """Every number of the trained and of the fixed models, one line for each."""
    lines = []
    for kind, rows in (("retrained", results["rows"]), ("fixed", results["fixed"])):
        for row in rows:
            flat: dict[str, Any] = {"model": kind}
            for key, value in row.items():
                if isinstance(value, dict):
                    low_high = dict(zip(("low", "high"), value.get("interval", ()), strict=False))
                    parts = {k: v for k, v in value.items() if k != "interval"} | low_high
                    flat |= {f"{key} {part}".replace(" ", "_"): number for part, number in parts.items()}
                else:
                    flat[key] = value
            lines.append(flat)
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_study(results: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write ``results.json``, ``results.csv``, ``tables.md`` and the pictures into a folder.

    Returns:
        The files.
    """
    folder = Path(folder)
    written = [
        write_json(folder / "results.json", results),
        write_text(folder / "results.csv", as_csv(results)),
        write_text(folder / "tables.md", describe(results)),
    ]
    settings = results["settings"]
    budget_label = f"budget ({'L-inf' if settings['norm'] == 'linf' else 'L2'})"
    if results["tsne"]:
        panels = {
            f"budget {entry['budget']:g}": {"g_c": entry["clean"], "g_a": entry["adversarial"]}
            for entry in results["tsne"]
        }
        title = f"t-SNE of per-sample gradients,\n{len(results['tsne'][0]['labels'])} training images"
        written.append(plot_scatter(panels, folder / "fig2a-tsne.png", title=title))
    for name in BOXES:
        rows = [row for row in results["rows"] if row["box"] == name]
        ending = f"{name.replace(' ', '-')}.png"
        x = [row["budget"] for row in rows]
        bars = {
            f"{row['budget']:g}": {
                said: Accuracy(row[f"{kind}_accuracy"]["correct"], row[f"{kind}_accuracy"]["total"])
                for kind, said in (("standard", "standard"), ("adversarial", "adversarial, exact"))
            }
            for row in rows
        }
        title = f"Test accuracy, one model per budget, {name}"
        written.append(plot_bars(bars, folder / f"fig2b-accuracy-{ending}", x_label=budget_label, title=title))

        lines = {
            f"mu, {scope}": {
                _with_exponent("mu", results["exponents"][name][scope]["mu"]): (x, [r[scope]["mu"] for r in rows]),
                _with_exponent("Theorem 1's bound", results["exponents"][name][scope]["bound"]): (
                    x,
                    [r[scope]["bound"] for r in rows],
                ),
                "budget² from the first mu": (x, [rows[0][scope]["mu"] * (v / x[0]) ** 2 for v in x]),
            }
            for scope in ("per sample", "per batch")
        }
        title = f"Conflict mu, one model per budget, {name}"
        written.append(
            plot_lines(lines, folder / f"fig2b-mu-{ending}", x_label=budget_label, title=title, log=True, ticks=x)
        )
        lines = {
            said: {scope: (x, [r[scope][key] for r in rows]) for scope in ("per sample", "per batch")}
            for key, said in (("clean_norm", "norm of g_c"), ("adv_norm", "norm of g_a"), ("one_minus_cos", "1 - cos"))
        }
        title = f"The parts of mu, one model per budget, {name}"
        written.append(plot_lines(lines, folder / f"fig2b-parts-{ending}", x_label=budget_label, title=title))
    x = [row["budget"] for row in results["fixed"]]
    lines = {
        f"mu, {scope}": {
            "mu": (x, [row[scope]["mu"] for row in results["fixed"]]),
            "mu, linearised": (x, [row[scope]["mu_linearised"] for row in results["fixed"]]),
            "Theorem 1's bound": (x, [row[scope]["bound"] for row in results["fixed"]]),
        }
        for scope in ("per sample", "per batch")
    }
    title = f"Conflict mu around one fixed model\n(trained at budget {settings['budgets'][0]:g}, no box)"
    written.append(plot_lines(lines, folder / "fixed-model.png", x_label=budget_label, title=title, log=True))
    return written


def _with_exponent(name: str, found: float | None) -> str:
    return name if found is None else f"{name} (exponent {found:.1f})"
