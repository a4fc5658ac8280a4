"""A model by whatever names it: a run folder, a name of the zoo, a Python file; and what is none of these."""

import json

import pytest
import torch
import transformers

import robust_peft as rp
from robust_peft import runs
from robust_peft.config import AdapterConfig, AttackConfig, BackboneConfig, EvaluationConfig, OptimConfig, RunConfig
from robust_peft.data import Splits
from robust_peft.models import zoo
from robust_peft.models.micro_swin import micro_swin
from robust_peft.runs import parts as run_parts


def refusal(source, kind=ValueError, **options):
    with pytest.raises(kind) as caught:
        runs.load_model(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run_folder(monkeypatch, tmp_path):
    """A run of one step of a narrow backbone on noise."""

    def narrow(num_classes=10, *, image_size=32, **_):
        return micro_swin(num_classes, image_size=image_size, width=16, depths=(1, 1), num_heads=(1, 2))

    monkeypatch.setattr(zoo, "micro_swin", narrow)
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images = rp.data.ImageSet(noise, torch.tensor([0, 1, 2, 0]), tuple("abc"), "noise")
    monkeypatch.setattr(run_parts, "load_splits", lambda name, **_: Splits(images, None, None))
    config = RunConfig(
        backbone=BackboneConfig(checkpoint="random"),
        adapter=AdapterConfig(name="linear"),
        attack=AttackConfig(steps=1),
        optim=OptimConfig(epochs=1),
        evaluation=EvaluationConfig(attacks=()),
        precision="fp32",
    )
    runs.run(config, tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_a_run_folder(run_folder):
    assert runs.is_run(run_folder) and runs.is_run(str(run_folder)) and not runs.is_run(run_folder.parent)
    model = runs.load_model(str(run_folder))
    images = torch.rand(2, 3, 32, 32)
    assert not model.training and torch.equal(model(images), runs.load_run(run_folder)(images))
    assert "run folder, which knows its own checkpoint, num_classes" in refusal(
        run_folder, checkpoint="random", num_classes=3
    )


def test_names_of_the_zoo():
    model = runs.load_model("timm/test_vit", checkpoint="random", num_classes=5, image_size=32, mean=(0, 0, 0))
    assert isinstance(model, rp.Normalized) and not any(module.training for module in model.modules())
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5) and model.mean.flatten().tolist() == [0, 0, 0]


def test_a_name_of_the_zoo_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "micro_swin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(runs.load_model("micro_swin", checkpoint="random"), rp.Normalized)


def test_a_python_file(tmp_path):
    text = "from torch import nn\ndef build(): return nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(12, 4))\n"
    (tmp_path / "net.py").write_text(text)
    model = runs.load_model(f"{tmp_path / 'net.py'}:build")
    assert not any(module.training for module in model.modules())
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 4)
    with pytest.raises(FileNotFoundError, match="absent.py does not exist"):
        runs.load_model(f"{tmp_path / 'absent.py'}:build")
    assert "has no 'make'" in refusal(f"{tmp_path / 'net.py'}:make")
    assert "Name the function" in refusal(str(tmp_path / "net.py"))


def test_a_folder_that_is_no_run(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "holds no run." in message
    assert all(kind in message for kind in ("run folder", "micro_swin", "timm/NAME", "hf/NAME", "module.py:factory"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert not runs.is_run(tmp_path)
    assert f'saved is "hf/{tmp_path}"' in refusal(tmp_path)


def test_a_folder_of_transformers_by_its_prefix(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, num_labels=3
    )
    config.patch_size = 4
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    assert runs.load_model(f"hf/{tmp_path}")(torch.rand(1, 3, 8, 8)).shape == (1, 3)


def test_weights_without_an_architecture(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    assert "weights go with an architecture" in refusal(path)


@pytest.mark.parametrize("source", ["runs/absent", "resnet50", "microswin"])
def test_what_is_not_there(source):
    message = refusal(source)
    assert f"Found {source!r}, and there is no such folder" in message and "run folder" in message
