"""PGD towards each of the likeliest wrong classes in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.pgd import PGD
from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class TargetedPGD:
    """`PGD` that descends the cross-entropy with a target class, for several targets.

    Differs from torchattacks' targeted PGD, which takes one random or least likely class: the targets are the
    ``num_targets`` classes with the highest clean logits other than the label (as in Croce and Hein 2020 for APGD-T),
    because a model that holds against one target may fall to the next.

    Args:
        threat: Norm, budget and box.
        steps: Steps for each target.
        num_targets: At most so many targets; there are never more than classes other than the label.
        step_size: As in `PGD`.
        early_stop: Whether a sample that is fooled is spared the other targets.
    """

    threat: ThreatModel
    steps: int = 10
    num_targets: int = 9
    step_size: float | str | None = None
    early_stop: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.num_targets, int) or self.num_targets < 1:
            raise ValueError(f"num_targets should be an integer of at least 1. Found {self.num_targets!r}.")
        object.__setattr__(self, "_pgd", PGD(self.threat, self.steps, self.step_size, "ce", targeted=True))

    def __str__(self) -> str:
        return f"T-{self._pgd}"  # type: ignore[attr-defined]

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images, as `PGD`'s call gives them."""
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
        """As calling the attack, without the check of the pixel range; ``confirm`` as in `attacks.victim`.

        A sample that no target fools keeps the image with the highest margin.
        """
        best = images.detach().clone()
        if len(images) == 0:
            return best
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        pgd: PGD = self._pgd  # type: ignore[attr-defined]
        with as_victim(model), torch.no_grad():
            logits = full_precision_logits(model, images)
            ranked = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True, stable=True)
            best_score = torch.full_like(logits[:, 0], -torch.inf)
            standing = torch.arange(len(images), device=images.device)
            for place in range(min(self.num_targets, logits.shape[1] - 1)):
                adv_images = pgd.perturb(
                    model,
                    images[standing],
                    labels[standing],
                    targets=ranked[standing, place],
                    keys=keyed_random.derive(keys[standing], place),
                )
                found = full_precision_logits(model, adv_images)
                own = found.gather(1, labels[standing].unsqueeze(1))
                score = (found.scatter(1, labels[standing].unsqueeze(1), -torch.inf).amax(1, keepdim=True) - own)[:, 0]
                # What is no number is no answer.
                fooled = (found.argmax(dim=1) != labels[standing]) | ~found.isfinite().all(dim=1)
                if confirm is not None:
                    fooled = confirm(adv_images, standing)
                # What counts as fooled comes before any score: with `confirm` the two can differ.
                score = torch.where(fooled, torch.inf, score)
                better = score > best_score[standing]
                best[standing[better]] = adv_images[better]
                best_score[standing[better]] = score[better]
                if self.early_stop:
                    standing = standing[~fooled]
                    if len(standing) == 0:
                        break
        return best
