"""How an attack holds the model that it attacks: eval mode, parameters frozen, everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Confirm = Callable[[Tensor, Tensor], Tensor]
"""``confirm(adv_images, positions)``: which of these images the model really gets wrong, a bool tensor of shape `[b]`.

``positions`` of shape `[b]` say which samples of the batch they belong to. An attack that iterates on a copy in reduced
precision asks it before it lets a sample go; without one, the attacked model's own answer decides.
"""


@contextmanager
def as_victim(model: nn.Module) -> Iterator[None]:
    """Inside, every submodule is in eval mode and no parameter asks for a gradient.

    Frozen flags, rather than discarded gradients, because then neither eager autograd nor a compiled graph computes
    parameter gradients at all. Modes and flags of each submodule and parameter are restored also after an exception.
    """
    modules = list(model.modules())  # once: a small model's modules take as long to list as a layer to compute
    training = [module for module in modules if module.training]
    own = (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)
    trainable = [parameter for parameter in own if parameter.requires_grad]
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
    if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        # A model that cuts the graph (a JPEG layer, say) has a zero gradient; the attack goes on, for others to follow.
        logits = logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def couples_batch(model: nn.Module) -> bool:
    """Whether predictions depend on who else is in the batch: a BatchNorm without running statistics."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(module, norms) and module.running_mean is None for module in model.modules())


class Counted(nn.Module):
    """A model that counts the images that go through it forwards and backwards.

    Attributes:
        forwards: Images that were classified so far.
        backwards: Images whose logits received a gradient so far; a second backward pass through one graph counts.
    """

    def __init__(self, model: nn.Module, on_forward: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.model = model
        self.on_forward = on_forward
        self.forwards = 0
        self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        self.forwards += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        if self.on_forward is not None:
            self.on_forward(len(images))
        return logits

    def _count_backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)
