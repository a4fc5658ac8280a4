"""Every recipe runs, tiny and offline, as its docstring says; the long ones under torchrun with two processes too."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robust_peft as rp

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def parquet_files(tmp_path_factory):
    """CIFAR-10's schema with two dozen noise images."""
    import io

    import datasets
    import numpy
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar")
    generator = numpy.random.default_rng(0)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    for name, count in (("train", 24), ("test", 10)):
        rows = {"img": [], "label": []}
        for index in range(count):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=numpy.uint8)).save(file, "PNG")
            rows["img"].append({"bytes": file.getvalue(), "path": None})
            rows["label"].append(index % 10)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def test_quickstart(tmp_path, execute):
    printed = execute(RECIPES / "quickstart.py", "--output", tmp_path, "--limit", "20", "--epochs", "1").stdout
    methods = ["vanilla, lam 0", "vanilla, lam 0.5", "vanilla, lam 1", "CA-AT, gamma 0.8", "CA-AT, gamma 0.9"]
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[2:]] == methods
    assert "adversarial accuracy (AA), %, PGD-10" in table[0] and "n=20 test digits" in printed
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "| method" in (tmp_path / "table.md").read_text()
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["ca-at-0.8", "ca-at-0.9", "vanilla-0", "vanilla-0.5", "vanilla-1"]
    model = rp.load_run(tmp_path / "ca-at-0.8")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    # All else equal: the configs differ in the surgery alone.
    configs = [json.loads((tmp_path / name / "config.json").read_text())["config"] for name in folders]
    surgeries = [config.pop("surgery") for config in configs]
    assert all(config == configs[0] for config in configs) and len({json.dumps(s) for s in surgeries}) == 5
    # A second call does not overwrite unasked.
    again = subprocess.run(
        [sys.executable, RECIPES / "quickstart.py", "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2 and "holds a run" in again.stderr


def test_quickstart_on_two_processes(tmp_path, execute):
    execute(RECIPES / "quickstart.py", "--output", tmp_path, "--limit", "120", "--epochs", "1", processes=2)
    description = json.loads((tmp_path / "ca-at-0.9" / "config.json").read_text())
    assert description["processes"] == 2
    assert "| method" in (tmp_path / "table.md").read_text()


def test_quickstart_scan_leaves_the_test_digits_unseen(tmp_path, execute):
    flags = ["--output", tmp_path, "--eps", "0.1", "--lr", "0.01", "--lam", "0.5", "--limit", "12", "--epochs", "1"]
    printed = execute(RECIPES / "quickstart_scan.py", *flags).stdout
    assert "eps 0.1 lr 0.01 lam 0.5" in printed and "n=12" in printed
    assert "results" not in json.loads((tmp_path / "eps0.1-lr0.01-lam0.5" / "evaluation.json").read_text())
    assert execute(RECIPES / "quickstart_scan.py", *flags).stdout.split("(")[0] == printed.split("(")[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_pretrain_micro_swin(tmp_path, parquet_files, processes, execute):
    flags = ["--data.train", parquet_files / "train.parquet", "--data.test", parquet_files / "test.parquet"]
    flags += ["--output", tmp_path / "run", "--optim.epochs", "1", "--optim.warmup-epochs", "0", "--no-compile"]
    flags += ["--data.batch-size", 8 // processes, "--data.validation-share", "0.2", "--evaluation.attacks", "pgd-1"]
    recipe = RECIPES / "pretrain_micro_swin.py"
    printed = execute(recipe, *flags, "--time-limit", "0", processes=processes).stdout
    assert "the same command and --resume" in printed
    printed = execute(recipe, *flags, "--resume", processes=processes).stdout
    assert printed.count("n=10") == 2 and printed.count("Run folder") == 1
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    assert description["processes"] == processes
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines[:-1]] == [8, 8]
    assert rp.load_run(tmp_path / "run")(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    if processes == 1:
        export = [
            "--source",
            tmp_path / "run",
            "--test",
            parquet_files / "test.parquet",
            "--output",
            tmp_path / "weights",
        ]
        printed = execute(RECIPES / "export_micro_swin.py", *export, "--attacks", "fgsm").stdout
        assert printed.count("n=10") == 2
        assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == [
            f"micro_swin.{e}" for e in ("json", "png", "safetensors")
        ]
        exported = rp.load_backbone("micro_swin", checkpoint=tmp_path / "weights" / "micro_swin.safetensors")
        images = torch.rand(4, 3, 32, 32)
        torch.testing.assert_close(exported(images), rp.load_run(tmp_path / "run")(images), rtol=1e-2, atol=1e-2)


def test_every_recipe_has_a_docstring_that_is_its_command_and_is_tested_here():
    recipes = sorted(path.name for path in RECIPES.glob("*.py"))
    assert recipes
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    # Named as a file, or among the names that a test is parametrised with.
    untested = [name for name in recipes if f'"{name}"' not in tests and f'"{name.removesuffix(".py")}"' not in tests]
    assert untested == []
    for name in recipes:
        docstring = ast.get_docstring(ast.parse((RECIPES / name).read_text()))
        assert docstring and f"recipes/{name}" in docstring
