"""Figures: written whole, with every label, axis and attack in them, also where points coincide."""

import builtins

import pytest

from robust_peft.plots import Point, plot_curve, plot_front
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
