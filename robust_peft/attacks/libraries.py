"""The evaluation attacks that other libraries serve: FAB (torchattacks), MI-FGSM, C&W and DDN (foolbox).

The libraries attack what `robust_peft.attacks.lending` lends them in the model's place. What they return is judged by
ourselves: it is put into ball and box first, and it counts where the model gets it wrong there and, with ``confirm``,
where that says so too. None of them draws a random number, except that DDN and C&W under L-inf use the sample's key:
a result depends on neither batch nor process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.lending import (
    Lent,
    Search,
    column,
    foolbox_mifgsm,
    held,
    into_ball,
    library,
    run_foolbox,
    torchattacks_fab,
)
from robust_peft.attacks.pgd import PGD
from robust_peft.attacks.victim import Confirm
from robust_peft.pixel_units import NORMS, as_number, step_size_problem
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class LibraryAttack:
    """What these attacks share: their checks, and how they hold the model and the caller's state.

    Args:
        threat: Norm, budget and box; the libraries need a box.

    Raises:
        ValueError: For a value out of range, a norm that the attack is not defined for, or no box.
    """

    threat: ThreatModel
    _norms: ClassVar[tuple[str, ...]] = NORMS

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.threat, ThreatModel):
            raise ValueError(f"threat should be a ThreatModel. Found threat = {self.threat!r}.")
        if self.threat.norm not in self._norms:
            raise ValueError(f"{name} is an attack under {', '.join(self._norms)}. Found a threat of {self.threat}.")
        if self.threat.box is None:
            raise ValueError(f"{name} needs a threat with a box, e.g. box=(0, 1). Found box = None.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images. The model is attacked in eval mode with its parameters frozen and left as it was.

        Args:
            model: Pixels of shape `[B, C, H, W]` in the threat's box to logits of shape `[B, K]`.
            images: Images of shape `[B, C, H, W]` in the box.
            labels: Labels of shape `[B]`, int64.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator, whose state is put back.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box.

        Raises:
            ValueError: If the images are not in the box.
            ImportError: If the library that serves the attack is not installed.
        """
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
        """As calling the attack, without the check of the pixel range (which waits for the device).

        Args:
            confirm: Which images the model really gets wrong (`robust_peft.attacks.victim.Confirm`).
        """
        if len(images) == 0:
            return images.clone()
        with held(model, images.device), torch.no_grad():
            if keys is None:
                keys = keyed_random.fresh_keys(len(images), images.device)
            return self._attack(model, images.detach().contiguous(), labels, keys, confirm)

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, confirm: Confirm | None
    ) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class FAB(LibraryAttack):
    """Fast adaptive boundary attack of minimal norm (Croce and Hein 2020, arXiv:1907.02044), by torchattacks.

    The setting of the standard AutoAttack: 100 steps, eta 1.05, beta 0.9, alpha_max 0.1, one run from the image itself.
    The iteration and its projections are torchattacks'; they equal the reference's. Its `forward` is not used, because
    it reseeds torch's generator, fails on channels_last images and raises where there are fewer classes than targets.

    Differs from torchattacks and the reference: gradients are scaled to a largest entry of 1, because the L2 projection
    takes entries below 1e-8 for zero and so does nothing to a model with small logits; samples that are broken are not
    attacked with the remaining targets; of all classes only the nearest one's gradient is kept, so that memory does not
    grow with the number of classes.

    Args:
        threat: Norm, budget and box.
        steps: Number of steps, at least 1.
        targeted: Towards one class after another, in descending order of the clean logits, one backward pass a step.
            Otherwise towards the nearest class, which takes a backward pass for each class but one, in every step.
        num_targets: How many classes the targeted attack tries (fewer where there are fewer).
        early_stop: Whether a broken sample is left out from then on. False keeps the batch together, for models whose
            answer depends on it.
    """

    steps: int = 100
    targeted: bool = False
    num_targets: int = 9
    early_stop: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "steps", "num_targets")
        _check_flags(self, "targeted", "early_stop")

    def __str__(self) -> str:
        return f"{'targeted ' if self.targeted else ''}FAB-{self.steps} {self.threat}"

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, confirm: Confirm | None
    ) -> Tensor:
        search = Search(model, self.threat, images, labels, confirm)
        run = torchattacks_fab(self.threat.norm, self.steps)
        others = search.clean_logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)[:, :-1]
        rounds = others[:, : self.num_targets].unbind(1) if self.targeted else [None]
        for targets in rounds:
            positions = search.standing() if self.early_stop else torch.arange(len(images), device=images.device)
            if len(positions) == 0:
                break
            lent, pixels = search.lend(positions)
            chosen = None if targets is None else targets[positions]
            search.offer(run(lent, pixels, labels[positions], chosen), positions)
        return search.adv_images


