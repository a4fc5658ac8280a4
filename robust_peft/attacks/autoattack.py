"""The standard ensemble as one attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.suite import components, make_attack
from robust_peft.attacks.victim import Confirm, as_victim, couples_batch
from robust_peft.keyed_random import name_key
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce and Hein 2020, arXiv:2003.01690): four attacks, each on what the earlier ones left standing.

    100-step APGD on the cross-entropy, 100-step targeted APGD on the DLR (9 targets), 100-step targeted FAB (9
    targets), 5,000 queries of Square; "rand", for randomised models, is APGD on cross-entropy and DLR with gradients
    averaged over 20 passes. For fewer than 10 classes there are as many targets as other classes, and where the DLR is
    undefined its place is taken by the margin (the reference implementation raises an error there).

    `robust_peft.evaluate` runs the same components with a verdict for each; this class is for images at hand.
    Where predictions depend on the batch, nobody leaves it.

    Args:
        threat: Norm, budget and box.
        version: "standard" or "rand".
    """

    threat: ThreatModel
    version: str = "standard"

    def __post_init__(self) -> None:
        if self.version not in ("standard", "rand"):
            raise ValueError(f"version should be one of standard, rand. Found version = {self.version!r}.")

    def __str__(self) -> str:
        return f"{self._name} {self.threat}"

    @property
    def _name(self) -> str:
        return "autoattack" if self.version == "standard" else "autoattack-rand"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images where one was found, else the last component's best attempt."""
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
        """As calling the attack, without the check of the pixel range."""
        best = images.detach().clone()
        if len(images) == 0:
            return best
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)

        def fooled(adv_images: Tensor, positions: Tensor) -> Tensor:
            if confirm is not None:
                return confirm(adv_images, positions)
            logits = model(adv_images)
            return (logits.argmax(dim=1) != labels[positions]) | ~logits.isfinite().all(dim=1)

        with as_victim(model), torch.no_grad():
            everyone, coupled = torch.arange(len(images), device=images.device), couples_batch(model)
            stands = ~fooled(images, everyone)
            for name in components(self._name):
                chosen = everyone if coupled else everyone[stands]
                if not stands.any():
                    break
                adv_images = make_attack(name, self.threat, early_stop=not coupled).perturb(
                    model,
                    images[chosen],
                    labels[chosen],
                    keys=keyed_random.derive(keys[chosen], name_key(f"{name} {self.threat}")),
                    confirm=None if confirm is None else _narrowed(confirm, chosen),
                )
                new = stands[chosen]
                best[chosen[new]] = adv_images[new]
                stands[chosen] &= ~fooled(adv_images, chosen)
        return best


def _narrowed(confirm: Confirm, standing: Tensor) -> Confirm:
    return lambda adv_images, positions: confirm(adv_images, standing[positions])
