"""Studies and records without any training, for statistics and reports."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from robust_peft.config import AttackConfig, BackboneConfig, DataConfig, RunConfig
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.study import Measurement, Method, Study, grid

BASE = RunConfig(
    backbone=BackboneConfig(name="micro_swin"), data=DataConfig(name="mnist"), attack=AttackConfig(steps=1)
)
SEARCH = Measurement(("clean", "apgd-ce", "t-apgd-dlr"), split="validation", limit=200)
FINAL = Measurement(("clean", "autoattack"), audit=True)
THREAT = "L-inf 8/255"
LONG_PANEL = "a backbone with a very long name/of two parts"

FAMILIES = (
    *grid("vanilla", "surgery.lam", (0.0, 0.25, 0.5, 0.75, 1.0), {"surgery.name": "vanilla"}),
    *grid("CA-AT", "surgery.gamma", (0.0, 0.5, 0.7, 0.8, 0.9), {"surgery.name": "ca-at"}),
    *grid(
        "CA-AT, length matched", "surgery.gamma", (0.0, 0.5, 0.7, 0.8, 0.9),
        {"surgery.name": "ca-at", "surgery.rescale": "vanilla"},
    ),
    Method("PCGrad", settings={"surgery.name": "pcgrad"}),
    Method("MGDA", settings={"surgery.name": "mgda"}),
)  # fmt: skip


def verdicts(right: list[bool], *attacked: tuple[str, list[bool]], threat: str = THREAT) -> tuple[Verdicts, ...]:
    """A measurement: the clean verdicts, then each attack's."""
    found = [Verdicts("clean", "", dict(enumerate(right)))]
    return (*found, *(Verdicts(name, threat, dict(enumerate(correct))) for name, correct in attacked))


def records_of(
    study: Study,
    folder: Path,
    measured: Callable[..., tuple[Verdicts, ...]],
    confirmed: Callable[..., tuple[Verdicts, ...]] = lambda point: (),
) -> list[Record]:
    """A record for each point, done where there are verdicts and waiting where there are none."""
    found = []
    for point in study.points():
        seen = measured(point)
        found.append(
            Record(
                key=point.key, panel=dict(point.panel), family=point.method.family, label=point.method.label,
                seed=point.seed, folder=folder / "runs" / point.folder, status="done" if seen else "waiting",
                measured=seen, confirmed=confirmed(point),
            )
        )  # fmt: skip
    return found


def drawn(point, samples: int, attacks: tuple[str, ...], gain: float = 0.01) -> tuple[Verdicts, ...]:
    """Verdicts as a trade-off would give them: along each family accuracy is bought with robustness."""
    family = [m.name for m in FAMILIES if m.family == point.method.family]
    place = family.index(point.method.name) / max(1, len(family) - 1) if len(family) > 1 else 0.5
    rng = random.Random(f"{point.name}, {samples}")
    better = gain * (point.method.family == "CA-AT")
    standard = 0.72 + 0.2 * place + better + rng.gauss(0, 0.006)
    adversarial = 0.5 - 0.25 * place**2 + better + rng.gauss(0, 0.006)
    order = [random.Random(f"image {i}").random() for i in range(samples)]
    right = [value < standard for value in order]
    left, found = right, []
    for k, attack in enumerate(attacks):
        share = adversarial + 0.03 * (len(attacks) - 1 - k)
        left = [was and value < share for was, value in zip(left, order, strict=True)]
        found.append((attack, left))
    return verdicts(right, *found)


def full_study() -> Study:
    """Two panels with 6 and 3 seeds, five families."""
    return Study(
        "front", FAMILIES, BASE, axes={"data": {"MNIST": {}, "Fashion-MNIST": {"data.name": "fashion_mnist"}}},
        seeds=range(6), panel_seeds={"Fashion-MNIST": range(3)}, measure=SEARCH, confirm=FINAL,
        question="Does CA-AT give a better front, and does it still when update length is matched?",
    )  # fmt: skip


def full_records(study: Study, folder: Path) -> list[Record]:
    """Everything measured, some of it finally; with costs, audits and what run folders say of themselves."""

    def final(point):
        chosen = point.method.label in (
            "", "lam 0.25", "lam 0.5", "lam 1.0", "gamma 0.5", "gamma 0.7", "gamma 0.9"
        )  # fmt: skip
        return drawn(point, 500, ("autoattack",), gain=0.03) if chosen else ()

    found = records_of(study, folder, lambda point: drawn(point, 200, ("apgd-ce", "t-apgd-dlr"), gain=0.03), final)
    training = {"seconds": 61.0, "seconds_per_step": 0.034, "trainable_parameters": 20490, "bytes_on_disk": 88064}
    found = [
        replace(r, training=training, audit="passed", confirmation="done")
        if r.confirmed
        else replace(r, training=training)
        for r in found
    ]
    for record in found:
        record.folder.mkdir(parents=True)
        about = {"device": "x86_64 CPU", "processes": 1, "precision": "fp32", "python": "3.11.7", "commit": "c" * 40}
        about |= {"versions": {"robust_peft": "0.5", "torch": "2.11"}, "command": "robust-peft study run front.py"}
        (record.folder / "config.json").write_text(json.dumps(about))
    return found


def troubled_study() -> Study:
    """Long names, signs that mean something in HTML and Markdown, one seed, much of it missing or failed."""
    long = "a family with a name that goes on and on, far beyond what fits into one line of a legend"
    return Study(
        "troubles",
        (
            Method("<b>base</b> & *co*", "lam | 0.5 `x`", {"surgery.name": "vanilla", "surgery.lam": 0.5}),
            Method(
                long,
                "a label that is far too long to be written beside a point",
                {"surgery.name": "vanilla", "surgery.lam": 0.25},
            ),
            Method(long, "gamma 0.5", {"surgery.name": "ca-at", "surgery.gamma": 0.5}),
            Method("never finished", "", {"surgery.name": "mgda"}),
        ),
        BASE,
        axes={"backbone": {LONG_PANEL: {}, "<script>alert(1)</script>": {"optim.lr": 0.01}}},
        measure=SEARCH, question="Is <i>this</i> escaped & legible?",
    )  # fmt: skip


def troubled_records(study: Study, folder: Path) -> list[Record]:
    """One seed; the last method waits on one panel and failed on the other."""

    def seen(point):
        if point.method.family == "never finished":
            return ()
        rng = random.Random(point.name)
        right = [rng.random() < 0.8 for _ in range(50)]
        return verdicts(right, ("apgd-ce", [r and rng.random() < 0.5 for r in right]))

    found = records_of(study, folder, seen)
    error = "RuntimeError: <img src=x onerror=alert(1)> " + "x" * 200 + " | end"
    return [
        replace(r, status="failed", error=error) if r.status == "waiting" and "script" in r.panel["backbone"] else r
        for r in found
    ]
