"""The chart of fronts over seeds: means, intervals and edges stand where they should, and files never change."""

import re

import numpy as np
import pytest

from robust_peft.plots import SeedPoint, plot_seed_fronts, seed_fronts
from robust_peft.results import mean_interval

POINTS = [
    SeedPoint("vanilla", "0", ((0.70, 0.50), (0.72, 0.48), (0.74, 0.52))),
    SeedPoint("vanilla", "1", ((0.90, 0.20), (0.92, 0.22), (0.91, 0.21))),
    SeedPoint("vanilla", "0.5", ((0.60, 0.10), (0.62, 0.12), (0.61, 0.11))),
    SeedPoint("CA-AT", "0.8", ((0.80, 0.40),)),
]
NAMES = {"attack": "AutoAttack, L-inf 8/255", "title": "MNIST", "samples": 200}


@pytest.fixture
def axes(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(seed_fronts, "save", lambda figure, path: kept.append(figure) or path)
    plot_seed_fronts(POINTS, tmp_path / "x.svg", **NAMES)
    return kept[0].axes[0]


def test_points_edges_and_intervals(axes):
    lines = [line for line in axes.lines if len(line.get_xdata())]
    large = {tuple(np.round(line.get_xydata()[0], 6)): line for line in lines if line.get_markersize() > 8}
    assert set(large) == {(72.0, 50.0), (91.0, 21.0), (61.0, 11.0), (80.0, 40.0)}
    assert large[61.0, 11.0].get_markerfacecolor() == "white"  # dominated
    assert large[72.0, 50.0].get_markerfacecolor() != "white"
    (edge,) = [line for line in lines if len(line.get_xdata()) == 2 and line.get_drawstyle() == "steps-pre"]
    assert edge.get_xydata() == pytest.approx(np.array([[72, 50], [91, 21]]))
    spans = [s for bar in axes.containers for lines in bar.lines[2] for s in lines.get_segments()]
    low, high = mean_interval([70, 72, 74])
    assert any(s[:, 0] == pytest.approx([low, high]) and s[:, 1] == pytest.approx([50, 50]) for s in spans)
    assert len(spans) == 6  # none for the single seed


def test_of_equal_points_both_are_seen(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(seed_fronts, "save", lambda figure, path: kept.append(figure) or path)
    plot_seed_fronts([SeedPoint(f, "", ((0.5, 0.4),)) for f in "abcdef"], tmp_path / "x.svg", **NAMES)
    sizes = [line.get_markersize() for line in kept[0].axes[0].lines if line.get_zorder() == 3]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) == 6 and sizes[-1] >= 5


def test_words_and_sameness(tmp_path):
    first = plot_seed_fronts(POINTS, tmp_path / "a.svg", **NAMES).read_bytes()
    assert plot_seed_fronts(POINTS, tmp_path / "b.svg", **NAMES).read_bytes() == first
    words = re.findall(r"<!-- (.*?) -->", first.decode())
    for wanted in ("MNIST", "vanilla", "CA-AT", "0.8", "standard accuracy (%), n=200, 1 to 3 seeds"):
        assert wanted in words, wanted
    assert " ".join(words).count("AutoAttack, L-inf 8/255") == 1


def test_a_label_without_room_is_left_out_and_none_lies_on_another(tmp_path):
    crowd = [SeedPoint("one", f"a long label {i}", ((0.5 + i / 1e4, 0.5),)) for i in range(60)]
    words = re.findall(r"<!-- (a long.*?) -->", plot_seed_fronts(crowd, tmp_path / "c.svg", **NAMES).read_text())
    assert 5 < len(set(words)) < 60


@pytest.mark.parametrize("points", [[], [SeedPoint("a", "b", ())]])
def test_nothing_to_draw(tmp_path, points):
    with pytest.raises(ValueError, match="no points to draw"):
        plot_seed_fronts(points, tmp_path / "x.svg", **NAMES)
