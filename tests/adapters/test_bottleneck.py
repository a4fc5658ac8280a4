"""One battery for every adapter over every kind of network, then what only the bottleneck has."""

from __future__ import annotations

import copy
import itertools
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from robust_peft.adapters import BottleneckConfig, BottleneckLayer, attach, find_blocks
from robust_peft.adapters.bottleneck.register import register

pytestmark = [
    # transformers 5.23 deprecates this property; peft 0.21 still reads it whenever it wraps a transformers model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft's LN tuning warns about every LayerNorm that it is made for.
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm.* encountered:UserWarning"),
]

MODELS = ("timm_swin", "timm_vit", "hf_vit", "hf_swin", "hf_swinv2", "wrapped_swin")
METHODS = ("bottleneck", "lora", "ln_tuning", "linear")
CASES = list(itertools.product(MODELS, METHODS))
CASES += list(itertools.product(("timm_vit", "hf_swinv2", "wrapped_swin"), ("layernorm", "bias")))
HEADS = {
    "timm_swin": "head.fc",
    "timm_vit": "head",
    "hf_vit": "classifier",
    "hf_swin": "classifier",
    "hf_swinv2": "classifier",
    "wrapped_swin": "backbone.head.fc",
}
# The part of a parameter's name that shows that it belongs to the method's own tensors.
MARKS = {"bottleneck": ".bottleneck_", "lora": ".lora_", "ln_tuning": ".ln_tuning_layers.", "linear": None}
MARKS |= dict.fromkeys(("layernorm", "bias"), ".selected_copies.")


def make_method(model_name: str, method: str):
    if method != "ln_tuning":
        return method
    norms = ["layernorm_before", "layernorm_after"] if model_name.startswith("hf") else ["norm1", "norm2"]
    return peft.LNTuningConfig(target_modules=norms)


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return getattr(output, "logits", output)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also the buffers that a state dict leaves out."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def train(model: nn.Module, steps: int) -> None:
    images, labels = batch()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(model, images), labels).backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda pair: "-".join(pair))
def case(request, build_model):
    """An attached model before and after 100 steps of training. Tests must leave `trained` as they found it."""
    name, method = request.param
    torch.manual_seed(2)
    trained = attach(build_model(name), make_method(name, method))
    before = snapshot(trained)
    start = copy.deepcopy(trained)
    train(trained, steps=100)
    return SimpleNamespace(
        name=name,
        method=method,
        start=start,
        trained=trained,
        before=before,
        after=snapshot(trained),
        own={key for key in before if MARKS[method] and MARKS[method] in key},
        head={key for key in before if f".{HEADS[name]}.modules_to_save.default." in key},
        images=batch()[0],
        fresh=lambda: build_model(name),
    )


@torch.no_grad()
def test_equals_its_base_at_the_start(case):
    expected = logits_of(case.fresh(), case.images)
    torch.testing.assert_close(logits_of(case.start, case.images), expected, rtol=0, atol=1e-6)


def test_exactly_adapter_and_head_require_gradients(case):
    assert len(case.head) == 2  # weight and bias
    assert bool(case.own) == (case.method != "linear")
    for model in (case.start, case.trained):
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == case.own | case.head


def test_training_moves_every_adapter_tensor_and_the_head_and_nothing_else(case):
    assert case.before.keys() == case.after.keys()
    moved = {name for name, tensor in case.before.items() if not torch.equal(tensor, case.after[name])}
    assert moved == case.own | case.head


