"""The studies' figures: every label, count and interval is in them."""

import re

import pytest

from robust_peft.plots import plot_bars, plot_lines, plot_scatter
from robust_peft.results import Accuracy

BARS = {
    "vanilla": {"standard": Accuracy(90, 100), "PGD": Accuracy(42, 100)},
    "CA-AT": {"standard": Accuracy(93, 100), "PGD": Accuracy(0, 100)},
}


def texts(path):
    """matplotlib writes each text as a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_bars(tmp_path):
    path = plot_bars(BARS, tmp_path / "b.svg", title="a title", x_label="method", note="a note")
    shown = texts(path)
    for words in (*BARS, "standard", "PGD", "a title", "method", "a note", "accuracy (%), n=100"):
        assert shown.count(words) == 1, words
    assert {"90.0", "42.0", "93.0", "0.0"} <= set(shown)


def test_bars_stand_where_their_accuracies_say(tmp_path, monkeypatch):
    from robust_peft.plots import charts as plots

    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure) or path)
    plot_bars(BARS, tmp_path / "b.png", title="t")
    (axes,) = kept[0].axes
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([90, 93, 42, 0])
    (low, high) = Accuracy(90, 100).interval
    bars = next(container for container in axes.containers if hasattr(container, "patches"))
    segment = bars.errorbar.lines[2][0].get_segments()[0]
    assert segment[:, 1].tolist() == pytest.approx([100 * low, 100 * high])
    # Neighbours do not overlap, and fills differ by hatch too.
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
    assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))
    assert len({patch.get_hatch() for patch in axes.patches}) == 2


@pytest.mark.parametrize("log", [False, True])
def test_lines(tmp_path, log):
    panels = {"above": {"mu": ([1, 2, 3], [1, 4, 9])}, "below": {"mu": ([1, 2, 3], [2, 3, 0])}}
    path = plot_lines(panels, tmp_path / "l.svg", x_label="budget", title="a title", log=log, ticks=[1, 2, 3])
    shown = texts(path)
    for words in ("above", "below", "budget", "a title", "mu", "1", "2", "3"):
        assert words in shown, words
    assert shown.count("mu") == 1  # a second legend would say the same


@pytest.mark.parametrize("top", [1.03, 1.1, 1.6, 3, 12, 50])
def test_a_logarithmic_axis_is_marked_however_little_it_spans(tmp_path, top):
    panels = {"MB": {"measured": ([1, 1000], [6.4, 6.4 * top])}}
    shown = texts(plot_lines(panels, tmp_path / "l.svg", x_label="x", title="t", log=True, ticks=[1, 1000]))
    marks = [float(words) for words in shown if re.fullmatch(r"[\d.]+", words) and words not in ("1", "1000")]
    within = [mark for mark in marks if 6 <= mark <= 7 * top]
    assert len(within) >= 2 or top == 50, shown  # above, matplotlib's own powers of ten


def test_a_panel_with_other_lines_has_its_own_legend(tmp_path):
    panels = {"above": {"one": ([1], [1])}, "below": {"two": ([1], [2])}}
    shown = texts(plot_lines(panels, tmp_path / "l.svg", x_label="x", title="t"))
    assert "one" in shown and "two" in shown


@pytest.mark.parametrize("count", [1, 2, 3])
def test_scatter(tmp_path, count):
    panels = {f"panel {i}": {"g_c": [(0, i), (1, 2)], "g_a": [(3, 4)]} for i in range(count)}
    shown = texts(plot_scatter(panels, tmp_path / "s.svg", title="a title"))
    assert [words for words in shown if words.startswith("panel")] == list(panels)
    assert shown.count("g_c") == shown.count("g_a") == shown.count("a title") == 1


def test_nothing_to_draw(tmp_path):
    for draw in (
        lambda: plot_bars({}, tmp_path / "x.png", title="t"),
        lambda: plot_lines({}, tmp_path / "x.png", title="t", x_label="x"),
        lambda: plot_scatter({}, tmp_path / "x.png", title="t"),
    ):
        with pytest.raises(ValueError, match="There are no"):
            draw()
    assert not list(tmp_path.iterdir())
