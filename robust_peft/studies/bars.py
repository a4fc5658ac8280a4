"""Runs side by side as bars: standard and adversarial accuracy (the CA-AT paper's Fig. 1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_peft.config import to_dict
from robust_peft.evaluation import AttackResult, Report
from robust_peft.plots import plot_bars
from robust_peft.results import paired_resolved
from robust_peft.runs import describe_surgery, load_run_config


def bars_from_runs(
    folders: Sequence[str | Path], output: str | Path, *, attack: str | None = None, title: str | None = None
) -> Path:
    """Draw standard and adversarial accuracy of finished runs beside each other, for example vanilla beside CA-AT.

    Args:
        folders: Two or more run folders. The order is kept.
        output: The picture's path; its ending (png, svg, pdf) is the format.
        attack: Name of the attack, as the evaluation calls it. None: the last one that the runs were evaluated with.
        title: Above the figure; None: the data's name.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: If a folder holds no run, or one without an evaluation.
        ValueError: If there are fewer than two folders, an evaluation is not finished or lacks the attack, or the runs
            differ in threat model, attack or test images, so that their bars would not compare; says how.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"folders should be two or more different run folders. Found {', '.join(map(str, paths))}.")
    reports = [_load_report(path) for path in paths]
    chosen = [_find(report, path, attack) for report, path in zip(reports, paths, strict=True)]
    first = _what_was_measured(paths[0], reports[0], chosen[0])
    for path, report, result in zip(paths[1:], reports[1:], chosen[1:], strict=True):
        other = _what_was_measured(path, report, result)
        differing = [f"{key}: {first[key]} against {other[key]}" for key in first if first[key] != other[key]]
        if differing:
            raise ValueError(f"{paths[0]} and {path} cannot be compared. They differ in {'; '.join(differing)}.")

    labels = [describe_surgery(load_run_config(path).surgery).replace(", ", "\n") for path in paths]
    if len(set(labels)) < len(labels):  # runs that differ in something else, such as the seed
        labels = [f"{label}\n{path.name}" for label, path in zip(labels, paths, strict=True)]
    under = f"adversarial: {_name_of(chosen[0])}, {chosen[0].threat}"
    bars = {
        label: {"standard": report.clean, under: result.accuracy}
        for label, report, result in zip(labels, reports, chosen, strict=True)
    }
    return plot_bars(bars, output, title=title or reports[0].data, note=_note(reports, chosen))


def _load_report(folder: Path) -> Report:
    load_run_config(folder)  # says where there is no run
    path = folder / "evaluation.json"
    if not path.is_file() or "results" not in (values := json.loads(path.read_text(encoding="utf-8"))):
        raise FileNotFoundError(f"{folder} holds a run without an evaluation: it is not finished, or had no attacks.")
    return Report.from_dict(values)


def _find(report: Report, folder: Path, attack: str | None) -> AttackResult:
    attacked = [result for result in report.results if result.threat is not None]
    if not report.finished:
        raise ValueError(f"The evaluation in {folder} is not finished.")
    if not attacked or all(result.attack != "clean" for result in report.results):
        raise ValueError(f"{folder} should have been evaluated without an attack and with one. Found {_names(report)}.")
    if attack is None:
        return attacked[-1]
    try:
        return report.find(attack, attacked[-1].threat)
    except KeyError as error:
        raise ValueError(f"{folder}: {error.args[0]}") from error


def _names(report: Report) -> str:
    return ", ".join(result.attack for result in report.results) or "nothing"


def _what_was_measured(folder: Path, report: Report, result: AttackResult) -> dict[str, Any]:
    """All that must agree, in words."""
    threat = result.threat
    box = "no box" if threat is None or threat.box is None else f"box {threat.box[0]:g} to {threat.box[1]:g}"
    measured: dict[str, Any] = {
        "threat model": f"{threat}, {box}",
        "attack": _name_of(result),
        "the attack's precision": report.precision,
        "test images": f"{report.data}, n={result.accuracy.total}",
    }
    hashes = _image_hashes(folder)
    if hashes:
        # What the evaluation saw, whatever file it came from.
        measured["content of the test images"] = _digest(hashes)
    else:
        data = to_dict(load_run_config(folder).data)
        measured["data"] = {
            key: data[key] for key in ("name", "root", "test", "image_size", "resize", "limit") if key in data
        }
    if not result.own:
        tried = [r.attack for r in report.results if r.threat == threat]
        measured["attacks tried before"] = ", ".join(tried[: tried.index(result.attack)])
    return measured


def _image_hashes(folder: Path) -> dict[int, str]:
    """Sample index to content hash, as the evaluation noted them in ``evaluation/``; empty where there are none."""
    found: dict[int, str] = {}
    for path in sorted((folder / "evaluation").glob("verdicts-*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill; the batch was measured again
                continue
            found |= dict(zip(line.get("indices", ()), line.get("hashes", ()), strict=False))
    return found


def _digest(hashes: dict[int, str]) -> str:
    text = "".join(f"{index} {hashes[index]}\n" for index in sorted(hashes))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _name_of(result: AttackResult) -> str:
    name = result.attack.upper() if result.attack.startswith(("pgd", "fgsm")) else result.attack
    return name if result.own else f"worst case up to {name}"


def _note(reports: Sequence[Report], chosen: Sequence[AttackResult]) -> str:
    """Whether two runs differ by more than their test images' chance; with more runs there is no one answer."""
    note = "95 % intervals"
    if len(reports) != 2:
        return note
    pairs = {
        "standard": [report.find("clean", None).correct for report in reports],
        "adversarial": [result.correct for result in chosen],
    }
    said = [f"{kind} {'resolved' if paired_resolved(a, b) else 'not resolved'}" for kind, (a, b) in pairs.items()]
    return f"{note}; difference (exact McNemar, 5 %):\n{', '.join(said)}"
