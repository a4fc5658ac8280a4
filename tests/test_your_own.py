"""docs/your_own.md: its Python and its command line, exactly as they stand, on a tiny folder of pictures."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import robust_peft as rp
from robust_peft import cli

PAGE = Path(__file__).parents[1] / "docs" / "your_own.md"
NETWORK = """
from timm.models.vision_transformer import VisionTransformer


def build(num_classes=10):
    return VisionTransformer(
        img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes
    )
"""


def block(language):
    """The one block of code in that language; "" for the one command."""
    found = [text for name, text in re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(), re.S) if name == language]
    return found[-1]


@pytest.fixture
def folder(tmp_path, monkeypatch, layouts, one_thread):
    """What the page presupposes: photos, a network, its weights (pretrained on other classes)."""
    layouts.make_class_folders(tmp_path / "photos", count=6)
    (tmp_path / "my_network.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = VisionTransformer(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "my_weights.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_network", None)


def test_the_python_runs_and_is_short(folder, capsys):
    text = block("python")
    assert 10 < len([line for line in text.splitlines() if line.strip()]) <= 25
    namespace = {}
    exec(compile(text, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "n=18" in printed and "apgd-ce" in printed
    assert (folder / "my-adapter" / "adapter_model.safetensors").is_file()
    assert len((folder / "runs" / "photos-in-python" / "metrics.jsonl").read_text().splitlines()) >= 20
    # All of the pretrained network but its head is still what the file says.
    saved = torch.load(folder / "my_weights.pth", weights_only=True)
    kept = dict(namespace["model"].named_parameters())
    frozen = {name: kept[found] for name in saved for found in kept if found.endswith(f"backbone.{name}")}
    assert len(frozen) > 20 and all(torch.equal(tensor, saved[name]) for name, tensor in frozen.items())


def test_a_broken_picture_is_named_with_what_helps(folder, capsys):
    (folder / "photos" / "train" / "wren" / "999.jpg").write_bytes(b"no picture")
    command = "train finetune --backbone.name my_network.py:build --data.root photos --adapter.head-init random"
    command += " --data.batch-size 8 --optim.epochs 1 --attack.steps 1 --evaluation.attacks clean --data.workers 0"
    assert cli.main([*command.split(), "--output", "runs/broken"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "999.jpg" in said and "--data.skip-broken" in said
    assert cli.main([*command.split(), "--output", "runs/whole", "--data.skip-broken"]) == 0
    assert json.loads((folder / "runs" / "whole" / "config.json").read_text())["skipped_images"] == 1


def test_a_start_that_fails_leaves_no_folder(folder, capsys):
    assert (
        cli.main(["train", "finetune", "--backbone.name", "mikro_swin", "--data.root", "photos", "--output", "runs/x"])
        == 2
    )
    assert "Did you mean micro_swin?" in capsys.readouterr().err
    assert not (folder / "runs" / "x").exists()


def test_the_command_runs(folder, capsys):
    (command,) = [line for line in block("").splitlines() if line.startswith("robust-peft train")]
    small = "--data.batch-size 8 --optim.epochs 1 --optim.warmup-epochs 0 --adapter.head-epochs 1 --attack.steps 1"
    small += " --evaluation.attacks clean --data.workers 0 --output runs/photos"
    status = cli.main([*shlex.split(command)[1:], *small.split()])
    assert status == 0 and "n=18" in capsys.readouterr().out
    description = json.loads((folder / "runs" / "photos" / "config.json").read_text())
    assert description["classes"] == ["heron", "kingfisher", "wren"] and description["image_size"] == 64
    assert rp.load_run("runs/photos")(torch.rand(1, 3, 64, 64)).shape == (1, 3)
