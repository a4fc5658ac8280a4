"""What all figures share: colours and shapes, the empty figure, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robust_peft.files import write_whole
from robust_peft.results import Accuracy

# Told apart by shape as well as by colour, so that the figure survives a black-and-white printer; the colours are from
# the colour-blind safe palette of Okabe and Ito.
STYLES = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"), ("v", "#E69F00"), ("P", "#56B4E9"))
STYLES += (("X", "#000000"), ("<", "#6A3D9A"), ("*", "#8C564B"), (">", "#7F7F7F"))  # dark ones for a seventh and more
DASHES = ("-", "--", ":", "-.")
FILLS = (("#56B4E9", ""), ("#D55E00", "//"), ("#F0E442", ".."), ("#009E73", "xx"))  # light and dark, plain and hatched
CLOUDS = (("o", "#0072B2"), ("x", "#D55E00"), ("^", "#009E73"), ("+", "#000000"))
NARROW = 5.0  # inches, so that the text is still legible when a phone shows the whole width


def whiskers_of(accuracy: Accuracy) -> tuple[float, float]:
    low, high = accuracy.interval
    return 100 * (accuracy.accuracy - low), 100 * (high - accuracy.accuracy)


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float | None = None, share_x: bool = True
) -> tuple[Any, list[Any]]:
    """A figure of that size in inches, and its axes by rows from top to bottom, which share x."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "robust_peft[plots]".') from error
    if height is None:
        height = 4.8 if rows == 1 else 2.4 * rows
    # Without pyplot, which would keep every figure alive and choose a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, sharex=share_x, squeeze=False).flat)


def save(figure: Any, path: str | Path) -> Path:
    """Write the figure whole; one figure always gives the same SVG, so that a report changes only with its numbers."""
    from matplotlib import rc_context

    path = Path(path)
    kind = path.suffix.removeprefix(".") or "png"
    metadata = {"Date": None} if kind == "svg" else None

    def write(temporary: Path) -> None:
        with rc_context({"svg.hashsalt": "robust_peft"}):  # ids from the content instead of at random
            figure.savefig(temporary, format=kind, metadata=metadata)

    return write_whole(path, write)
