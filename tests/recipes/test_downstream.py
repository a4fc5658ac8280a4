"""The fine-tuning recipes, offline: tiny archives in the official layouts, small backbones in the published layouts.

Each runs under plain python and under torchrun with two processes, and ends with a run folder that gives the trained
model back.
"""

import json
from pathlib import Path

import pytest
import timm
import torch

import robust_peft as rp
from robust_peft.runs import run_images

ROOT = Path(__file__).parents[2]
OLD_SWIN = ROOT / "tests" / "fixtures" / "swin_timm06_small"

FACTORIES = f"""
import json
from pathlib import Path
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer


def swin(num_classes=10):
    options = json.loads(Path({str(OLD_SWIN.with_suffix(".json"))!r}).read_text())["kwargs"]
    return SwinTransformer(**options | {{"num_classes": num_classes}})


def vit(num_classes=10):
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=num_classes
    )
"""


@pytest.fixture
def files(tmp_path):
    """Factories and weights: an old-layout Swin as timm 0.6.13 saved it, a ViT as its checkpoints are wrapped."""
    (tmp_path / "tiny.py").write_text(FACTORIES)
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=10
    )
    weights = {f"module.{key}": tensor for key, tensor in vit.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "vit.pth")
    return tmp_path


SWIN, VIT = ("swin", OLD_SWIN.with_suffix(".pth")), ("vit", "vit.pth")
QUICK = "--data.partial --data.batch-size 2 --data.workers 1 --optim.epochs 1 --optim.warmup-epochs 0 --attack.steps 1"
QUICK += " --validation.steps 1 --adapter.head-epochs 1 --evaluation.attacks pgd-1 --precision fp32"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", ["cub_swin", "dogs_swin", "dogs_vit", "cifar_swin"])
def test_recipe_on_a_tiny_archive(recipe, processes, files, execute, layouts):
    packed = processes == 1
    archive = files / "archive"
    archive.mkdir()
    if recipe == "cub_swin":
        root, classes, tested = layouts.make_cub(archive, packed=packed), layouts.BIRDS[:3], 9
        assert root.name == ("CUB_200_2011.tgz" if packed else "CUB_200_2011")
    elif recipe.startswith("dogs"):
        root, classes, tested = layouts.make_dogs(archive, packed=packed), layouts.BREEDS[:3], 9
    else:
        root, classes, tested = layouts.make_cifar_parquet(archive), None, 10
    factory, weights = VIT if recipe == "dogs_vit" else SWIN
    size = 32 if recipe == "dogs_vit" else json.loads(OLD_SWIN.with_suffix(".json").read_text())["kwargs"]["img_size"]
    output = files / "run"
    flags = ["--backbone.name", f"{files / 'tiny.py'}:{factory}", "--backbone.checkpoint", files / weights]
    flags += ["--data.root", root, "--output", output, *QUICK.split()]
    home = str(files / "home")
    done = execute(ROOT / "recipes" / f"{recipe}.py", *flags, processes=processes, HF_HOME=home)
    printed = done.stdout + done.stderr
    assert printed.count("Run folder") == 1 and f"n={tested}" in printed

    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "adapter", "state", "evaluation.json", "README.md"}
    description = json.loads((output / "config.json").read_text())
    assert description["image_size"] == size and description["processes"] == processes
    assert description["checkpoint_sha256"]
    if classes is not None:
        assert len(description["classes"]) == len(classes)
    # What comes back is the trained model: on every test image it says what the run's evaluation recorded.
    model, images = rp.load_run(output), run_images(output).test
    assert len(images) == tested
    report = json.loads((output / "evaluation.json").read_text())
    clean = next(row for row in report["results"] if row["attack"] == "clean")
    with torch.no_grad():
        logits = torch.cat([model(images[i][0][None].float() / 255) for i in range(tested)])
    right = (logits.argmax(dim=1) == torch.tensor([int(images[i][1]) for i in range(tested)])).tolist()
    assert right == [verdict == "1" for verdict in clean["verdicts"]]
    # And it is not the model that training started from.
    assert any(
        tensor.abs().max() > 0
        for name, tensor in model.named_parameters()
        if "bottleneck_up" in name and "weight" in name
    )


def test_published_settings_and_what_is_refused(files, execute, layouts):
    archive = files / "archive"
    archive.mkdir()
    root = layouts.make_cub(archive)
    recipe, home = ROOT / "recipes" / "cub_swin.py", str(files / "home")
    flags = ["--backbone.name", f"{files / 'tiny.py'}:vit", "--backbone.checkpoint", files / "vit.pth"]
    flags += ["--data.root", root]
    run = ["--output", files / "run", "--data.partial"]
    small = (
        "--data.limit 2 --data.batch-size 2 --optim.epochs 1 --optim.warmup-epochs 0 --adapter.head-epochs 1".split()
    )
    execute(recipe, "--preset", "roli", *flags, *small, *run, "--evaluation.attacks", "clean", HF_HOME=home)
    config = json.loads((files / "run" / "config.json").read_text())["config"]
    assert config["surgery"]["name"] == "vanilla" and config["surgery"]["lam"] == 1.0
    assert config["attack"]["steps"] == 7 and config["optim"]["lr"] == 0.05 and config["data"]["rotation"] == 0

    def refused(*arguments):
        done = execute(recipe, *arguments, HF_HOME=home, status=2)
        said = (done.stdout + done.stderr).strip().splitlines()[-1]
        assert said.startswith("error: ")
        return said

    # Each of these is one line that says what to do.
    few = refused(*flags, "--output", files / "other")
    assert "11788" in few.replace(",", "") or "5794" in few.replace(",", "")
    assert "should be one of roli" in refused("--preset", "rolly")
    offline = refused("--data.root", root, "--data.partial", "--output", files / "other")
    assert "ARES_Swin_small_patch4_window7_224_AT.pth" in offline and "--backbone.checkpoint" in offline
    offline = refused("--output", files / "other", *flags[:4])
    assert "caltech-ucsd-birds" in offline and "--data.root" in offline
    assert not (files / "other" / "config.json").exists()
