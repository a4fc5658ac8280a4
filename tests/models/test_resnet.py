"""The CIFAR networks: sizes of the literature, other implementations, and both kinds of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock, ResNet

from robust_peft.adapters import attach, find_head
from robust_peft.attacks.victim import couples_batch
from robust_peft.models import Normalized, load_backbone
from robust_peft.models.resnet import cifar_resnet
from robust_peft.models.wide_resnet import wide_resnet

NARROW: dict[str, Callable[..., nn.Module]] = {
    "resnet18": lambda **options: cifar_resnet(18, 5, width=4, **options),
    "resnet34": lambda **options: cifar_resnet(34, 5, width=4, **options),
    "wrn-10-1": lambda **options: wide_resnet(10, 1, 5, **options),
    "wrn-16-2": lambda **options: wide_resnet(16, 2, 5, **options),
}


def draw_images(count: int = 6, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("build", "count"),
    [
        # 11.17 M, 21.28 M and 36.5 M in the literature; counted by hand: convolutions, 2 per BatchNorm channel, head.
        (lambda: cifar_resnet(18), 11_173_962),
        (lambda: cifar_resnet(18, 100, bn="batch"), 11_173_962 + 90 * 513),
        (lambda: cifar_resnet(34), 21_282_122),
        (lambda: wide_resnet(), 36_479_194),
        (lambda: wide_resnet(28, 10, 100), 36_479_194 + 90 * 641),
    ],
)
def test_sizes_are_the_literatures(build: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("depth", "blocks"), [(18, [2, 2, 2, 2]), (34, [3, 4, 6, 3])])
def test_resnet_is_torchvisions_but_for_the_stem(depth: int, blocks: list[int]) -> None:
    """The same keys and, from the same weights, the same logits, train and eval mode."""
    torch.manual_seed(depth)
    other = ResNet(BasicBlock, blocks, num_classes=7)
    other.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    other.maxpool = nn.Identity()
    model = cifar_resnet(depth, 7)
    model.load_state_dict(other.state_dict())
    images = draw_images(2, 16)
    with torch.no_grad():
        assert_close(model.train()(images), other.train()(images), rtol=1e-4, atol=1e-5)
        assert_close(model.eval()(images), other.eval()(images), rtol=1e-4, atol=1e-5)


def by_formula(weights: dict[str, Tensor], images: Tensor, blocks: int) -> Tensor:
    """A wide ResNet on batch statistics as the paper's Fig. 1 and Table 1 say, from bare operations."""

    def active(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
        return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = functional.conv2d(images, weights["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            before = active(x, f"{name}.bn1")
            residual = functional.conv2d(before, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = functional.conv2d(active(residual, f"{name}.bn2"), weights[f"{name}.conv2.weight"], padding=1)
            shortcut = weights.get(f"{name}.shortcut.weight")
            x = residual + (x if shortcut is None else functional.conv2d(before, shortcut, stride=stride))
    return active(x, "bn").mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize(("depth", "widen_factor"), [(10, 1), (16, 2)])
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_wide_resnet_is_the_formula(bn: str, depth: int, widen_factor: int) -> None:
    torch.manual_seed(depth)
    model = wide_resnet(depth, widen_factor, 5, bn=bn).double().train()
    for module in batch_norms(model):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert ("layer1.0.shortcut.weight" in weights) == (widen_factor > 1)  # width 1: the shape stays in the first stage
    images = draw_images(4, 16).double()
    with torch.no_grad():
        assert_close(model(images), by_formula(weights, images, (depth - 4) // 6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NARROW)
def test_batch_statistics_in_every_batchnorm(name: str) -> None:
    model = NARROW[name](bn="batch")
    assert batch_norms(model) and not list(model.buffers()) and couples_batch(model)
    images = draw_images()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model.train()(images))
        alone, together = model.eval()(images[:3]), model(images)[:3]
    assert (alone - together).abs().max() > 1e-3  # who else is in the batch matters


@pytest.mark.parametrize("name", NARROW)
def test_running_statistics_in_every_batchnorm(name: str) -> None:
    model = NARROW[name](bn="running")
    assert not couples_batch(model)
    images = draw_images()
    with torch.no_grad():
        model.train()(images)
        assert all(module.num_batches_tracked == 1 for module in batch_norms(model))
        alone, together = model.eval()(images[:3]), model(images)[:3]
    assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NARROW)
def test_both_kinds_start_from_the_same_weights(name: str) -> None:
    models = []
    for bn in ("running", "batch"):
        torch.manual_seed(3)
        models.append(NARROW[name](bn=bn))
    first, second = (dict(model.named_parameters()) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("name", NARROW)
def test_every_parameter_gets_a_gradient_in_channels_last_too(name: str, bn: str) -> None:
    torch.manual_seed(0)
    model = NARROW[name](bn=bn).double()
    images, labels = draw_images().double(), torch.arange(6) % 5

    def gradients(layout: torch.memory_format) -> list[Tensor]:
        model.to(memory_format=layout)
        loss = functional.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain, last = gradients(torch.contiguous_format), gradients(torch.channels_last)
    assert all(grad.isfinite().all() and grad.any() for grad in plain)
    assert_close(last, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NARROW)
def test_head_is_found_and_everything_trains(name: str) -> None:
    model = Normalized(NARROW[name](), (0.5,) * 3, (0.25,) * 3)
    assert find_head(model) == "backbone.fc"
    full = attach(model, "full")
    assert all(parameter.requires_grad for parameter in full.parameters())
    assert full(draw_images(2)).shape == (2, 5)


BAD: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (cifar_resnet, (50,), {}, "Found depth = 50"),
    (cifar_resnet, (18, 0), {}, "Found num_classes = 0"),
    (cifar_resnet, (18,), {"width": 1.5}, "Found width = 1.5"),
    (cifar_resnet, (18,), {"bn": "none"}, "Found bn = 'none'"),
    (wide_resnet, (27,), {}, "Found depth = 27"),
    (wide_resnet, (4,), {}, "Found depth = 4"),
    (wide_resnet, (28, 0), {}, "Found widen_factor = 0"),
    (wide_resnet, (28, 10, True), {}, "Found num_classes = True"),
    (wide_resnet, (10, 1), {"bn": None}, "Found bn = None"),
]


@pytest.mark.parametrize(("build", "given", "options", "message"), BAD)
def test_bad_values_are_refused(build: Any, given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(*given, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_by_name(name, tmp_path):
    model = load_backbone(name, checkpoint="random", num_classes=7, bn="batch", width=8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert model.mean.flatten().tolist() == [0.0] * 3 and model.std.flatten().tolist() == [1.0] * 3
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.running_mean is None for norm in norms)
    torch.save(model.backbone.state_dict(), tmp_path / "weights.pth")
    again = load_backbone(name, checkpoint=tmp_path / "weights.pth", bn="batch", width=8)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), again.eval()(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "resnet18 has no published weights"),
        ("resnet18", {"checkpoint": "random", "image_size": 64}, "leave image_size = 64 out"),
        ("wrn28_10", {"checkpoint": "random", "width": 8}, "width is for resnet18 and resnet34"),
        ("micro_swin", {"bn": "batch"}, "bn are for resnet18, resnet34, wrn28_10"),
        ("resnet18", {"checkpoint": "random", "bn": "none"}, "bn should be running or batch"),
    ],
)
def test_what_does_not_fit_a_name_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, **options)
