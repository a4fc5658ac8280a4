"""Figures: written whole, with every label, axis and attack in them, also where points coincide."""

import builtins

import pytest

from robust_peft.plots import Point, plot_accuracies, plot_curve, plot_front, plot_panels
from robust_peft.results import Accuracy


def points(*pairs):
    return [
        Point("CA-AT" if i % 2 else "vanilla AT", f"setting {i}", Accuracy(sa, 100), Accuracy(aa, 100))
        for i, (sa, aa) in enumerate(pairs)
    ]


@pytest.mark.parametrize("pairs", [[(90, 40)], [(90, 40), (90, 40), (80, 50)], [(0, 0), (100, 100)]])
def test_every_label_is_in_the_picture(tmp_path, pairs):
    path = plot_front(points(*pairs), tmp_path / "front.svg", attack="PGD-10, L-inf 0.2", title="a title")
    text = path.read_text(encoding="utf-8")
    # matplotlib writes each text as a comment beside its outlines.
    wanted = [f"setting {i}" for i in range(len(pairs))]
    wanted += [
        "adversarial accuracy (%), PGD-10, L-inf 0.2, n=100",
        "standard accuracy (%), n=100",
        "a title",
        "vanilla AT",
    ]
    assert all(f"<!-- {words} -->" in text for words in wanted)


def test_curves(tmp_path):
    path = plot_curve({"one": ([1, 2], [3, 4])}, tmp_path / "curve.png", x_label="epoch", y_label="%", title="t")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_panels_share_their_steps_and_name_their_lines_once(tmp_path):
    panels = {"loss": {"ce": [0.5, 1.0, 2.0], "dlr": [0.4, 0.9, 1.1]}, "standing (%)": {"ce": [90, 50, 40]}}
    text = plot_panels(panels, tmp_path / "p.svg", x_label="step", title="a title").read_text(encoding="utf-8")
    for words in ("loss", "standing (%)", "step", "a title", "ce", "dlr"):
        assert text.count(f"<!-- {words} -->") == 1


def test_accuracies_have_their_counts_and_their_mark(tmp_path):
    points = [(0.0, Accuracy(90, 100)), (0.1, Accuracy(0, 100))]
    path = plot_accuracies({"PGD": points}, tmp_path / "a.svg", x_label="budget", title="t", mark=(0.05, "here"))
    text = path.read_text(encoding="utf-8")
    for words in ("accuracy (%), n=100", "budget", "PGD", "here"):
        assert f"<!-- {words} -->" in text


@pytest.mark.parametrize("draw", [plot_panels, plot_accuracies])
def test_no_lines_to_draw(tmp_path, draw):
    with pytest.raises(ValueError, match="There are no"):
        draw({}, tmp_path / "x.png", x_label="x", title="t")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no points to draw"):
        plot_front([], tmp_path / "front.png", attack="PGD-10", title="t")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "robust_peft\[plots\]"'):
        plot_front(points((90, 40)), tmp_path / "front.png", attack="PGD-10", title="t")
