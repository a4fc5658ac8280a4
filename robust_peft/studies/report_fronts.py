"""Fronts as the points of a figure."""

from __future__ import annotations

from robust_peft.plots import SeedPoint
from robust_peft.studies.statistics import Front


def points_of(front: Front) -> list[SeedPoint]:
    """The front's points; where all labels begin with the same word, e.g. "gamma 0.8", it goes to the legend."""
    family, labels = front.family, [method.label for method in front.methods]
    heads = {label.rpartition(" ")[0] for label in labels}
    if len(labels) > 1 and len(heads) == 1 and heads != {""}:
        family, labels = f"{family}: {heads.pop()}", [label.rpartition(" ")[2] for label in labels]
    return [SeedPoint(family, label, m.of_seeds) for label, m in zip(labels, front.methods, strict=True)]
