from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from robust_peft.adapters import (
    BottleneckConfig,
    BottleneckLayer,
    FullModel,
    attach,
    find_attention,
    find_blocks,
    find_head,
)
from robust_peft.adapters.attach import METHODS

# transformers 5.23 deprecates this property; peft 0.21 still reads it whenever it wraps a transformers model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HEADS = {
    "timm_swin": "head.fc",
    "timm_vit": "head",
    "hf_vit": "classifier",
    "hf_swin": "classifier",
    "hf_swinv2": "classifier",
    "wrapped_swin": "backbone.head.fc",
}


class Own(nn.Module):
    """A user's own network: the given names become Linear children, in that order."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_find_head(build_model, wrap, name, head):
    model = build_model(name)
    assert find_head(model) == head
    assert isinstance(model.get_submodule(head), nn.Linear)
    assert find_head(wrap(model)) == f"backbone.{head}"
    assert find_head(wrap(wrap(model))) == f"backbone.backbone.{head}"


def test_find_head_by_what_timm_says_and_by_usual_names(build_model, wrap):
    model = build_model("timm_swin")
    for attribute in ("pretrained_cfg", "default_cfg"):
        setattr(model, attribute, {})  # as in a network made by its class and not by timm.create_model
    assert find_head(model) == "head.fc"  # get_classifier
    renamed = Own("first", "last")
    renamed.pretrained_cfg = {"classifier": "last"}
    assert find_head(renamed) == "last"
    renamed.pretrained_cfg = SimpleNamespace(classifier="first")
    assert find_head(renamed) == "first"
    for name in ("head", "fc", "classifier"):
        assert find_head(Own("stem", name)) == name
        assert find_head(wrap(Own("stem", name))) == f"backbone.{name}"
    # An own head on top of a backbone without one.
    headed = Own("fc")
    headed.features = build_model("timm_swin", num_classes=0)
    assert find_head(headed) == "fc"


def test_find_head_refuses_to_guess(build_model, wrap):
    with pytest.raises(ValueError, match="Expected a classifier head.*in Own.*head=NAME.*last first: b, a"):
        find_head(Own("a", "b"))
    with pytest.raises(ValueError, match="num_classes=0"):
        find_head(build_model("timm_vit", num_classes=0))
    two = nn.Module()
    two.student, two.teacher = build_model("timm_vit"), build_model("timm_swin")
    with pytest.raises(ValueError, match="Found 2: student.head, teacher.head.fc.*head=NAME"):
        find_head(two)
    unclear = wrap(build_model("timm_vit"))
    unclear.fc = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Found 2: backbone.head, fc"):
        find_head(unclear)
    distilled = Own("head", "head_dist")
    distilled.pretrained_cfg = {"classifier": ("head", "head_dist")}
    with pytest.raises(ValueError, match="Found 2: head, head_dist"):
        find_head(distilled)
    assert find_head(Own("fc", "head")) == "head"  # one module: the usual names have an order


@pytest.mark.parametrize(
    ("name", "endings", "count"),
    [
        ("timm_swin", {"attn.qkv"}, 4),
        ("timm_vit", {"attn.qkv"}, 6),
        ("hf_vit", {"attention.q_proj", "attention.v_proj"}, 4),
        ("hf_swin", {"attention.q_proj", "attention.v_proj"}, 8),
        ("hf_swinv2", {"self.query", "self.value"}, 8),
        ("wrapped_swin", {"attn.qkv"}, 4),
    ],
)
def test_lora_adapts_the_attention(build_model, name, endings, count):
    found = find_attention(build_model(name))
    assert len(found) == count
    assert {".".join(key.split(".")[-2:]) for key in found} == endings
    model = attach(build_model(name), "lora")
    adapted = [
        key for key, module in model.get_base_model().named_modules() if isinstance(module, peft.tuners.lora.Linear)
    ]
    assert adapted == found
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 16)
    model.merge_and_unload()  # what the bottleneck's error promises


def test_lora_without_attention():
    with pytest.raises(ValueError, match=r"attention projections.*in Own.*peft\.LoraConfig.*stem, head"):
        attach(Own("stem", "head"), "lora")


def test_a_users_config_is_copied_and_its_choice_of_modules_kept(build_model):
    config = BottleneckConfig(reduction_factor=4)
    before = copy.deepcopy(config)
    model = attach(build_model("timm_vit"), config)
    assert config == before
    assert model.peft_config["default"].modules_to_save == ["head"]
    assert model.peft_config["default"].reduction_factor == 4

    frozen_head = attach(build_model("timm_vit"), BottleneckConfig(modules_to_save=[]))
    assert trainable_names(frozen_head) and not any("head" in name for name in trainable_names(frozen_head))

    lora = peft.LoraConfig(target_modules=["proj"], modules_to_save=["blocks.0.norm1", "head"])
    before = copy.deepcopy(lora)
    model = attach(build_model("timm_vit"), lora)
    assert lora == before
    saved = {name for name in trainable_names(model) if "modules_to_save" in name}
    assert {name.removeprefix("base_model.model.").partition(".modules_to_save")[0] for name in saved} == {
        "blocks.0.norm1",
        "head",
    }


def test_head_argument(build_model):
    model = build_model("timm_vit")
    model.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="Expected a classifier head.*last first: head.2, head.0"):
        attach(copy.deepcopy(model))
    adapted = attach(model, head="head")
    saved = {name for name in trainable_names(adapted) if "modules_to_save" in name}
    assert {name.rpartition("default.")[2] for name in saved} == {"0.weight", "0.bias", "2.weight", "2.bias"}

    for method in METHODS:
        with pytest.raises(
            ValueError, match="head='heads' should name a module.*Found no such module.*last first: head"
        ):
            attach(build_model("timm_vit"), method, head="heads")
    with pytest.raises(ValueError, match="Found Dropout, which has no parameters"):
        attach(build_model("timm_vit"), head="head_drop")
    with pytest.raises(ValueError, match=r"head='head' and modules_to_save=\['norm'\].*should agree"):
        attach(build_model("timm_vit"), BottleneckConfig(modules_to_save=["norm"]), head="head")


def test_no_other_module_is_trained_with_the_head(build_model, wrap):
    """peft compares endings letter by letter, so that "head" would also train "aux_head"."""
    model = build_model("timm_vit")
    model.aux_head = nn.Linear(64, 2)
    with pytest.raises(ValueError, match="'head' should be the end of no other module's name.*Found aux_head"):
        attach(copy.deepcopy(model))
    adapted = attach(wrap(copy.deepcopy(model)))  # the way out that the error names
    assert adapted.peft_config["default"].modules_to_save == ["backbone.head"]
    assert not any("aux_head" in name for name in trainable_names(adapted))

    with pytest.raises(ValueError, match="Found aux_head"):
        attach(copy.deepcopy(model), BottleneckConfig(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="modules_to_save should name modules.*none called 'heat'"):
        attach(build_model("timm_vit"), BottleneckConfig(modules_to_save=["heat"]))


@pytest.mark.parametrize("first", ["bottleneck", "lora", "layernorm", "linear"])
def test_a_model_with_an_adapter_is_refused(build_model, wrap, first):
    model = attach(build_model("timm_vit"), first)
    for taken in (model, model.get_base_model(), wrap(model)):
        with pytest.raises(ValueError, match="expects a model without adapters. Found .*unload.*add_adapter"):
            attach(taken)
    assert isinstance(attach(model.unload()), peft.PeftModel)  # the way out that the error names


def test_bad_methods(build_model):
    with pytest.raises(
        ValueError,
        match="should be one of bottleneck, lora, layernorm, bias, linear, full or a peft config. Found 'lorra'",
    ):
        attach(build_model("timm_vit"), "lorra")
    with pytest.raises(TypeError, match="or a peft config. Found 3"):
        attach(build_model("timm_vit"), 3)
    with pytest.raises(ValueError, match="PromptTuningConfig, which does not. Use LoraConfig"):
        attach(build_model("timm_vit"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def test_linear_has_no_adapter(build_model, tmp_path):
    model = attach(build_model("timm_swin"), "linear")
    assert not any(isinstance(module, BottleneckLayer) for module in model.modules())
    assert len(trainable_names(model)) == 2
    model.save_pretrained(str(tmp_path))
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("head.fc.")[2] for name in saved} == {"weight", "bias"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_mode_is_kept(build_model, method, training):
    model = attach(build_model("timm_vit").train(training), method)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("name", ["timm_swin", "hf_vit", "wrapped_swin"])
def test_full_trains_and_saves_everything(build_model, tmp_path, name):
    images = torch.rand(2, 3, 32, 32)
    base = build_model(name)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    model = attach(base, "full")
    assert isinstance(model, FullModel) and model.get_base_model() is base
    assert len(trainable_names(model)) == len(list(model.parameters())) > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)

    folder = tmp_path / "new" / "run"
    model.save_pretrained(folder, is_main_process=False)
    assert not folder.exists()
    model.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    fresh = build_model(name)
    fresh.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    expected, found = model(images), fresh(images)
    assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))
    with pytest.raises(ValueError, match="expects a folder. Found the file"):
        model.save_pretrained(folder / "model.safetensors")


def test_full_saves_tied_weights_and_survives_a_broken_write(tmp_path, monkeypatch):
    tied = Own("a", "b", "head")
    tied.b.weight = tied.a.weight
    model = attach(tied, "full")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = Own("a", "b", "head")
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(loaded.b.weight, tied.a.weight)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    nn.init.zeros_(tied.a.weight)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_nothing_is_changed_when_attaching_fails(build_model):
    model = build_model("timm_vit")
    names = [name for name, _ in model.named_modules()]
    for method in (BottleneckConfig(blocks=[99]), BottleneckConfig(target_modules=["nowhere"])):
        with pytest.raises(ValueError):
            attach(model, method)
        assert [name for name, _ in model.named_modules()] == names
    assert find_blocks(model)
    attach(model)
