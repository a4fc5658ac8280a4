"""Standard and adversarial accuracy on validation images, counted over samples and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from robust_peft import keyed_random
from robust_peft.attacks import PGD


def validate(
    model: nn.Module,
    loader: Iterable,
    attack: PGD,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    accelerator: Accelerator,
    seed: int,
) -> dict[str, Any]:
    """Both accuracies in the precision of the training (the evaluation at the end of a run is in float32).

    Every rank walks the same loader and takes every world-size-th batch of it, so that each sample counts once.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    seen = 0
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    for place, (images, labels, *_) in enumerate(loader):
        indices = torch.arange(seen, seen + len(images))
        seen += len(images)
        if place % accelerator.num_processes != accelerator.process_index:
            continue
        images, labels = images.to(device), labels.to(device)
        images = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        keys = keyed_random.sample_keys(seed, 0, indices.to(device))
        with autocast():
            adv_images = attack.perturb(model, images, labels, keys=keys)
            with torch.no_grad():
                for at, pixels in ((0, images), (1, adv_images)):
                    counts[at] += (model(pixels).argmax(dim=1) == labels).sum()
        counts[2] += len(images)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts, reduction="sum")
    clean, adv, total = counts.tolist()  # type: ignore[union-attr]
    if total == 0:
        raise ValueError("The validation loader is empty.")
    model.train(was_training)
    return {
        "standard_accuracy": clean / total,
        "adversarial_accuracy": adv / total,
        "attack": str(attack),
        "total": int(total),
    }