@torch.no_grad()
def test_saved_files_hold_adapter_and_head_and_load_into_a_fresh_base(case, tmp_path):
    case.trained.save_pretrained(str(tmp_path))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    shorter = {name.replace(".modules_to_save.default.", ".").replace(".default", "") for name in case.own | case.head}
    if case.method in ("layernorm", "bias"):  # saved under the names that they have in the network
        shorter = {re.sub(r"\.parametrizations\.(\w+)\.0\.selected_copies", r".\1", name) for name in shorter}
    assert saved.keys() == shorter

    loaded = peft.PeftModel.from_pretrained(case.fresh(), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, case.images), logits_of(case.trained, case.images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    resumed = peft.PeftModel.from_pretrained(case.fresh(), str(tmp_path), is_trainable=True)
    assert {name for name, tensor in resumed.named_parameters() if tensor.requires_grad} == case.own | case.head


@torch.no_grad()
def test_disabling_gives_the_base_back(case):
    expected = logits_of(case.fresh(), case.images)
    trained = logits_of(case.trained, case.images)
    with case.trained.disable_adapter():
        assert torch.equal(logits_of(case.trained, case.images), expected)
    assert torch.equal(logits_of(case.trained, case.images), trained)
    assert not torch.allclose(trained, expected, atol=1e-3)


def test_named_adapters_switch(case):
    model = copy.deepcopy(case.trained)
    first = logits_of(model, case.images)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert torch.equal(logits_of(model, case.images), first)  # adding does not activate
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == case.own | case.head

    model.set_adapter("second")
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable == {name.replace(".default", ".second") for name in case.own | case.head}
    torch.testing.assert_close(
        logits_of(model, case.images), logits_of(case.fresh(), case.images), rtol=0, atol=1e-6
    )  # a new adapter starts at the base
    train(model, steps=2)
    assert not torch.equal(logits_of(model, case.images), first)

    model.set_adapter("default")
    assert torch.equal(logits_of(model, case.images), first)


def test_deepcopy_is_equal_and_independent(case):
    expected = logits_of(case.trained, case.images)
    model = copy.deepcopy(case.trained)
    assert torch.equal(logits_of(model, case.images), expected)
    train(model, steps=2)
    assert not torch.equal(logits_of(model, case.images), expected)
    assert torch.equal(logits_of(case.trained, case.images), expected)


def test_gradient_reaches_the_input(case):
    images = case.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logits_of(case.trained, images).logsumexp(-1).sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("precision", ["bf16 model", "autocast", "bf16 model under autocast", "float64 model"])
def test_other_precisions_run_forward_and_backward(case, precision):
    dtype = torch.float64 if "float64" in precision else torch.bfloat16
    model = case.fresh()
    if "model" in precision:
        model = model.to(dtype)
    images = case.images if "autocast" in precision else case.images.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
        # Without gradients: which attention kernel torch takes, and so the rounding, depends on what needs gradients.
        with torch.no_grad():
            expected = logits_of(model, images)
            model = attach(model, make_method(case.name, case.method))
            assert torch.equal(logits_of(model, images), expected)
        logits = logits_of(model, images)
    assert logits.dtype == dtype
    logits.float().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


# What only the bottleneck has.


def plain_parameters(layer: BottleneckLayer, name: str = "default") -> list[torch.Tensor]:
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    return [down.weight, down.bias, up.weight, up.bias]


def layers_of(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_in_every_block_and_nowhere_else(build_model, name):
    blocks = find_blocks(build_model(name))
    count = {"timm_vit": 6, "hf_vit": 2}.get(name, 4)
    assert len(blocks) == count
    assert all(block.endswith((".mlp", ".output.dense")) and "attention.output" not in block for block in blocks)
    model = attach(build_model(name))
    assert [
        key for key, module in model.get_base_model().named_modules() if isinstance(module, BottleneckLayer)
    ] == blocks


def test_hidden_width_follows_each_stage(build_model):
    model = attach(build_model("timm_swin"), BottleneckConfig(reduction_factor=8))
    assert [tuple(layer.bottleneck_down["default"].weight.shape) for layer in layers_of(model)] == [
        (2, 16),
        (2, 16),
        (4, 32),
        (4, 32),
    ]
    model = attach(build_model("timm_swin"), BottleneckConfig(reduction_factor=1000))
    assert {layer.bottleneck_down["default"].out_features for layer in layers_of(model)} == {1}


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", nn.functional.gelu),
        ("relu", torch.relu),
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("tanh", torch.tanh),
        ("identity", lambda x: x),
    ],
)
def test_the_formula(activation, function):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    layer = BottleneckLayer(mlp, "default", BottleneckConfig(reduction_factor=4, activation=activation))
    down, down_bias, up, up_bias = plain_parameters(layer)
    assert up.shape == (12, 3)
    assert not up.any() and not up_bias.any() and not down_bias.any() and down.all()
    for tensor in plain_parameters(layer):
        nn.init.normal_(tensor)
    x = torch.randn(2, 7, 12)
    hidden = mlp(x)
    expected = hidden + function(hidden @ down.T + down_bias) @ up.T + up_bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("init", "std"), [("kaiming", (2 / 512) ** 0.5), ("normal", 0.02)])
def test_init(init, std):
    torch.manual_seed(0)
    layer = BottleneckLayer(nn.Linear(512, 512), "default", BottleneckConfig(reduction_factor=1, init=init))
    down, down_bias, up, up_bias = plain_parameters(layer)
    assert down.std().item() == pytest.approx(std, rel=0.02)
    assert not (up.any() or up_bias.any() or down_bias.any())


class OldBlock(nn.Module):
    """A block as in transformers 4, where the last module of the MLP adds the residual itself."""

    class Dense(nn.Module):
        def __init__(self, width_in: int, width_out: int):
            super().__init__()
            self.dense = nn.Linear(width_in, width_out)

        def forward(self, x, residual=0.0):
            return self.dense(x) + residual

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"output": self.Dense(6, 6)})
        self.intermediate = self.Dense(6, 12)
        self.output = self.Dense(12, 6)

    def forward(self, x):
        x = self.attention["output"](x, x)
        return self.output(torch.relu(self.intermediate(x)), x)


