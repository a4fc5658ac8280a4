"""Optimizers, learning-rate schedules and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from robust_peft.config import OptimConfig


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """AdamW or SGD over named parameters. Weight decay leaves out vectors (biases, norms) unless ``decay_vectors``."""
    matrices, vectors = [], []
    for _, parameter in parameters:
        (matrices if parameter.dim() > 1 or config.decay_vectors else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=bool(config.nesterov))
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2 or 0.999))


def make_schedule(optimizer: Optimizer, config: OptimConfig, steps_per_epoch: int) -> LRScheduler:
    """The learning rate over the run's ``epochs * steps_per_epoch`` optimizer steps.

    "cosine": linear warm-up over ``warmup_epochs``, then half a cosine to zero. "onecycle": Smith and Topin 2019
    (arXiv:1708.07120), rising over ``warmup_epochs`` (or 30 % of the run where that is 0), momentum left alone.
    "constant": warm-up, then flat.
    """
    total = max(1, config.epochs * steps_per_epoch)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "onecycle":
        # OneCycleLR divides by the length of its rising part, which must not be empty.
        rising = min(max(warmup / total if warmup else 0.3, 1.5 / total), 1 - 1 / (total + 1))
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=total + 1, pct_start=rising, cycle_momentum=False)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return LambdaLR(optimizer, factor)


class MovingAverage:
    """Exponential moving average of tensors: ``average = decay * average + (1 - decay) * tensor``.

    Besides parameters these are the running statistics of BatchNorms: averaged weights want statistics like their own.

    The decay is warmed up as ``min(decay, (1 + step) / (10 + step))``, so that the random start is forgotten early.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.step = 0
        self.averages: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in, after an optimizer step."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.step += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages; calling it twice changes nothing."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
