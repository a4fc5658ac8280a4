"""Which arithmetic an evaluation runs in: plain float32 for every verdict, less for the search where asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robust_peft.models.reduced import attention_by_products, cast_frozen_weights

PRECISIONS = ("fp32", "bf16")


@contextmanager
def plain_float32() -> Iterator[None]:
    """No TF32, no bfloat16 in float32's name and no autocast of the caller's: a verdict must not hang on precision.

    By torch's switch for each backend; the older ones (allow_tf32) cannot be mixed with it.
    """
    backends: Any = torch.backends
    places = ((backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.cudnn, "rnn"))
    places += ((backends.mkldnn, "matmul"), (backends.mkldnn, "conv"))
    switches: list[Any] = [getattr(backend, name, None) for backend, name in places]
    switches = [switch for switch in switches if hasattr(switch, "fp32_precision")]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


class OwnPrecision(nn.Module):
    """A model with half-precision weights behind float32 images and logits, which attacks and verdicts are made of."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def in_own_precision(model: nn.Module) -> nn.Module:
    """The model, behind float32 images and logits where its weights are in half precision."""
    parameter = next(iter(model.parameters()), None)
    half = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
    return OwnPrecision(model, parameter.dtype) if half else model  # type: ignore[union-attr]


class ReducedPrecision(nn.Module):
    """A copy of a float32 model that runs in bfloat16, for the search alone; as fast as in training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        cast_frozen_weights(self.model, torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        by_products = attention_by_products(self.model) if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), by_products:
            return self.model(images).float()
