"""``robust-peft plot`` and ``robust-peft zoo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from robust_peft.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw standard and adversarial accuracy of finished runs beside each other."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more run folders; the order is kept."""
    output: str = "bars.png"
    """The picture; its ending (png, svg, pdf) is the format."""
    attack: str | None = None
    """The attack, as the evaluation calls it; None: the last one that the runs were evaluated with."""
    title: str | None = None
    """Above the figure; None: the data's name."""


def run_plot(arguments: list[str]) -> None:
    parsed: Plot = parse(Plot, arguments, prog="robust-peft plot")

    from robust_peft.studies.bars import bars_from_runs

    print(f"Picture: {bars_from_runs(parsed.runs, parsed.output, attack=parsed.attack, title=parsed.title)}")


def run_zoo(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            "usage: robust-peft zoo [attacks]\n\nLists the backbones that --backbone.name takes, or the attacks that "
            "--attacks takes."
        )
        return
    if arguments not in ([], ["attacks"]):
        raise ValueError(f"zoo takes nothing, or attacks. Found {' '.join(arguments)}.")
    if arguments:
        _zoo_attacks()
        return
    from robust_peft.models import ENTRIES

    print("\n\n".join(entry.describe() for entry in ENTRIES))


def _zoo_attacks() -> None:
    from robust_peft.attacks.suite import ENTRIES, SUITES

    for entry in ENTRIES:
        also = f" (also {', '.join(entry.aliases)})" if entry.aliases else ""
        steps = f", K = {entry.steps}" if entry.steps is not None else ""
        print(f"{entry.name}{also}\n  {entry.about}")
        print(f"  norms: {', '.join(entry.norms)}; knowledge: {entry.knowledge}; by {entry.library}")
        print(f"  passes for an image that withstands: {entry.forwards} forwards, {entry.backwards} backwards{steps}")
        if entry.source:
            print(f"  {entry.source}")
    print("\nK: steps; C: classes; T = min(9, C - 1): targets. A name may carry numbers: pgd-20 (steps), pgd-20x5 (and")
    print("restarts), pgd-10@2/225 (and the step size), apgd-ce-20, square-1000.")
    print("Suites (--suite):")
    for name, norms in SUITES.items():
        for norm, attacks in norms.items():
            print(f"  {name}, {norm}: {', '.join(attacks)}")
