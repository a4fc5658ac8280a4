"""Attacks made on one model and tried on another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robust_peft.attacks.apgd import APGD
from robust_peft.attacks.victim import Confirm, as_victim
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class Transfer:
    """Adversarial images of a second model (Papernot et al. 2017, arXiv:1602.02697; Liu et al. 2017, arXiv:1611.02770).

    The attacked model is never asked: its gradients may be masked, those of ``source`` are not. `APGD` on the
    cross-entropy maximises the source's loss to the end instead of stopping where the source is fooled, because a
    confident error carries over more often.

    Args:
        threat: Norm, budget and box.
        source: The second model, with the same classes in the same order: pixels in the box to logits.
        steps: Steps of APGD on the source.
    """

    threat: ThreatModel
    source: nn.Module
    steps: int = 100

    def __str__(self) -> str:
        return f"transfer ({APGD(self.threat, steps=self.steps)})"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images of the source; ``model`` is not used."""
        self.threat.check_images(images)
        return self.perturb(model, images, labels, keys=keys)

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        confirm: Confirm | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range. Neither ``model`` nor ``confirm`` is used."""
        attack = APGD(self.threat, "ce", steps=self.steps, early_stop=False)
        with as_victim(self.source):
            return attack.perturb(self.source, images, labels, keys=keys)
