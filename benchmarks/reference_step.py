"""A CA-AT step as the peers write it: float32 and eager, to be timed against and to be trusted.

`pgd` is the attack of the usual libraries (a test holds it equal to ``torchattacks.PGD`` from the same start).
`ca_at_step` then takes a clean and an adversarial backward pass, flattens both gradients, moves the adversarial one
onto the cone around the clean one (the paper's Eq. 4) and steps the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

Context = Callable[[], AbstractContextManager]


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    context: Context = nullcontext,
) -> Tensor:
    """L-inf PGD on the mean cross-entropy; images of shape `[B, C, H, W]` in [0, 1], ``start`` drawn where None."""
    adv_images = start
    if adv_images is None:
        adv_images = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adv_images = adv_images.detach().requires_grad_()
        with context():
            logits = model(adv_images)
        cost = functional.cross_entropy(logits.float(), labels)
        (grad,) = torch.autograd.grad(cost, adv_images)
        adv_images = adv_images.detach() + step_size * grad.sign()
        adv_images = (images + (adv_images - images).clamp(-eps, eps)).clamp(0, 1)
    return adv_images.detach()


def flat_gradient(
    model: nn.Module, parameters: list[nn.Parameter], images: Tensor, labels: Tensor, context: Context
) -> Tensor:
    """Gradient of the mean cross-entropy over the trainable parameters, of shape `[P]`."""
    with context():
        logits = model(images)
    functional.cross_entropy(logits.float(), labels).backward()
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])  # type: ignore[union-attr]
    for parameter in parameters:
        parameter.grad = None
    return flat


def combine(clean_grad: Tensor, adv_grad: Tensor, gamma: float) -> Tensor:
    """The paper's Eq. 4 on two flattened gradients of shape `[P]`."""
    clean_norm, adv_norm = clean_grad.norm(), adv_grad.norm()
    cos = torch.dot(clean_grad, adv_grad) / (clean_norm * adv_norm)
    if cos >= gamma:
        return clean_grad
    scale = (
        adv_norm * (gamma * (1 - cos**2).sqrt() - cos * (1 - gamma**2) ** 0.5) / (clean_norm * (1 - gamma**2) ** 0.5)
    )
    return adv_grad + scale * clean_grad


def write_gradient(parameters: list[nn.Parameter], flat: Tensor) -> None:
    """Make a flat vector the parameters' ``.grad``."""
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def ca_at_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    gamma: float,
    context: Context = nullcontext,
) -> None:
    """One whole step: attack in eval mode, two passes in train mode, projection, optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    adv_images = pgd(model, images, labels, eps=eps, step_size=step_size, steps=steps, context=context)
    model.train()
    clean_grad = flat_gradient(model, parameters, images, labels, context)
    adv_grad = flat_gradient(model, parameters, adv_images, labels, context)
    write_gradient(parameters, combine(clean_grad, adv_grad, gamma))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
