"""The demo: what vanilla adversarial training and CA-AT make of one robust transformer and 5,000 MNIST digits.

    python recipes/quickstart.py                        # five runs, a few minutes on two CPU cores
    python recipes/quickstart.py --seed 1 --output runs/quickstart-1

The embedded backbone (a Swin trained adversarially on CIFAR-10) gets bottleneck adapters with reduction 8 and a new
head; only these are trained, each time from the same start on the same digits, with the same attack, optimizer and
number of steps. What differs is how clean and adversarial gradient become one update. Prints a table, writes it to
OUTPUT/table.md and draws OUTPUT/front.png; each method's run folder is beside them.

A trial in seconds: ``--limit 100 --epochs 1``.
"""

import dataclasses
import sys
import time
from pathlib import Path

from robust_peft.cli import guarded, is_main_process, parse
from robust_peft.config import RunConfig, SurgeryConfig
from robust_peft.presets import get_preset

METHODS = {
    "vanilla-0": SurgeryConfig(name="vanilla", lam=0.0),
    "vanilla-0.5": SurgeryConfig(name="vanilla", lam=0.5),
    "vanilla-1": SurgeryConfig(name="vanilla", lam=1.0),
    "ca-at-0.8": SurgeryConfig(name="ca-at", gamma=0.8),
    "ca-at-0.9": SurgeryConfig(name="ca-at", gamma=0.9),
}
REFERENCE = "vanilla-0.5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Five fine-tuning runs, a table and a picture."""

    output: str = "runs/quickstart"
    """Folder for the run folders, the table and the picture."""
    overwrite: bool = False
    """Replace earlier runs there."""
    seed: int = 0
    """Seed of all five runs."""
    epochs: int | None = None
    """Epochs of each run (default: the preset's)."""
    limit: int | None = None
    """At most so many digits of each split (for trials)."""


def config_for(surgery: SurgeryConfig, arguments: Quickstart) -> RunConfig:
    """The preset with another surgery: everything else is equal."""
    preset = get_preset("quickstart")
    optim = preset.optim
    if arguments.epochs is not None:
        warmup = optim.warmup_epochs * arguments.epochs / optim.epochs
        optim = dataclasses.replace(optim, epochs=arguments.epochs, warmup_epochs=warmup)
    data = dataclasses.replace(preset.data, limit=arguments.limit)
    return dataclasses.replace(preset, surgery=surgery, optim=optim, data=data, seed=arguments.seed)


def main(arguments: Quickstart) -> None:
    """Train and evaluate all five, then compare."""
    from robust_peft.plots import Point, plot_front
    from robust_peft.results import paired_resolved
    from robust_peft.runs import describe_surgery, make_threat, run

    started = time.monotonic()
    results = {}
    for place, (name, surgery) in enumerate(METHODS.items(), start=1):
        config = config_for(surgery, arguments)
        if is_main_process():
            print(f"[{place}/{len(METHODS)}] {describe_surgery(surgery)}", flush=True)
        results[name] = run(config, Path(arguments.output) / name, overwrite=arguments.overwrite)
    if not is_main_process():
        return

    threat, attack = make_threat(config), config.evaluation.attacks[-1]
    shown_attack = f"{attack.upper()}, {threat}"
    reports = {name: result.report for name, result in results.items()}

    def against_reference(name: str) -> str:
        """The difference to the reference on the same digits, or that it is not resolved (exact McNemar test, 5 %)."""
        if name == REFERENCE:
            return "reference"
        said = []
        for short, key in (("SA", ("clean", None)), ("AA", (attack, threat))):
            own, other = reports[name].find(*key), reports[REFERENCE].find(*key)
            points = 100 * (own.accuracy.accuracy - other.accuracy.accuracy)
            resolved = paired_resolved(own.correct, other.correct)
            said.append(f"{short} {points:+.1f}" if resolved else f"{short} not resolved")
        return ", ".join(said)

    def cell(accuracy) -> str:
        low, high = accuracy.interval
        return f"{100 * accuracy.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    total = reports[REFERENCE].clean.total
    header = [
        "method",
        "trainable",
        "MB on disk",
        "standard accuracy (SA), %",
        f"adversarial accuracy (AA), %, {shown_attack}",
        f"against {describe_surgery(METHODS[REFERENCE])}",
        "training s",
    ]
    rows = [
        [
            describe_surgery(METHODS[name]),
            f"{result.trainable_parameters:,}",
            f"{result.bytes_on_disk / 1e6:.2f}",
            cell(reports[name].clean),
            cell(reports[name][threat, attack]),
            against_reference(name),
            f"{result.fit.seconds:.0f}",
        ]
        for name, result in results.items()
    ]
    table = as_markdown([header, *rows])
    note = (
        f"n={total} test digits, 95 % Wilson intervals, seed {arguments.seed}. Differences by an exact McNemar test on "
        "the same digits; one seed says nothing about the spread over seeds."
    )
    folder = Path(arguments.output)
    (folder / "table.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    points = [
        Point(
            "CA-AT" if surgery.name == "ca-at" else "vanilla AT",
            describe_surgery(surgery).split(", ")[1],
            reports[name].clean,
            reports[name][threat, attack],
        )
        for name, surgery in METHODS.items()
    ]
    picture = plot_front(
        points, folder / "front.png", attack=shown_attack, title="MNIST digits, adapters in a robust Swin: SA and AA"
    )
    print(f"\n{table}\n\n{note}")
    print(f"Picture: {picture}. Run folders: {folder}/. All in {time.monotonic() - started:.0f} s.")


def as_markdown(rows: list[list[str]]) -> str:
    """A table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Quickstart, sys.argv[1:], prog="quickstart.py"))))
