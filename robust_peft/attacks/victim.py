"""How an attack holds the model that it attacks: eval mode, parameters frozen, everything put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def as_victim(model: nn.Module) -> Iterator[None]:
    """Inside, every submodule is in eval mode and no parameter asks for a gradient.

    Frozen flags, rather than discarded gradients, because then neither eager autograd nor a compiled graph computes
    parameter gradients at all. Modes and flags of each submodule and parameter are restored also after an exception.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def full_precision_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in at least float32: an objective in half precision would round small margins to zero."""
    logits = model(images)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
