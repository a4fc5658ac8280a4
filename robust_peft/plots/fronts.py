"""Standard against adversarial accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_peft.plots.style import STYLES, new_figure, save, whiskers_of
from robust_peft.results import Accuracy


@dataclass(frozen=True)
class Point:
    """One trained model in the plane of standard and adversarial accuracy."""

    method: str
    """Family, which shares shape and colour: "vanilla"."""
    label: str
    """What tells it from others of the family: "lam 0.5"."""
    standard: Accuracy
    adversarial: Accuracy


def plot_front(points: Sequence[Point], path: str | Path, *, attack: str, title: str) -> Path:
    """Draw standard against adversarial accuracy, each point with its 95 % intervals.

    Args:
        points: The models.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        attack: Name of the attack with its budget, for the axis.
        title: Above the figure.

    Raises:
        ValueError: If there are no points.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    if not points:
        raise ValueError("There are no points to draw.")
    figure, (axes,) = new_figure()
    families = list(dict.fromkeys(point.method for point in points))
    for place, family in enumerate(families):
        marker, colour = STYLES[place % len(STYLES)]
        members = sorted((p for p in points if p.method == family), key=lambda p: p.standard.accuracy)
        x = [100 * p.standard.accuracy for p in members]
        y = [100 * p.adversarial.accuracy for p in members]
        x_error = list(zip(*[whiskers_of(p.standard) for p in members], strict=True))
        y_error = list(zip(*[whiskers_of(p.adversarial) for p in members], strict=True))
        axes.errorbar(
            x, y, xerr=x_error, yerr=y_error, fmt=marker, color=colour, markersize=8, elinewidth=1, capsize=2,
            alpha=0.9, label=family,
        )  # fmt: skip
    axes.margins(0.2)
    axes.set_xlabel(f"standard accuracy (%), n={points[0].standard.total}")
    axes.set_ylabel(f"adversarial accuracy (%), {attack}, n={points[0].adversarial.total}")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -4))
    axes.legend(loc="best", frameon=False)
    figure.canvas.draw()  # settles the layout, which the labels' places are measured in
    _label_points(axes, points, families)
    return save(figure, path)


def _label_points(axes: Any, points: Sequence[Point], families: Sequence[str]) -> None:
    """Write each point's label at the one of eight places around it that is farthest from points and other labels."""
    places = [axes.transData.transform((100 * p.standard.accuracy, 100 * p.adversarial.accuracy)) for p in points]
    taken = [(x, y) for x, y in places]
    to_points = 72 / axes.figure.dpi
    for (x, y), point in zip(places, points, strict=True):

        def room(offset: tuple[int, int], x: float = x, y: float = y) -> float:
            # Labels are wide, so a distance upwards counts double.
            others = [(tx, ty) for tx, ty in taken if (tx, ty) != (x, y)]
            return min(((x + offset[0] - tx) ** 2 + 4 * (y + offset[1] - ty) ** 2 for tx, ty in others), default=0)

        dx, dy = max(((dx, dy) for dx in (-50, 50, 0) for dy in (30, -30, 0) if dx or dy), key=room)
        taken.append((x + dx, y + dy))
        label = axes.annotate(
            point.label,
            (100 * point.standard.accuracy, 100 * point.adversarial.accuracy),
            xytext=(dx * to_points, dy * to_points),
            textcoords="offset points",
            ha={-50: "right", 0: "center", 50: "left"}[dx],
            va={-30: "top", 0: "center", 30: "bottom"}[dy],
            fontsize=9,
            color=STYLES[families.index(point.method) % len(STYLES)][1],
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.5", "shrinkB": 4},
        )
        label.set_in_layout(False)
