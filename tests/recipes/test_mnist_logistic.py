"""The synthetic experiment's recipe runs as its docstring says, on few digits."""

import json
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def test_mnist_logistic(tmp_path, execute):
    flags = ["--limit", 40, "--epochs", 2, "--budgets", 0.1, 0.3, "--tsne-samples", 20, "--output", tmp_path]
    done = execute(RECIPES / "mnist_logistic.py", *flags, PYTHONWARNINGS="")
    assert done.stderr == ""
    assert "Digits 1 and 2, 40 for training and 40 for test, d = 1024 pixels" in done.stdout
    assert (tmp_path / "tables.md").read_text() in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["budgets"] == [0.1, 0.3] and len(results["rows"]) == 4
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 8 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
