"""Lines, bars and clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_peft.plots.style import CLOUDS, DASHES, FILLS, NARROW, STYLES, new_figure, save, whiskers_of
from robust_peft.results import Accuracy


def plot_curve(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> Path:
    """Draw named lines ``{name: (x, y)}`` over one another, for example accuracies over epochs."""
    figure, (axes,) = new_figure()
    for place, (name, (x, y)) in enumerate(series.items()):
        marker, colour = STYLES[place % len(STYLES)]
        axes.plot(x, y, marker=marker, color=colour, markersize=5, linewidth=1.5, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False)
    return save(figure, path)


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, x_label: str, title: str
) -> Path:
    """Draw named lines over the steps 0, 1, 2, ... in panels one above another that share them.

    Args:
        panels: ``{y label: {name: values}}``, the first panel on top; a name has one style in all panels.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        x_label: What a step is.
        title: Above the figure.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names:
        raise ValueError("There are no lines to draw.")
    figure, rows = new_figure(len(panels))
    for axes, (y_label, lines) in zip(rows, panels.items(), strict=True):
        for name, values in lines.items():
            marker, colour = STYLES[names.index(name) % len(STYLES)]
            every = max(1, len(values) // 10)
            axes.plot(
                range(len(values)), values, marker=marker, markevery=every, color=colour, markersize=5, linewidth=1.5,
                label=name,
            )  # fmt: skip
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
    rows[0].set_title(title, fontsize=11)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    rows[-1].set_xlabel(x_label)
    rows[0].legend(loc="best", frameon=False)
    return save(figure, path)


def plot_accuracies(
    series: Mapping[str, Sequence[tuple[float, Accuracy]]],
    path: str | Path,
    *,
    x_label: str,
    title: str,
    mark: tuple[float, str] | None = None,
) -> Path:
    """Draw named lines of accuracies, each with its 95 % interval.

    Args:
        series: ``{name: [(x, accuracy), ...]}``.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        x_label: What x is.
        title: Above the figure.
        mark: A value of x to point out with a line, and what it is.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    if not any(series.values()):
        raise ValueError("There are no points to draw.")
    figure, (axes,) = new_figure()
    for place, (name, points) in enumerate(series.items()):
        marker, colour = STYLES[place % len(STYLES)]
        whiskers = list(zip(*[whiskers_of(accuracy) for _, accuracy in points], strict=True))
        axes.errorbar(
            [x for x, _ in points], [100 * accuracy.accuracy for _, accuracy in points], yerr=whiskers, marker=marker,
            color=colour, markersize=5, linewidth=1.5, elinewidth=1, capsize=2, label=name,
        )  # fmt: skip
    if mark is not None:
        axes.axvline(mark[0], color="0.5", linestyle="--", linewidth=1, label=mark[1])
    totals = sorted({accuracy.total for points in series.values() for _, accuracy in points})
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"accuracy (%), n={', '.join(map(str, totals))}")
    axes.set_ylim(-4, 104)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    if len(series) > 4:  # so large a legend has no room beside the lines
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    else:
        axes.legend(loc="best", frameon=False)
    return save(figure, path)


def plot_bars(
    groups: Mapping[str, Mapping[str, Accuracy]],
    path: str | Path,
    *,
    title: str,
    x_label: str | None = None,
    note: str | None = None,
) -> Path:
    """Draw accuracies as bars side by side, each with its 95 % interval and its figure.

    Args:
        groups: ``{group: {what: accuracy}}``, for example ``{"vanilla": {"standard": ..., "PGD-10": ...}}``; a group's
            name is written under its bars, and what a bar is has one fill in all groups.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        title: Above the figure.
        x_label: What the groups are.
        note: A line below the figure.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    kinds = list(dict.fromkeys(kind for bars in groups.values() for kind in bars))
    if not kinds:
        raise ValueError("There are no bars to draw.")
    figure, (axes,) = new_figure(width=NARROW, height=4.2)
    width = 0.8 / len(kinds)
    few = len(groups) * len(kinds) <= 8
    for place, kind in enumerate(kinds):
        colour, hatch = FILLS[place % len(FILLS)]
        shown = [(x, bars[kind]) for x, bars in enumerate(groups.values()) if kind in bars]
        places = [x + (place - (len(kinds) - 1) / 2) * width for x, _ in shown]
        whiskers = list(zip(*[whiskers_of(accuracy) for _, accuracy in shown], strict=True))
        axes.bar(
            places, [100 * accuracy.accuracy for _, accuracy in shown], 0.94 * width, yerr=whiskers, color=colour,
            hatch=hatch, edgecolor="black", linewidth=0.8, error_kw={"elinewidth": 1.2, "capsize": 3}, label=kind,
        )  # fmt: skip
        for x, (_, accuracy) in zip(places, shown, strict=True):
            axes.annotate(
                f"{100 * accuracy.accuracy:.1f}", (x, 100 * accuracy.interval[1]), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=10 if few else 8,
            )  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups))
    totals = sorted({accuracy.total for bars in groups.values() for accuracy in bars.values()})
    axes.set_ylabel(f"accuracy (%), n={', '.join(map(str, totals))}")
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.25)
    if x_label is not None:
        axes.set_xlabel(x_label)
    figure.suptitle(title, fontsize=12)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if max(map(len, kinds)) > 20 else 2, frameon=False
    )
    if note is not None:
        figure.supxlabel(note, fontsize=9)
    return save(figure, path)


