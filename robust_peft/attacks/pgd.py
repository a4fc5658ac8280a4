"""Projected gradient ascent on the pixels: FGSM and PGD, for training and for evaluation.

Goodfellow et al. 2015 (FGSM, arXiv:1412.6572), Madry et al. 2018 (PGD, arXiv:1706.06083), Wong et al. 2020 (FGSM from
a random start, arXiv:2001.03994). Nothing in the loop waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.objectives import Objective, get_objective
from robust_peft.pixel_units import as_number, step_size_problem
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class PGD:
    """``steps`` times: a step of steepest ascent on the objective, then the projection onto ball and box.

    Args:
        threat: Norm, budget and box.
        steps: Number of steps, at least 1.
        step_size: In the units of the pixels, a number or a fraction like "2/255". None: 2.5 eps / steps, which
            reaches the ball's surface from anywhere (Madry et al. 2018), but no more than 1.25 eps from a random start
            or eps from the image.
        objective: "ce", "kl", "margin" or "dlr" (`robust_peft.objectives`). Where the DLR is undefined (fewer than 3
            classes, targeted fewer than 4), "margin" stands in for "dlr". None: the training loss's own inside a
            `Trainer`, else "ce".
        restarts: Independent random starts, of which one image is kept.
        random_start: Start uniformly inside the ball instead of at the image.
        targeted: Move towards a target class: the ``targets`` of the call or, where none are given, the best class
            other than the label.
        fooling_first: Of several restarts, keep an image that fools the model, if any does, and among those the one
            with the highest objective (for evaluation). False: the one with the highest objective, whatever the model
            says of it (for training, which minimises over the maximum).

    Raises:
        ValueError: For a value out of range, several restarts without random start, or "kl" without a random start
            (its gradient at the clean image is zero).
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float | str | None = None
    objective: str | None = None
    restarts: int = 1
    random_start: bool = True
    targeted: bool = False
    fooling_first: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise ValueError(f"threat should be a ThreatModel. Found threat = {self.threat!r}.")
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
        if self.step_size is not None:
            wrong = step_size_problem(self.step_size)
            if wrong:
                raise ValueError(wrong)
            object.__setattr__(self, "step_size", as_number(self.step_size))
        if self.objective is not None:
            get_objective(self.objective)
        self._check_start(self.objective)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts = {self.restarts} without random_start would repeat one computation.")

    def __str__(self) -> str:
        name = "FGSM" if self.steps == 1 else f"PGD-{self.steps}"
        return f"{name}{f' x{self.restarts}' if self.restarts > 1 else ''} {self.threat}"

    @property
    def resolved_step_size(self) -> float:
        """The step size in use, in the units of the pixels."""
        if self.step_size is not None:
            return float(self.step_size)
        return self.threat.eps * min(1.25 if self.random_start else 1.0, 2.5 / self.steps)

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images. The model is attacked in eval mode with its parameters frozen and left as it was.

        Args:
            model: Pixels of shape `[B, C, H, W]` in the threat's box to logits of shape `[B, K]`.
            images: Images of shape `[B, C, H, W]` in the box.
            labels: Labels of shape `[B]`, int64.
            targets: Target classes of shape `[B]`, for a targeted attack.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box.

        Raises:
            ValueError: If the images are not in the box, or targets are given to an untargeted attack.
        """
        if targets is not None and not self.targeted:
            raise ValueError("targets were given to an untargeted attack; make it with targeted=True.")
        self.threat.check_images(images)
        return self.perturb(model, images, labels, targets=targets, keys=keys)

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        keys: Tensor | None = None,
        objective: str | None = None,
        confirm: Confirm | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range (which waits for the device).

        ``objective`` stands in where the attack itself names none; a `Trainer` hands its loss's here. ``confirm``
        (`attacks.victim`) decides which of several restarts fools; it is not asked without ``fooling_first``.
        """
        name = self.objective or objective or "ce"
        self._check_start(name)
        if len(images) == 0:
            return images.clone()
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        with as_victim(model):
            clean_logits = None
            if name == "kl" or (self.targeted and targets is None):
                with torch.no_grad():
                    clean_logits = full_precision_logits(model, images)
                if self.targeted and targets is None:
                    targets = clean_logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1)

            def score(logits: Tensor) -> Tensor:
                objective = defined_objective(name, logits.shape[1], targeted=targets is not None)
                return objective(logits, labels, clean_logits=clean_logits, targets=targets)

            best: Tensor | None = None
            best_fools = best_score = torch.empty(0)
            for restart in range(self.restarts):
                adv_images = self._one_start(model, images, keyed_random.derive(keys, restart), score)
                if self.restarts == 1:
                    return adv_images
                with torch.no_grad():
                    logits = full_precision_logits(model, adv_images)
                    predictions = logits.argmax(dim=1)
                    # What is no number is no answer.
                    nothing = ~logits.isfinite().all(dim=1)
                    fools = (predictions == targets if targets is not None else predictions != labels) | nothing
                    if not self.fooling_first:
                        fools = torch.zeros_like(fools)
                    elif confirm is not None:
                        # Asked about everybody: this model may be in another precision, and wrong about who is wrong.
                        fools = confirm(adv_images, torch.arange(len(images), device=images.device))
                    scores = score(logits)
                if best is None:
                    best, best_fools, best_score = adv_images, fools, scores
                    continue
                better = (fools & ~best_fools) | ((fools == best_fools) & (scores > best_score))
                best = torch.where(better.reshape(-1, *[1] * (images.dim() - 1)), adv_images, best)
                best_fools, best_score = best_fools | fools, torch.where(better, scores, best_score)
            assert best is not None
            return best

    def _one_start(self, model: nn.Module, images: Tensor, keys: Tensor, score) -> Tensor:
        images = images.detach()
        adv_images = self.threat.random_start(images, keys) if self.random_start else images.clone()
        step_size = self.resolved_step_size
        for _ in range(self.steps):
            adv_images = adv_images.detach().requires_grad_()
            with torch.enable_grad():
                total = score(full_precision_logits(model, adv_images)).sum()
                # The steps below ignore the gradient's length, so a scale that keeps float16 from underflowing is free.
                (grad,) = torch.autograd.grad(total * 1024, adv_images)
            with torch.no_grad():
                # A pixel whose gradient is not finite stays; the others go on. NaN images would count as withstood.
                grad = torch.where(grad.isfinite(), grad, 0)
                adv_images = self.threat.project(self.threat.step(adv_images, grad, step_size), images)
        return adv_images.detach()

    def _check_start(self, objective: str | None) -> None:
        if objective == "kl" and not self.random_start:
            raise ValueError('objective "kl" needs random_start=True: its gradient at the clean image is zero.')
        if objective == "kl" and self.targeted:
            raise ValueError('objective "kl" has no targeted form; use "ce", "margin" or "dlr".')


def defined_objective(name: str, num_classes: int, *, targeted: bool) -> Objective:
    """The objective of that name, or "margin" for the DLR where it is undefined: it divides by the 3rd or 4th logit."""
    return get_objective("margin" if name == "dlr" and num_classes < (4 if targeted else 3) else name)


def FGSM(  # named as the field writes it, beside PGD
    threat: ThreatModel,
    *,
    step_size: float | str | None = None,
    objective: str | None = None,
    random_start: bool = False,
    targeted: bool = False,
) -> PGD:
    """The fast gradient sign method: `PGD` with one step, of eps from the image or 1.25 eps from a random start."""
    return PGD(threat, 1, step_size, objective, random_start=random_start, targeted=targeted)