def test_the_adapter_comes_before_the_residual_add():
    torch.manual_seed(0)
    block = OldBlock()
    assert find_blocks(block) == ["output.dense"]
    x = torch.randn(3, 6)
    residual = block.attention["output"](x, x)
    expected = block(x) - residual  # what the MLP gives
    model = peft.get_peft_model(block, BottleneckConfig(activation="identity", reduction_factor=1))
    (layer,) = layers_of(model)
    for linear in (layer.bottleneck_down["default"], layer.bottleneck_up["default"]):
        nn.init.eye_(linear.weight)
    torch.testing.assert_close(model(x), residual + 2 * expected)  # a residual inside would be doubled too


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [(None, [0, 1, 2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ([3, 1], [1, 3]), (range(2), [0, 1]), ([], [])],
)
def test_blocks_are_counted_over_the_whole_network(build_model, tmp_path, blocks, kept):
    names = find_blocks(build_model("timm_swin"))
    model = attach(build_model("timm_swin"), BottleneckConfig(blocks=blocks))
    found = [key for key, layer in model.get_base_model().named_modules() if isinstance(layer, BottleneckLayer)]
    assert found == [names[index] for index in kept]

    # Saved as written, not as resolved: loading must not count again over a list that is already cut down.
    model.save_pretrained(str(tmp_path))
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, BottleneckConfig)
    assert config.blocks == (None if blocks is None else list(blocks))
    assert config.target_modules is None
    loaded = peft.PeftModel.from_pretrained(build_model("timm_swin"), str(tmp_path))
    assert [
        key for key, layer in loaded.get_base_model().named_modules() if isinstance(layer, BottleneckLayer)
    ] == found


def test_adapters_of_different_blocks_and_widths_on_one_model(build_model):
    images, _ = batch()
    model = attach(build_model("timm_swin"), BottleneckConfig(blocks=[0]))
    model.add_adapter("last", BottleneckConfig(blocks=[-1], reduction_factor=2, modules_to_save=["head.fc"]))
    model.set_adapter("last")
    first, last = layers_of(model)
    assert list(first.bottleneck_down) == ["default"] and list(last.bottleneck_down) == ["last"]
    base = logits_of(model, images)
    nn.init.ones_(first.bottleneck_up["default"].weight)
    assert torch.equal(logits_of(model, images), base)  # not active
    nn.init.ones_(last.bottleneck_up["last"].weight)
    assert not torch.equal(logits_of(model, images), base)
    model.set_adapter("default")
    model.delete_adapter("last")
    assert not last.bottleneck_down and not last.bottleneck_activation
    assert torch.isfinite(logits_of(model, images)).all()


def test_several_active_adapters_are_summed():
    torch.manual_seed(0)
    layer = BottleneckLayer(nn.Linear(8, 8), "a", BottleneckConfig(reduction_factor=2))
    layer.update_layer("b", BottleneckConfig(reduction_factor=4, activation="tanh"))
    for name in "ab":
        for tensor in plain_parameters(layer, name):
            nn.init.normal_(tensor)
    x = torch.randn(3, 8)
    parts = []
    for name in ("a", "b"):
        layer.set_adapter(name)
        parts.append(layer(x) - layer.base_layer(x))
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + parts[0] + parts[1])


def test_target_modules_of_ones_own_network(build_model):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(12, 16)
            self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3))
            self.out = nn.Linear(16, 2)

        def forward(self, x):
            x = self.stem(x)
            for ffn in self.ffn:
                x = x + ffn(x)
            return self.out(x)

    for targets, count in ((["ffn.0", "ffn.2"], 2), (r"ffn\.\d", 3), (["stem"], 1)):
        config = BottleneckConfig(target_modules=targets, modules_to_save=["out"])
        model = peft.get_peft_model(Mixer(), config)
        assert len(layers_of(model)) == count
        assert model(torch.randn(5, 12)).shape == (5, 2)

    config = BottleneckConfig(target_modules=r"ffn\.\d", blocks=[-1], exclude_modules=["ffn.0"])
    assert layers_of(peft.get_peft_model(Mixer(), config))[0].base_layer[0].in_features == 16

    with pytest.raises(ValueError, match=r"transformer blocks.*Found none in Mixer.*stem, ffn\.0\.0"):
        peft.get_peft_model(Mixer(), BottleneckConfig())
    with pytest.raises(ValueError, match=r"target_modules=\['mlp'\].*Found none.*stem, ffn\.0\.0"):
        peft.get_peft_model(Mixer(), BottleneckConfig(target_modules=["mlp"]))
    with pytest.raises(ValueError, match="do not contain each other.*'ffn.0'.*'ffn.0.0'"):
        peft.get_peft_model(Mixer(), BottleneckConfig(target_modules=["ffn.0", "ffn.0.0"]))
    with pytest.raises(ValueError, match="Target 'ffn'.*ModuleList"):
        peft.get_peft_model(Mixer(), BottleneckConfig(target_modules=["ffn"]))
    with pytest.raises(ValueError, match=r"Target 'ffn.0.1'.*ends in a Linear.*Found ReLU"):
        peft.get_peft_model(Mixer(), BottleneckConfig(target_modules=["ffn.0.1"]))