@dataclass(frozen=True)
class MIFGSM(LibraryAttack):
    """Iterative FGSM with momentum 1 (Dong et al. 2018, arXiv:1710.06081, eq. 6 and 7), by foolbox; L-inf only.

    Differs from foolbox, which takes the gradient's sign before it enters the momentum: here it is divided by its L1
    norm, as in the paper. torchattacks divides by zero where a gradient vanishes, and from that step on the sample does
    not move any more.

    Args:
        threat: Norm, budget and box.
        steps: Number of steps, at least 1.
        step_size: In the units of the pixels, a number or a fraction like "2/255". None: eps / steps, the paper's.
    """

    steps: int = 10
    step_size: float | str | None = None
    _norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "steps")
        _check_step_size(self)

    def __str__(self) -> str:
        return f"MI-FGSM-{self.steps} {self.threat}"

    @property
    def resolved_step_size(self) -> float:
        """The step size in use, in the units of the pixels."""
        return self.threat.eps / self.steps if self.step_size is None else float(self.step_size)

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, confirm: Confirm | None
    ) -> Tensor:
        lent = Lent(model, self.threat, images, labels)
        attack = foolbox_mifgsm(self.steps, self.resolved_step_size / lent.width)
        found = run_foolbox(attack, lent, lent.to_unit(images), labels, epsilon=self.threat.eps / lent.width)
        return into_ball(self.threat, lent.from_unit(found), images)


@dataclass(frozen=True)
class CarliniWagner(LibraryAttack):
    """The attack of Carlini and Wagner 2017 (arXiv:1608.04644): of minimal norm under L2, by foolbox.

    Under L-inf: `PGD` on the margin objective, which the field has called so since Madry et al. 2018; none of the
    paper's own.

    Differs from the paper: 9 x 100 steps of 0.05 instead of 9 x 10,000 of 0.01. A hundred steps of 0.01 cannot move a
    black or white pixel, where the tanh is flat; steps of 0.1 are too coarse for natural images. foolbox's early stop,
    which looks at the sum over the batch, is off. torchattacks has no search for c, cannot move a pixel of 0 or 1 at
    all, stops by the sum over the batch, and takes 0 for the best other logit where all are negative.

    Args:
        threat: Norm, budget and box.
        steps: Number of steps, under L2 for each c; at least 1.
        binary_search_steps: How many values of c are tried, from 0.001 on. None: 9. L2 only.
        step_size: Adam's step in the space of the paper's w (eq. 7 ff.), which has no unit. None: 0.05. L2 only.
    """

    steps: int = 100
    binary_search_steps: int | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "steps")
        if self.threat.norm == "linf":
            for name in ("binary_search_steps", "step_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to the L2 attack. Found a threat of {self.threat}.")
        if self.binary_search_steps is not None:
            _check_counts(self, "binary_search_steps")
        _check_step_size(self)

    def __str__(self) -> str:
        searches = "" if self.threat.norm == "linf" else f"{self.binary_search_steps or 9}x"
        return f"C&W-{searches}{self.steps} {self.threat}"

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, confirm: Confirm | None
    ) -> Tensor:
        if self.threat.norm == "linf":
            pgd = PGD(self.threat, self.steps, objective="margin")
            return pgd.perturb(model, images, labels, keys=keys, confirm=confirm)
        attack = library("foolbox").attacks.L2CarliniWagnerAttack(
            binary_search_steps=self.binary_search_steps or 9,
            steps=self.steps,
            stepsize=0.05 if self.step_size is None else self.step_size,
            abort_early=False,
        )
        search = Search(model, self.threat, images, labels, confirm)
        lent, pixels = search.lend()
        found = run_foolbox(attack, lent, pixels, labels)
        # foolbox answers with a black image where it found nothing.
        nothing = (found == 0).flatten(1).all(dim=1)
        search.offer(torch.where(column(nothing, found), pixels, found))
        return search.adv_images


@dataclass(frozen=True)
class DDN(LibraryAttack):
    """Decoupled direction and norm (Rony et al. 2019, arXiv:1811.09600), L2 only, of minimal norm, by foolbox.

    The paper's setting: gamma 0.05, first norm 1 (of pixels in [0, 1]). Differs from foolbox: gradients have unit
    length before it sees them, because it takes those below 1e-12 for shorter than they are, and where one is zero the
    noise that takes its place comes from the sample's key.

    Args:
        threat: Norm, budget and box.
        steps: Number of steps, at least 1.
    """

    steps: int = 100
    _norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "steps")

    def __str__(self) -> str:
        return f"DDN-{self.steps} {self.threat}"

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, confirm: Confirm | None
    ) -> Tensor:
        step = 0

        def direction(grad: Tensor) -> Tensor:
            nonlocal step
            step += 1
            unit = self.threat.step(torch.zeros_like(grad), grad, 1.0)
            zero = (unit == 0).flatten(1).all(dim=1)
            if zero.any():
                noise = keyed_random.normal(keyed_random.derive(keys, step), tuple(grad.shape[1:]), grad.dtype)
                unit = torch.where(column(zero, unit), noise, unit)
            return unit

        search = Search(model, self.threat, images, labels, confirm)
        lent, pixels = search.lend(on_gradient=direction)
        search.offer(run_foolbox(library("foolbox").attacks.DDNAttack(steps=self.steps), lent, pixels, labels))
        return search.adv_images


def _check_counts(attack: LibraryAttack, *names: str) -> None:
    for name in names:
        value = getattr(attack, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")


def _check_flags(attack: LibraryAttack, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(attack, name), bool):
            raise ValueError(f"{name} should be True or False. Found {name} = {getattr(attack, name)!r}.")


def _check_step_size(attack: MIFGSM | CarliniWagner) -> None:
    if attack.step_size is not None:
        wrong = step_size_problem(attack.step_size)
        if wrong:
            raise ValueError(wrong)
        object.__setattr__(attack, "step_size", as_number(attack.step_size))
