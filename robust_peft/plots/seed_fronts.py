"""Fronts of families of methods over seeds: standard against adversarial accuracy."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_peft.plots.style import DASHES, STYLES, new_figure, save
from robust_peft.results import FEWEST_SEEDS, mean_interval, non_dominated

WIDTH, HEIGHT = 5.4, 5.0  # inches: the text stays legible on a phone
LEGEND_LETTERS, LABEL_LETTERS, AXIS_LETTERS = 58, 22, 52


@dataclass(frozen=True)
class SeedPoint:
    """One method in the plane of standard and adversarial accuracy.

    Attributes:
        family: Its members share shape and colour and make up one front.
        label: What tells it from the family's others.
        of_seeds: Standard and adversarial accuracy of each seed, as fractions.
    """

    family: str
    label: str
    of_seeds: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> tuple[float, float]:
        """Means over seeds, in percent."""
        count = len(self.of_seeds)
        return 100 * sum(x for x, _ in self.of_seeds) / count, 100 * sum(y for _, y in self.of_seeds) / count


def plot_seed_fronts(points: Sequence[SeedPoint], path: str | Path, *, attack: str, title: str, samples: int) -> Path:
    """Draw each family's points and join its non-dominated ones by the edge of the area that they dominate.

    A point is the mean over seeds; small dots are its seeds, and three seeds or more have a 95 % t-interval. Filled:
    non-dominated within the family. A label for which there is no free place is left out.

    Args:
        points: The methods; families in the order in which they get their styles.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        attack: Name of the attack with its budget, for the axis.
        title: Above the figure.
        samples: Images that each accuracy was counted on.

    Raises:
        ValueError: If there are no points, or one without seeds.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    if not points or not all(point.of_seeds for point in points):
        raise ValueError("There are no points to draw, or one has no seeds.")
    families = list(dict.fromkeys(point.family for point in points))
    figure, (axes,) = new_figure(width=WIDTH, height=HEIGHT + 0.2 * len(families))
    for place, family in enumerate(families):
        _draw_family(axes, [point for point in points if point.family == family], place)
    _set_limits(axes, points)
    seeds = sorted({len(point.of_seeds) for point in points})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    axes.set_xlabel(_wrapped(f"standard accuracy (%), n={samples}, {counted} seed{'' if seeds == [1] else 's'}"))
    axes.set_ylabel(_wrapped(f"adversarial accuracy (%), {attack}, n={samples}"))
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.suptitle(_wrapped(title), fontsize=12)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=_columns(names), frameon=False, fontsize=10)
    figure.canvas.draw()  # settles the layout, which the labels' places are measured in
    _label(axes, points)
    return save(figure, path)


def _draw_family(axes: Any, members: Sequence[SeedPoint], place: int) -> None:
    marker, colour = STYLES[place % len(STYLES)]
    dash = DASHES[place % len(DASHES)]
    size = max(10 - place, 5)  # later families are drawn over earlier ones: of equal points both are to be seen
    best = [members[i] for i in non_dominated([point.mean for point in members])]
    for point in members:
        (x, y), filled = point.mean, point in best
        axes.plot(
            [100 * a for a, _ in point.of_seeds], [100 * b for _, b in point.of_seeds], linestyle="", marker=".",
            markersize=3, color=colour, alpha=0.6,
        )  # fmt: skip
        if len(point.of_seeds) >= FEWEST_SEEDS:
            spans = [mean_interval([100 * pair[axis] for pair in point.of_seeds]) for axis in (0, 1)]
            # Never below zero, where all seeds are equal and the two sums differ by rounding.
            widths = [[[max(0.0, span[1] - (x, y)[axis])]] * 2 for axis, span in enumerate(spans) if span is not None]
            axes.errorbar([x], [y], xerr=widths[0], yerr=widths[1], fmt="none", color=colour, elinewidth=0.8, alpha=0.7)
        axes.plot(
            [x], [y], marker=marker, linestyle="", markersize=size, color=colour, zorder=3,
            markerfacecolor=colour if filled else "white", markeredgewidth=1.3,
        )  # fmt: skip
    edge = sorted(point.mean for point in best)
    axes.plot([x for x, _ in edge], [y for _, y in edge], drawstyle="steps-pre", linestyle=dash, color=colour, lw=1.2)
    name = textwrap.fill(members[0].family, LEGEND_LETTERS)
    axes.plot([], [], marker=marker, linestyle=dash, color=colour, markersize=7, lw=1.2, label=name)


