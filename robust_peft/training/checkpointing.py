"""Gradient checkpointing: transformer blocks that keep their input alone and compute the rest again (Chen et al. 2016,
arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from robust_peft.adapters import find_blocks


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, each transformer block of the model is checkpointed, in train and eval mode; afterwards none is.

    Memory for activations falls from that of all blocks to that of one block and the blocks' inputs; each backward pass
    takes another forward pass. Gradients are the same.

    Raises:
        ValueError: If the model has no transformer blocks, or a BatchNorm in one of them would count each batch twice.
    """
    blocks = [model.get_submodule(name) for name in block_names(model)]
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(
                p.requires_grad for p in module.parameters()
            ):
                raise ValueError("gradient_checkpointing would count batches twice in a BatchNorm that is trained.")
    try:
        for block in blocks:
            block.forward = partial(_recomputed, block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def block_names(model: nn.Module) -> list[str]:
    """Dotted names of the model's transformer blocks, in forward order. ValueError if there is none."""
    names = []
    for target in find_blocks(model):
        depth = 2 if target.endswith("output.dense") else 1
        names.append(".".join(target.split(".")[:-depth]))
    if not names:
        raise ValueError(f"gradient_checkpointing needs transformer blocks. Found none in {type(model).__name__}.")
    return names


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