def plot_lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | Path,
    *,
    x_label: str,
    title: str,
    log: bool = False,
    ticks: Sequence[float] | None = None,
) -> Path:
    """Draw named lines ``{name: (x, y)}`` in panels one above another that share x.

    Args:
        panels: ``{y label: {name: (x, y)}}``, the first panel on top. A line's style is that of its place in the panel.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        x_label: What x is.
        title: Above the figure.
        log: Both axes logarithmic; what is not positive is left out.
        ticks: Values of x to mark; None: matplotlib's choice.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    if not any(panels.values()):
        raise ValueError("There are no lines to draw.")
    figure, rows = new_figure(len(panels), width=NARROW, height=2.7 * len(panels) + 0.6)
    names = [tuple(lines) for lines in panels.values()]
    for place, (axes, (y_label, lines)) in enumerate(zip(rows, panels.items(), strict=True)):
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            _mark_parts_of_a_decade(axes, [value for _, y in lines.values() for value in y if value > 0])
        for index, (name, (x, y)) in enumerate(lines.items()):
            marker, colour = STYLES[index % len(STYLES)]
            axes.plot(
                x, y, marker=marker, linestyle=DASHES[index % len(DASHES)], color=colour, markersize=6, linewidth=1.8,
                label=name,
            )  # fmt: skip
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        if place == 0 or names[place] != names[place - 1]:  # a legend where it says something new
            axes.legend(loc="best", frameon=False, fontsize=9)
    if ticks is not None:
        rows[-1].set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
        rows[-1].set_xticks([], minor=True)
    figure.suptitle(title, fontsize=12)
    rows[-1].set_xlabel(x_label)
    return save(figure, path)


def _mark_parts_of_a_decade(axes: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic y axis whose values span little more than a decade; matplotlib leaves it bare."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = max(values) / min(values) if values else 1
    if 1 < span < 20:
        tenths = [1 + tenth / 10 for tenth in range(90)]
        marked = tenths if span < 1.4 else [1, 1.5, *range(2, 10)] if span < 4 else [1, 1.5, 2, 3, 5, 7]
        axes.yaxis.set_major_locator(LogLocator(subs=marked))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def plot_scatter(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: str | Path, *, title: str
) -> Path:
    """Draw named clouds of points ``{name: [(x, y), ...]}`` in panels, two beside each other, without axes.

    Args:
        panels: ``{panel's title: {name: points}}``; a cloud's style is that of its place in the panel.
        path: The picture's path; its ending (png, svg, pdf) is the format.
        title: Above the figure.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Where matplotlib is missing; names the extra that brings it.
    """
    if not any(panels.values()):
        raise ValueError("There are no points to draw.")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, places = new_figure(rows, columns, width=NARROW, height=2.4 * rows + 0.9, share_x=False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (heading, clouds) in zip(places, panels.items(), strict=False):
        for index, (name, points) in enumerate(clouds.items()):
            marker, colour = CLOUDS[index % len(CLOUDS)]
            # Hollow circles under small crosses: both are seen where they lie on one another, in grey too.
            face = {"facecolors": "none"} if marker == "o" else {}
            axes.scatter(
                [x for x, _ in points], [y for _, y in points], s=16, marker=marker, linewidths=0.9, label=name,
                **({"edgecolors": colour} | face if face else {"color": colour}),
            )  # fmt: skip
        axes.set_title(heading, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title, fontsize=12)
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, markerscale=1.6)
    return save(figure, path)
