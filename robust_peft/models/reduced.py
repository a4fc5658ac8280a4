"""What makes a model fast in reduced precision, beside autocast. All that it changes in the results is rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Layers that autocast casts to reduced precision, if their forward is torch's own.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What Swin adds to its attention weights (timm; the table also torchvision and transformers). In float32 it would turn
# all of them into float32, unlike in torch's fused attention. The mask holds 0 and -100, exact in any dtype.
_BIAS_TABLE, _MASK = "relative_position_bias_table", "attn_mask"


def cast_frozen_weights(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Cast frozen weights of linear layers and convolutions once, and return what brings the originals back.

    Autocast casts a frozen weight again at every call (it remembers only those that require a gradient), and the graph
    keeps each cast alive until the backward pass. The casts here are the same: results do not change by a bit. Swin's
    frozen table of relative position biases is cast too, which does change them by rounding.

    Args:
        model: Its trainable parameters and other layers are left alone.
        dtype: That of the autocast that the model runs under.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, nn.Parameter] = {}  # weights that two layers share stay shared
    for module in model.modules():
        whole = isinstance(module, _CAST) and type(module).forward in [kind.forward for kind in _CAST]
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad or parameter.dtype != torch.float32:
                continue
            if not whole and name != _BIAS_TABLE:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            replaced.append((module._parameters, name, parameter))
            module._parameters[name] = made[id(parameter)]
        mask = module._buffers.get(_MASK)
        if mask is not None and mask.dtype == torch.float32:
            replaced.append((module._buffers, _MASK, mask))
            module._buffers[_MASK] = mask.to(dtype)

    def restore() -> None:
        for holder, name, tensor in replaced:
            holder[name] = tensor

    return restore


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
def fast_in(dtype: torch.dtype, device: torch.device, model: nn.Module) -> Iterator[None]:
    """All that helps a model under an autocast to ``dtype`` on a device; undone also after an exception."""
    restore = cast_frozen_weights(model, dtype)
    try:
        with attention_by_products(model) if device.type == "cpu" else nullcontext():
            yield
    finally:
        restore()
