"""What makes training in reduced precision fast, beside autocast. All that it changes in the results is rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robust_peft.training.precision import DTYPES

# Layers that autocast casts to reduced precision, if their forward is torch's own.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What Swin adds to its attention weights (timm; the table also torchvision and transformers). In float32 it would turn
# all of them into float32, unlike in torch's fused attention. The mask holds 0 and -100, exact in any dtype.
_BIAS_TABLE, _MASK = "relative_position_bias_table", "attn_mask"


@contextmanager
def frozen_weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, frozen weights of linear layers and convolutions are in ``dtype``; afterwards they are what they were.

    Autocast casts a frozen weight again at every call (it remembers only those that require a gradient), and the graph
    keeps each cast alive until the backward pass. The casts here are the same, made once: results do not change by a
    bit. Swin's frozen table of relative position biases is cast too, which does change them by rounding. The originals
    are kept, and come back also after an exception.

    Args:
        model: Its trainable parameters, its buffers and other layers are left alone.
        dtype: That of the autocast that the model runs under.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    masks: list[tuple[nn.Module, Tensor]] = []
    made: dict[int, nn.Parameter] = {}  # weights that two layers share stay shared
    try:
        for module in model.modules():
            whole = isinstance(module, _CAST) and type(module).forward in [kind.forward for kind in _CAST]
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.requires_grad or parameter.dtype != torch.float32:
                    continue
                if not whole and name != _BIAS_TABLE:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                replaced.append((module, name, parameter))
                module._parameters[name] = made[id(parameter)]
            mask = module._buffers.get(_MASK)
            if mask is not None and mask.dtype == torch.float32:
                masks.append((module, mask))
                module._buffers[_MASK] = mask.to(dtype)
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
        for module, mask in masks:
            module._buffers[_MASK] = mask


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Inside, attention is computed as the matrix products that it is made of, in their own precision.

    For CPUs in bfloat16: there torch's fused attention is slow, above all backwards (40 % of the time of a pass through
    a ViT-S at 224 pixels, for 7 % of its operations). It needs memory for one row of weights for each token.
    """
    fused = [module for module in model.modules() if getattr(module, "fused_attn", None) is True]  # timm's switch
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # holds for CPUs too
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


@contextmanager
def fast_in(precision: str, device: torch.device, model: nn.Module) -> Iterator[None]:
    """All of the above that helps a model's training in "bf16" or "fp16" on a device; nothing for "fp32"."""
    if precision == "fp32":
        yield
        return
    attention = attention_by_products(model) if device.type == "cpu" else nullcontext()
    with frozen_weights_in(model, DTYPES[precision]), attention:
        yield
