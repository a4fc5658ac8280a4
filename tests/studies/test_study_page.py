"""docs/studies.md: its study and its commands, exactly as they stand, on a tiny folder of pictures."""

import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from robust_peft import cli, studies
from robust_peft.studies import collect, load_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
NETWORK = """
from timm.models.vision_transformer import VisionTransformer


def build(num_classes=10):
    return VisionTransformer(
        img_size=64, patch_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=num_classes
    )
"""


def block(language):
    (found,) = [text for name, text in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S) if name == language]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page presupposes: photos, a network, its weights (pretrained on other classes)."""
    path = ROOT / "tests" / "data" / "official_layouts.py"
    spec = importlib.util.spec_from_file_location("official_layouts", path)
    layouts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layouts)
    layouts.make_class_folders(tmp_path / "photos", count=6)
    (tmp_path / "my_network.py").write_text(NETWORK)
    network = VisionTransformer(img_size=64, patch_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "my_weights.pth")
    (tmp_path / "my_study.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_of_ones_own_is_short_and_has_both_scales(folder):
    assert 10 < len([line for line in block("python").splitlines() if line.strip()]) <= 25
    trial, full = load_study("my_study.py", "trial"), load_study("my_study.py")
    assert len(trial.points()) == 6 and len(full.points()) == 18
    assert f"--array=1-{len(full.points())} " in PAGE
    assert full.points()[0].config.optim.epochs == 40
    with pytest.raises(ValueError, match="KeyError: 'tiny'"):
        load_study("my_study.py", "tiny")


def test_the_commands_run(folder, same_process, monkeypatch, capsys):
    monkeypatch.setattr(studies, "make_engine", lambda name, jobs: same_process())
    report = types.ModuleType("report")  # has tests of its own
    report.write_report = lambda study, records, output: output / f"{len(records)}.html"
    monkeypatch.setitem(sys.modules, "robust_peft.studies.report", report)
    commands = [shlex.split(line) for line in block("").splitlines()]
    assert [command[2] for command in commands] == ["run", "status", "report"]
    for command in commands:
        assert command[0] == "robust-peft" and cli.main(command[1:]) == 0
    said = capsys.readouterr().out
    assert "6 done" in said and "Report: runs/studies/photos-trial/6.html" in said
    records = collect(load_study("my_study.py", "trial"), "runs/studies/photos-trial")
    assert all(record.status == "done" and record.measured[0].accuracy.total > 0 for record in records)