def _set_limits(axes: Any, points: Sequence[SeedPoint]) -> None:
    """Room for seeds and intervals, and for labels around them; percentages end at 0 and 100."""
    axes.margins(0.12)
    axes.autoscale_view()
    for axis, (low, high) in (("x", axes.get_xlim()), ("y", axes.get_ylim())):
        middle, half = (low + high) / 2, max((high - low) / 2, 1.0)  # one point alone is no excuse for a huge zoom
        axes.set(**{f"{axis}lim": (max(middle - half, -3), min(middle + half, 103))})


def _wrapped(text: str) -> str:
    return textwrap.fill(text, AXIS_LETTERS)


def _columns(names: Sequence[str]) -> int:
    longest = max(len(line) for name in names for line in name.split("\n"))
    return 3 if longest <= 12 and len(names) > 2 else 2 if longest <= 24 and len(names) > 1 else 1


Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""


def _label(axes: Any, points: Sequence[SeedPoint]) -> None:
    """Write each label into the nearest free place around its point, if there is one."""
    scale = axes.figure.dpi / 72
    renderer = axes.figure.canvas.get_renderer()
    corners = axes.get_window_extent(renderer)
    inside = (corners.x0, corners.y0, corners.x1, corners.y1)
    centres = [tuple(axes.transData.transform(point.mean)) for point in points]
    taken = [_around(x, y, 6 * scale) for x, y in centres]
    dots = [axes.transData.transform((100 * x, 100 * y)) for point in points for x, y in point.of_seeds]
    small = [_around(x, y, 1.5 * scale) for x, y in dots]
    families = list(dict.fromkeys(point.family for point in points))
    for point, centre in zip(points, centres, strict=True):
        if not point.label:
            continue
        colour = STYLES[families.index(point.family) % len(STYLES)][1]
        said = textwrap.shorten(point.label, LABEL_LETTERS, placeholder="…") or point.label[: LABEL_LETTERS - 1] + "…"
        text = axes.annotate(
            said, point.mean, textcoords="offset points", xytext=(0, 0), ha="center", va="center", fontsize=9,
            color=_darkened(colour), bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.45", "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        width, height = size.width + 2 * scale, size.height + 1 * scale
        free = []
        for dx, dy, box in _places(centre, width, height, scale):
            if _within(box, inside) and not any(_overlap(box, other) for other in taken):
                distance = math.hypot(dx, dy) / scale + 3 * sum(_overlap(box, other) for other in small)
                free.append((distance, dx, dy, box))
        if not free:
            text.remove()
            continue
        _, dx, dy, box = min(free)
        text.set_position((dx / scale, dy / scale))
        taken.append(box)


def _places(centre: tuple[float, float], width: float, height: float, scale: float) -> Iterator[tuple]:
    """Offsets of a label's middle from its point, near ones first, each with the label's box there."""
    for gap in (8, 14, 22, 32, 44, 58):
        for step in range(16):
            angle = step * math.pi / 8
            # On an ellipse around the point, so that the label's edge and not its middle is at that distance.
            dx = math.cos(angle) * (gap * scale + width / 2)
            dy = math.sin(angle) * (gap * scale + height / 2)
            x, y = centre[0] + dx, centre[1] + dy
            yield dx, dy, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _darkened(colour: str) -> str:
    """Two thirds as bright, so that small letters are legible on white."""
    return "#" + "".join(f"{int(colour[i : i + 2], 16) * 2 // 3:02x}" for i in (1, 3, 5))


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]