def test_excluding_keeps_the_count(build_model):
    names = find_blocks(build_model("timm_swin"))
    config = BottleneckConfig(exclude_modules=[names[0]], blocks=[0, 1])
    model = attach(build_model("timm_swin"), config)
    assert [key for key, layer in model.get_base_model().named_modules() if isinstance(layer, BottleneckLayer)] == [
        names[1]
    ]


@pytest.mark.parametrize("count", [4, -5])
def test_a_block_that_does_not_exist(build_model, count):
    with pytest.raises(ValueError, match=rf"indices from -4 to 3: the network has 4 blocks.*Found \[{count}\]"):
        attach(build_model("timm_swin"), BottleneckConfig(blocks=[0, count]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reduction_factor=0), r"reduction_factor should be an integer >= 1\. Found 0"),
        (dict(reduction_factor=2.5), "Found 2.5"),
        (dict(reduction_factor=True), "Found True"),
        (dict(activation="swish"), "activation should be one of gelu, relu, silu, tanh, identity. Found 'swish'"),
        (dict(init="zero"), "init should be one of kaiming, normal. Found 'zero'"),
        (dict(blocks=3), "blocks should be .* Found 3"),
        (dict(blocks=[1.0]), r"Found \[1.0\]"),
        (dict(target_modules=[1]), r"target_modules should be .* Found \[1\]"),
        (dict(exclude_modules=[""]), r"exclude_modules should be .* Found \[''\]"),
        (dict(modules_to_save="head"), "modules_to_save should be a list .* Found 'head'"),
        (dict(init="x", activation="y"), "activation should be .*; init should be"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**arguments)


def test_a_target_that_returns_something_else():
    layer = BottleneckLayer(nn.Sequential(nn.Linear(4, 6), nn.Flatten(1)), "default", BottleneckConfig())
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 6\].*Found \(2, 18\) from Sequential"):
        layer(torch.randn(2, 3, 4))


def test_merging_is_refused_and_unloading_works(build_model):
    images, _ = batch()
    expected = logits_of(build_model("timm_swin"), images)
    model = attach(build_model("timm_swin"))
    for merge in (model.merge_and_unload, model.merge_adapter, layers_of(model)[0].merge, layers_of(model)[0].unmerge):
        with pytest.raises(ValueError, match="cannot be merged.*lora"):
            merge()
    base = model.unload()
    assert not layers_of(base)
    assert torch.equal(logits_of(base, images), expected)


def test_adapter_weights_are_float32_unless_asked_otherwise(build_model):
    for base, autocast, expected in (
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
    ):
        model = peft.get_peft_model(
            build_model("timm_swin").to(base), BottleneckConfig(), autocast_adapter_dtype=autocast
        )
        tensors = [tensor for layer in layers_of(model) for tensor in plain_parameters(layer)]
        assert tensors
        assert {tensor.dtype for tensor in tensors} == {expected}
        assert logits_of(model, batch()[0].to(base)).dtype == base


def test_plain_peft_calls(build_model, tmp_path):
    images, _ = batch()
    model = peft.get_peft_model(build_model("timm_vit"), BottleneckConfig(modules_to_save=["head"])).eval()
    train(model, steps=3)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(build_model("timm_vit"), str(tmp_path)).eval()
    assert layers_of(loaded)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, BottleneckConfig) and config.modules_to_save == ["head"]
    injected = peft.inject_adapter_in_model(BottleneckConfig(), build_model("timm_vit"))
    assert len(layers_of(injected)) == 6


def test_registering_twice_is_harmless_and_a_taken_name_is_refused(monkeypatch):
    register()
    key = BottleneckConfig().peft_type
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, key, peft.LoraConfig)
    with pytest.raises(ValueError, match="to be free. Found"):
        register()
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_CONFIG_MAPPING")
    with pytest.raises(ImportError, match="PEFT_TYPE_TO_CONFIG_MAPPING"):
        register()


def test_compiles_without_a_graph_break(build_model):
    images, labels = batch()
    model = attach(build_model("timm_swin"))
    train(model, steps=2)
    base = model.get_base_model()
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, images), logits_of(model, images))
    nn.functional.cross_entropy(logits_of(compiled, images), labels).backward()
    assert all(tensor.grad is not None for layer in layers_of(base) for tensor in plain_parameters(layer))
