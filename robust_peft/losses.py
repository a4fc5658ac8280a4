"""What training minimises: a clean loss and an adversarial loss, one number for each sample.

Every loss has ``clean(clean_logits, labels) -> [B]`` and ``adv(adv_logits, labels, clean_logits) -> [B]``. Where
``needs_clean_logits`` is False, ``adv`` ignores the clean logits, so that the clean and the adversarial pass can run
one after the other with one graph alive at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.nn import functional

from robust_peft.objectives import kl


class Loss(Protocol):
    """The pair of losses that the surgery trades off."""

    name: ClassVar[str]
    inner_objective: ClassVar[str]
    """The objective that the inner attack maximises where the attack itself names none."""
    needs_clean_logits: ClassVar[bool]
    """Whether the adversarial loss sends a gradient through the clean logits too."""

    def clean(self, clean_logits: Tensor, labels: Tensor) -> Tensor:
        """Clean loss of shape `[B]` from logits of shape `[B, C]` and labels of shape `[B]`."""
        ...

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """Adversarial loss of shape `[B]` from logits of shape `[B, C]` and labels of shape `[B]`."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy on clean and on adversarial images (Madry et al. 2018, arXiv:1706.06083; CA-AT, eq. 2)."""

    name: ClassVar[str] = "ce"
    inner_objective: ClassVar[str] = "ce"
    needs_clean_logits: ClassVar[bool] = False

    def clean(self, clean_logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(clean_logits, labels, reduction="none")

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return functional.cross_entropy(adv_logits, labels, reduction="none")


@dataclass(frozen=True)
class Trades:
    """KL(clean || adversarial) as the adversarial loss (TRADES, Zhang et al. 2019, arXiv:1901.08573, eq. 5).

    The gradient goes through both arguments of the divergence, as in the authors' code. Their weight beta = 1/lambda
    is the surgery's business here: Vanilla(lam) corresponds to beta = lam / (1 - lam).
    """

    name: ClassVar[str] = "trades"
    inner_objective: ClassVar[str] = "kl"
    needs_clean_logits: ClassVar[bool] = True

    def clean(self, clean_logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(clean_logits, labels, reduction="none")

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return kl(adv_logits, labels, clean_logits=clean_logits)


LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in (CrossEntropy, Trades)}


def make_loss(name: str) -> Loss:
    """The loss of that name. ValueError that lists the names where there is none."""
    if name not in LOSSES:
        raise ValueError(f"loss should be one of {', '.join(LOSSES)}. Found loss = {name!r}.")
    return LOSSES[name]()
