"""Reduced precision made fast: the same numbers as under autocast alone, and a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robust_peft.models.micro_swin import micro_swin
from robust_peft.models.reduced import attention_by_products, cast_frozen_weights, fast_in

CPU = torch.device("cpu")


def tiny_swin() -> nn.Module:
    torch.manual_seed(0)
    return micro_swin(3, image_size=16, width=8, depths=(2, 1), num_heads=(1, 2), window_size=2)


class Attention(nn.Module):
    """Self-attention as timm writes it, with its switch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.project, self.heads, self.fused_attn = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, 2),
            heads,
            True,
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.project(functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(tokens.shape)).mean(1)


def plain() -> nn.Module:
    """Layers that autocast casts, frozen but for the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 16))
    model.append(nn.LayerNorm(16)).append(nn.Linear(16, 3))
    for parameter in model[:-1].parameters():
        parameter.requires_grad_(False)
    return model.eval()


def outcome(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Logits, the gradient at the images and those of the trainable parameters, under autocast."""
    images = images.clone().requires_grad_()
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images).float()
    return [logits, *torch.autograd.grad(functional.cross_entropy(logits, torch.tensor([0, 1])), [images, *trainable])]


def test_cast_once_the_weights_give_the_same_bits():
    model, images = plain(), torch.rand(2, 3, 8, 8)
    expected = outcome(model, images)
    kept = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    restore = cast_frozen_weights(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    found = outcome(model, images)
    restore()
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        "0.weight",
        "0.bias",
        "4.weight",
        "4.bias",
    }
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for name, parameter in model.named_parameters():
        assert parameter is kept[name][0] and torch.equal(parameter, kept[name][1])


def test_swin_keeps_its_answers_to_rounding():
    torch.manual_seed(0)
    model, images = tiny_swin().eval(), torch.rand(2, 3, 16, 16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head" in name)
        if "relative_position" in name:
            parameter.data.normal_()
    exact = outcome(copy.deepcopy(model).double(), images.double())
    autocast = outcome(model, images)
    with fast_in(torch.bfloat16, CPU, model):
        tables = {p.dtype for name, p in model.named_parameters() if "relative_position" in name}
        found = outcome(model, images)
    assert tables == {torch.bfloat16}
    for reference, slow, fast in zip(exact, autocast, found, strict=True):
        error, usual = (fast - reference).norm(), (slow - reference).norm()
        assert error < 0.05 * reference.norm() and error < 3 * usual


def test_shared_weights_stay_shared_and_other_layers_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return functional.linear(input, self.weight * 2, self.bias)

    one, other, scaled = nn.Linear(4, 4), nn.Linear(4, 4), Scaled(4, 4)
    other.weight = one.weight
    model = nn.Sequential(one, other, scaled, nn.LayerNorm(4)).requires_grad_(False)
    cast_frozen_weights(model, torch.bfloat16)
    assert one.weight is other.weight and one.weight.dtype == torch.bfloat16
    assert scaled.weight.dtype == torch.float32 and model[3].weight.dtype == torch.float32


def test_everything_comes_back_after_an_exception():
    model = nn.ModuleList([tiny_swin().requires_grad_(False), Attention(8, 2)])
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    flash = torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(RuntimeError, match="in between"), fast_in(torch.bfloat16, CPU, model):
        assert not model[1].fused_attn
        raise RuntimeError("in between")
    assert model[1].fused_attn
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed
    assert torch.backends.cuda.flash_sdp_enabled() == flash


def test_attention_by_products_is_as_exact_as_fused_attention():
    torch.manual_seed(0)
    model, tokens = Attention(16, 2).requires_grad_(False), torch.randn(2, 40, 16)
    exact = outcome(copy.deepcopy(model).double(), tokens.double())
    fused = outcome(model, tokens)
    with attention_by_products(model):
        found = outcome(model, tokens)
    for reference, usual, products in zip(exact, fused, found, strict=True):
        assert (products - reference).norm() < 2 * (usual - reference).norm() + 1e-6
    assert not all(torch.equal(a, b) for a, b in zip(fused, found, strict=True)), "the same kernel"
