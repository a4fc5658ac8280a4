"""One optimizer step, in the order in which data flows: attack, pair of gradients, surgery, update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks import Solver
from robust_peft.attacks.victim import full_precision_logits
from robust_peft.losses import Loss
from robust_peft.training.gradients import GradientPair

# What the samples' keys are used for; different numbers make the draws independent.
AUGMENTATION, ATTACK, DROP_PATH = 1, 2, 3

# What travels with the gradients through the all-reduce, in this order.
EXTRAS = ("count", "clean_loss", "adv_loss", "clean_correct", "adv_correct", "stop")


@dataclass
class Batch:
    """A micro-batch on its device: images `[B, C, H, W]` in [0, 1], labels `[B]`, random keys `[B]`."""

    images: Tensor
    labels: Tensor
    keys: Tensor


def add_gradients(
    pair: GradientPair,
    batch: Batch,
    *,
    model: nn.Module,
    attack: Solver,
    loss: Loss,
    loss_weights: tuple[float, float] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda total: total,
    seed_dropout: Callable[[Tensor], None] = lambda keys: None,
) -> None:
    """Attack one micro-batch and add its clean and adversarial gradients, summed over samples, to ``pair``.

    Args:
        pair: Where to add; its extras take the counts of `EXTRAS`.
        batch: The micro-batch.
        model: Pixels to logits, in train mode.
        attack: The inner maximisation.
        loss: The pair of losses.
        loss_weights: None for two gradients. Two fixed weights (clean, adversarial) add the gradient of the weighted
            loss to row 0 instead; a part whose weight is 0 is not computed, and without the adversarial part there is
            no attack either.
        autocast: Context in which the model runs.
        scale: Applied to each loss before its backward pass (float16's loss scale).
        seed_dropout: Called with the samples' keys before each train-mode pass.
    """
    images, labels, keys = batch.images, batch.labels, batch.keys
    want_clean = loss_weights is None or loss_weights[0] != 0
    want_adv = loss_weights is None or loss_weights[1] != 0
    sums = torch.zeros(len(EXTRAS), device=images.device, dtype=pair.extras.dtype)
    sums[0] = len(images)

    adv_images = images
    if want_adv:
        with autocast():
            adv_images = attack.perturb(
                model, images, labels, keys=keyed_random.derive(keys, ATTACK), objective=loss.inner_objective
            )

    def logits_of(pixels: Tensor) -> Tensor:
        # The same keys for both passes: clean and adversarial image go through the same thinned network.
        seed_dropout(keyed_random.derive(keys, DROP_PATH))
        with autocast():
            return full_precision_logits(model, pixels)

    def note(at: int, losses: Tensor, logits: Tensor) -> Tensor:
        sums[at] = losses.detach().sum()
        sums[at + 2] = (logits.detach().argmax(dim=1) == labels).sum()
        return losses.sum()

    def backward(row: int, total: Tensor, retain_graph: bool = False) -> None:
        if loss_weights is not None:
            total, row = total * loss_weights[row], 0
        pair.add(row, scale(total), retain_graph=retain_graph)

    clean_logits = None
    clean_total = None
    if want_clean or loss.needs_clean_logits:
        clean_logits = logits_of(images)
        clean_total = note(1, loss.clean(clean_logits, labels), clean_logits)
        if not loss.needs_clean_logits:
            # Backward at once, so that only one graph is alive at a time.
            backward(0, clean_total)
            clean_logits = clean_total = None
    if want_adv:
        adv_logits = logits_of(adv_images)
        adv_total = note(2, loss.adv(adv_logits, labels, clean_logits), adv_logits)
        if clean_total is not None and want_clean:
            backward(0, clean_total, retain_graph=True)
        backward(1, adv_total)
    elif clean_total is not None:
        backward(0, clean_total)
    pair.extras.add_(sums)
