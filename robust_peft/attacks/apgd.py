"""Auto-PGD: gradient ascent with momentum whose step size each sample halves for itself when it no longer gains.

Croce and Hein 2020 (arXiv:2003.01690), section 3 and Algorithm 1; targets and objectives as in their section 4. Serves
evaluation (``early_stop``) and, with ``early_stop=False`` and ``fooling_first=False``, training.

Differs from the official implementation in these: the start is uniform in the ball, not on its surface; the first
objective of the run is compared with that of the start, not with 0; over several passes (``eot``) objective and logits
are averaged too, not only the gradient; a sample that is fooled leaves the batch at once, not at the end of the run;
the last image is classified without a gradient that nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.pgd import defined_objective
from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.objectives import get_objective
from robust_peft.threat import ThreatModel

MOMENTUM = 0.75  # share of the new direction; the paper's alpha


@dataclass(frozen=True)
class APGD:
    """``steps`` times: gradient step, momentum, projection; at checkpoints, halve the step size and return to the best.

    Args:
        threat: Norm, budget and box.
        objective: "ce", "dlr", "margin" or "kl" (`robust_peft.objectives`). Where the DLR is undefined (fewer than 3
            classes, targeted fewer than 4), "margin" stands in for "dlr". None: the training loss's own inside a
            `Trainer`, else "ce".
        steps: Number of steps. A run takes one forward more, because the image after the last step is classified too.
        restarts: Independent runs from random starts, for each target where there are targets.
        targeted: A run towards each of the classes with the highest clean logits other than the label, in that order,
            or towards the ``targets`` of the call alone. Any wrong class counts as fooled.
        num_targets: At most so many targets; there are never more than classes other than the label.
        eot: Passes over which gradient, objective and logits are averaged, for a model that is random (expectation
            over transformation, Athalye et al. 2018, arXiv:1707.07397; AutoAttack's "rand" takes 20).
        early_stop: Whether a sample that is fooled leaves the batch, which waits for the device in each step. Without,
            nobody leaves (for training, and for models whose predictions depend on the batch) and nothing waits.
            Which samples are fooled is the same.
        rho: The step size is halved where no more than this share of the steps since the last checkpoint raised the
            objective.
        fooling_first: An image that fools the model, if any was seen, comes before one with a higher objective (for
            evaluation). False: the highest objective of all seen, whatever the model says of it (for training, which
            minimises over the maximum); needs ``early_stop=False``.

    Raises:
        ValueError: For a value out of range, "kl" with targets, ``num_targets`` without ``targeted``, or
            ``fooling_first=False`` with ``early_stop``.
    """

    threat: ThreatModel
    objective: str | None = "ce"
    steps: int = 100
    restarts: int = 1
    targeted: bool = False
    num_targets: int = 9
    eot: int = 1
    early_stop: bool = True
    rho: float = 0.75
    fooling_first: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise ValueError(f"threat should be a ThreatModel. Found threat = {self.threat!r}.")
        for name in ("steps", "restarts", "num_targets", "eot"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
        for name in ("targeted", "early_stop", "fooling_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} should be True or False. Found {name} = {value!r}.")
        if not isinstance(self.rho, (int, float)) or isinstance(self.rho, bool) or not 0 <= self.rho <= 1:
            raise ValueError(f"rho should be a number from 0 to 1. Found rho = {self.rho!r}.")
        if self.objective is not None:
            get_objective(self.objective)
        self._check_objective(self.objective)
        if not self.fooling_first and self.early_stop:
            raise ValueError("fooling_first=False needs early_stop=False: who leaves early has not seen its highest.")
        if not self.targeted and self.num_targets != type(self).num_targets:
            raise ValueError(f"num_targets should come with targeted=True. Found num_targets = {self.num_targets}.")

    def __str__(self) -> str:
        objective = f"-{self.objective.upper()}" if self.objective else ""
        restarts = f" x{self.restarts}" if self.restarts > 1 else ""
        passes = f" eot {self.eot}" if self.eot > 1 else ""
        return f"{'T-' if self.targeted else ''}APGD{objective}-{self.steps}{restarts}{passes} {self.threat}"

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
            targets: Target classes of shape `[B]`, for a targeted attack towards these alone.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box. Per sample one that fools the model where
            one was found; otherwise, between several that do, and always with ``fooling_first=False``, the one with the
            highest objective of all seen, or the highest margin where several targets were tried. With "kl" and
            ``early_stop=False`` labels play no part: the highest divergence.

        Raises:
            ValueError: If the images are not in the box, or targets are given to an untargeted attack.
        """
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
        confirm: Confirm | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range (which waits for the device).

        ``objective`` stands in where the attack itself names none; a `Trainer` hands its loss's here. ``confirm``
        (`attacks.victim`) decides who is fooled among those that ``model`` gets wrong, the others are attacked on;
        with ``early_stop=False`` it is given the whole batch, and answers are waited for. It is not asked with
        ``fooling_first=False``.
        """
        name = self.objective or objective or "ce"
        get_objective(name)
        self._check_objective(name)
        if targets is not None and not self.targeted:
            raise ValueError("targets were given to an untargeted attack; make it with targeted=True.")
        if len(images) == 0:
            return images.detach().clone()
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        with as_victim(model), torch.no_grad():
            clean_logits, goals = None, [targets]
            if name == "kl" or (self.targeted and targets is None):
                clean_logits = full_precision_logits(model, images)
                if self.targeted:
                    goals = self._likeliest(clean_logits, labels)
            found = _Found.none_yet(self.threat.project(images, images))
            positions = torch.arange(len(images), device=images.device)
            for place, goal in enumerate(goals):
                for restart in range(self.restarts):
                    if self.early_stop:
                        positions = (~found.fools).nonzero().squeeze(1)
                        if len(positions) == 0:
                            return found.images
                    start = self.threat.random_start(
                        images[positions], keyed_random.derive(keys[positions], restart, place)
                    )
                    climb = _Climb.at(start, images, labels, goal, clean_logits, positions, self.threat.eps)
                    self._run(model, climb, found, name, confirm, by_margin=len(goals) > 1)
        return found.images

    def _run(
        self, model: nn.Module, climb: _Climb, found: _Found, name: str, confirm: Confirm | None, *, by_margin: bool
    ) -> None:
        periods = checkpoints(self.steps)
        for step in range(self.steps + 1):
            last = step == self.steps
            logits, objective, grad = self._look(model, climb.adv_images, self._score(climb, name), with_grad=not last)
            score = get_objective("margin")(logits, climb.labels) if by_margin else objective
            fools = self._fools(logits, climb, found, name, confirm)
            found.offer(climb.positions, climb.adv_images, fools, score)
            if last:
                return
            assert grad is not None
            climb.note(objective, grad)
            if self.early_stop:
                standing = (~fools).nonzero().squeeze(1)
                if len(standing) == 0:
                    return
                if len(standing) < len(fools):
                    climb.keep(standing)
            if step in periods:
                climb.adapt(self.rho * periods[step])
            self._step(climb, first=step == 0)

    def _look(
        self, model: nn.Module, adv_images: Tensor, score: Callable[[Tensor], Tensor], *, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of shape `[b, K]`, objective of shape `[b]` and a multiple of its gradient, means over the passes."""
        logits: Tensor | None = None
        objective = grad = None
        for _ in range(self.eot):
            leaf = adv_images.detach().requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                new_logits = full_precision_logits(model, leaf)
                new_objective = score(new_logits)
                if with_grad:
                    # The steps ignore the gradient's length, so a scale that keeps float16 from underflowing is free.
                    (new_grad,) = torch.autograd.grad(new_objective.sum() * 1024, leaf)
                    # A pixel whose gradient is not finite stays; the others go on.
                    new_grad = new_grad.nan_to_num(0, 0, 0)
                    grad = new_grad if grad is None else grad + new_grad
            logits = new_logits.detach() if logits is None else logits + new_logits.detach()
            objective = new_objective.detach() if objective is None else objective + new_objective.detach()
        assert logits is not None and objective is not None
        return logits / self.eot, objective / self.eot, grad

    def _step(self, climb: _Climb, *, first: bool) -> None:
        threat, adv_images = self.threat, climb.adv_images
        direction = threat.step(torch.zeros_like(climb.grad), climb.grad, 1.0)
        moved = threat.project(adv_images + _per_row(climb.step_size, direction) * direction, climb.images)
        if not first:
            moved = adv_images + MOMENTUM * (moved - adv_images) + (1 - MOMENTUM) * (adv_images - climb.previous)
            moved = threat.project(moved, climb.images)
        climb.previous, climb.adv_images = adv_images, moved

    def _score(self, climb: _Climb, name: str) -> Callable[[Tensor], Tensor]:
        def score(logits: Tensor) -> Tensor:
            objective = defined_objective(name, logits.shape[1], targeted=climb.targets is not None)
            return objective(logits, climb.labels, clean_logits=climb.clean_logits, targets=climb.targets)

        return score

    def _fools(self, logits: Tensor, climb: _Climb, found: _Found, name: str, confirm: Confirm | None) -> Tensor:
        """Who is fooled in the end, a bool tensor of shape `[b]`."""
        fools = (logits.argmax(dim=1) != climb.labels) | ~logits.isfinite().all(dim=1)
        if not self.fooling_first or (not self.early_stop and name == "kl"):
            return torch.zeros_like(fools)
        if confirm is None:
            return fools
        # Who was confirmed before need not be again: that image stays.
        wanted = fools & ~found.fools[climb.positions]
        if not wanted.any():
            return torch.zeros_like(fools)
        if not self.early_stop:
            return fools & confirm(climb.adv_images, climb.positions)
        rows = wanted.nonzero().squeeze(1)
        fools[rows] = confirm(climb.adv_images[rows], climb.positions[rows])
        return fools

    def _likeliest(self, clean_logits: Tensor, labels: Tensor) -> list[Tensor]:
        """The targets, each of shape `[B]`, from the highest clean logit down."""
        count = min(self.num_targets, clean_logits.shape[1] - 1)
        if count < 1:
            raise ValueError(f"A targeted attack needs at least 2 classes. Found {clean_logits.shape[1]}.")
        others = clean_logits.scatter(1, labels.unsqueeze(1), -torch.inf)
        return list(others.argsort(dim=1, descending=True, stable=True)[:, :count].unbind(1))

    def _check_objective(self, objective: str | None) -> None:
        if objective == "kl" and self.targeted:
            raise ValueError('objective "kl" has no targeted form; use "ce", "margin" or "dlr".')


def checkpoints(steps: int) -> dict[int, int]:
    """Number of steps done at each checkpoint -> steps since the checkpoint before it.

    The paper's shares (section 3: 0.22 first, then shorter by 0.03 each time, at least 0.06) in whole steps, each
    rounded down but at least 1, as the official implementation counts: 22, 19, 16, 13, 10, 7, 6, 6 of 100.
    """
    period, shorter, shortest = (max(percent * steps // 100, 1) for percent in (22, 3, 6))
    found, done = {}, period
    while done <= steps:
        found[done] = period
        period = max(period - shorter, shortest)
        done += period
    return found


@dataclass
class _Found:
    """The best image so far of each of the B samples, over runs."""

    images: Tensor
    fools: Tensor
    scores: Tensor

    @classmethod
    def none_yet(cls, images: Tensor) -> _Found:
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        scores = torch.full((len(images),), -torch.inf, dtype=dtype, device=images.device)
        return cls(images, torch.zeros_like(scores, dtype=torch.bool), scores)

    def offer(self, positions: Tensor, adv_images: Tensor, fools: Tensor, scores: Tensor) -> None:
        """Take the images of shape `[b, ...]` that are better: those that fool first, then by score."""
        old_fools, old_scores, scores = self.fools[positions], self.scores[positions], scores.to(self.scores.dtype)
        better = (fools & ~old_fools) | ((fools == old_fools) & (scores > old_scores))
        self.images[positions] = torch.where(_per_row(better, adv_images), adv_images, self.images[positions])
        self.fools[positions] = fools | old_fools
        self.scores[positions] = torch.where(better, scores, old_scores)


@dataclass
class _Climb:
    """One run: a row for each of the b samples that still stand. Images and gradients `[b, ...]`, the rest `[b]`."""

    positions: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    clean_logits: Tensor | None  # [b, K]
    adv_images: Tensor
    previous: Tensor  # the iterate before
    grad: Tensor
    objective: Tensor
    best: Tensor
    best_grad: Tensor
    best_objective: Tensor
    step_size: Tensor
    rises: Tensor  # steps since the checkpoint that raised the objective
    halved: Tensor  # at the last checkpoint
    best_at_checkpoint: Tensor

    @classmethod
    def at(
        cls,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        clean_logits: Tensor | None,
        positions: Tensor,
        eps: float,
    ) -> _Climb:
        def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((len(start),), value, dtype=dtype, device=start.device)

        return cls(
            positions=positions,
            images=images[positions],
            labels=labels[positions],
            targets=None if targets is None else targets[positions],
            clean_logits=None if clean_logits is None else clean_logits[positions],
            adv_images=start,
            previous=start,
            grad=start,  # until the first look
            objective=filled(torch.inf),  # which the start's does not exceed, so that the start is no rise
            best=start,
            best_grad=torch.zeros_like(start),
            best_objective=filled(-torch.inf),
            step_size=filled(2 * eps, start.dtype),
            rises=filled(0, torch.int64),
            halved=filled(True, torch.bool),  # so that the second condition waits for the second checkpoint
            best_at_checkpoint=filled(-torch.inf),
        )

    def note(self, objective: Tensor, grad: Tensor) -> None:
        """What the look at ``adv_images`` said. An objective of NaN is no rise and never the best."""
        self.rises = self.rises + (objective > self.objective)
        better = objective > self.best_objective
        self.best = torch.where(_per_row(better, grad), self.adv_images, self.best)
        self.best_grad = torch.where(_per_row(better, grad), grad, self.best_grad)
        self.best_objective = torch.where(better, objective, self.best_objective)
        self.objective, self.grad = objective, grad

    def keep(self, rows: Tensor) -> None:
        """Drop everyone but ``rows``."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                setattr(self, field.name, value.index_select(0, rows))

    def adapt(self, enough: float) -> None:
        """At a checkpoint: who has had no more than ``enough`` rises, or gained nothing since a checkpoint that left
        the step size alone, halves it and goes on from the best image (conditions 1 and 2 of the paper).

        As in the official implementation, "no more than" (the paper: less than), and momentum and the next comparison
        still refer to where the sample was.
        """
        halve = (self.rises <= enough) | (~self.halved & (self.best_at_checkpoint >= self.best_objective))
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        self.adv_images = torch.where(_per_row(halve, self.best), self.best, self.adv_images)
        self.grad = torch.where(_per_row(halve, self.best), self.best_grad, self.grad)
        self.halved, self.best_at_checkpoint = halve, self.best_objective
        self.rises = torch.zeros_like(self.rises)


def _per_row(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.dim() - 1))
