"""Which parameters "layernorm" and "bias" select, and what only they have; the battery is in test_bottleneck.py."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from robust_peft.adapters import SelectedConfig, attach, find_selected

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class OwnNorm(nn.Module):
    """Neither torch's nor a descendant of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return x * self.weight / x.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()


class Norms(nn.Module):
    """A convolutional network with one normalisation layer of each kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norms = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), OwnNorm(), nn.InstanceNorm2d(4, affine=True))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(36, 8, bias=False), nn.LayerNorm(8), nn.RMSNorm(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.last(self.plain(self.norms(self.stem(x)))))


class Attention(nn.Module):
    """torch's attention reads the bias of its out_proj, which it never calls."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(dim=1))


def images() -> torch.Tensor:
    return torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def selected(model: nn.Module, select: str) -> set[str]:
    """Names in the network of what would train, without the head."""
    config = SelectedConfig(select=select, modules_to_save=["head"])
    return {f"{module}.{name}" for module, names in find_selected(model, config).items() for name in names}


def moved(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    model.eval()


def test_normalisation_layers_of_every_kind():
    norms = {f"norms.{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")} | {"norms.2.weight"}
    assert selected(built(Norms), "layernorm") == norms | {"last.2.weight", "last.2.bias", "last.3.weight"}


def test_biases_of_every_kind():
    expected = {"stem.bias", "norms.0.bias", "norms.1.bias", "norms.3.bias", "last.2.bias"}
    assert selected(built(Norms), "bias") == expected
    assert selected(built(Attention), "bias") == {"attn.in_proj_bias", "attn.out_proj.bias"}


@pytest.mark.parametrize("select", ["layernorm", "bias"])
@pytest.mark.parametrize("name", ["timm_swin", "timm_vit", "hf_swin", "hf_swinv2"])
def test_transformers_by_the_names_of_their_parameters(build_model, name, select):
    """Biases: all that ends in "bias". LayerNorms: what belongs to nn.LayerNorm. The head's own are not among them."""
    model = build_model(name)
    head = ("head.", "classifier.")
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {
        key
        for key, _ in model.named_parameters()
        if not key.startswith(head) and (key.endswith("bias") if select == "bias" else key.rpartition(".")[0] in layers)
    }
    adapted = attach(model, select)
    found = {key for key, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" not in key}
    short = {key.removeprefix("base_model.model.").replace(".0.selected_copies.default", "") for key in found}
    assert {key.replace("parametrizations.", "") for key in short} == expected
    assert len(expected) > 8


def test_biases_that_are_no_vectors_are_left_alone():
    """Swin's tables of relative position biases, also where a network calls them "..._bias"."""
    model = timm.create_model("levit_128s", num_classes=3).eval()  # attention_biases: one row for each head
    names = {key.rpartition(".")[2] for key in selected(model, "bias")}
    assert names == {"bias"}
    swin = timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=16, depths=(1, 1))
    names = {key.rpartition(".")[2] for key in selected(swin, "bias")}
    assert names == {"bias", "q_bias", "v_bias"}


@pytest.mark.parametrize(("kind", "select"), [(Norms, "layernorm"), (Norms, "bias"), (Attention, "bias")])
def test_all_that_is_selected_trains_is_saved_and_comes_back(tmp_path, kind, select):
    """Running statistics of trained BatchNorms included; those of other BatchNorms are a matter of the trainer."""
    x = images() if kind is Norms else images().flatten()[:96].view(4, 3, 8)
    model = attach(built(kind), select)
    torch.testing.assert_close(model(x), built(kind)(x), rtol=0, atol=0)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    if kind is Norms:
        model.get_base_model().plain.momentum = 0.0  # its statistics stay
    moved(model, x)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
    assert changed == {key for key, p in model.named_parameters() if p.requires_grad}

    model.save_pretrained(str(tmp_path))
    saved = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    statistics = {f"norms.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    expected = selected(built(kind), select) | {"head.weight", "head.bias"}
    assert saved == (expected | statistics if kind is Norms else expected)
    loaded = peft.PeftModel.from_pretrained(built(kind), str(tmp_path)).eval()
    with torch.no_grad():  # which attention kernel torch takes depends on what needs gradients
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_merging_and_unloading():
    x = images()
    model = attach(built(Norms), "bias")
    moved(model, x)
    trained, names = model(x), set(built(Norms).state_dict())
    merged = copy.deepcopy(model).merge_and_unload()  # and the model that it is a copy of stays whole
    torch.testing.assert_close(model(x), trained, rtol=0, atol=0)
    assert type(merged.norms[1]) is nn.GroupNorm and set(merged.state_dict()) == names
    torch.testing.assert_close(merged(x), trained, rtol=0, atol=0)
    base = model.unload()
    assert set(base.state_dict()) == names
    for (key, found), expected in zip(base.named_parameters(), built(Norms).parameters(), strict=True):
        assert torch.equal(found, expected) or key.startswith("head."), key  # peft leaves a trained head in place


def test_several_adapters():
    model = attach(built(Norms), "bias")
    model.add_adapter("second", SelectedConfig(select="bias", modules_to_save=["head"]))
    model.get_base_model().norms[1].parametrizations.bias[0].set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"One adapter.*Found \['default', 'second'\]"):
        model(images())
    with pytest.raises(ValueError, match="should select the same. Found bias, layernorm"):
        model.add_adapter("third", SelectedConfig(select="layernorm", modules_to_save=["head"]))


def test_what_is_refused():
    with pytest.raises(ValueError, match="select should be one of layernorm, bias. Found 'norm'"):
        SelectedConfig(select="norm")
    with pytest.raises(ValueError, match="Put a single name into a list"):
        SelectedConfig(modules_to_save="head")
    with pytest.raises(ValueError, match="target_modules should be None"):
        SelectedConfig(target_modules="norm")
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Expected normalisation layers.*in Sequential. Found none"):
        attach(model, "layernorm", head="1")
    with pytest.raises(ValueError, match="Expected biases outside the head in Sequential. Found none"):
        attach(model, "bias", head="1")


def test_compiles_without_a_graph_break(build_model):
    model = attach(build_model("timm_vit"), "bias")
    x = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
