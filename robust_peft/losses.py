"""What training minimises: a clean loss and an adversarial loss, one number for each sample.

Every loss has ``clean(clean_logits, labels) -> [B]`` and ``adv(adv_logits, labels, clean_logits) -> [B]``. Where
``needs_clean_logits`` is False, ``adv`` ignores the clean logits, so that the clean and the adversarial pass can run
one after the other with one graph alive at a time; where it is True, both graphs are alive at once.

The clean loss is the cross-entropy throughout, so that every pair is one of the paper's eq. 2. All are computed in
float32 or better, also from half-precision logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
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
        return _cross_entropy(clean_logits, labels)

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _cross_entropy(adv_logits, labels)


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
        return _cross_entropy(clean_logits, labels)

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        clean_logits, adv_logits = _both(self.name, clean_logits, adv_logits)
        return kl(adv_logits, labels, clean_logits=clean_logits)


@dataclass(frozen=True)
class Mart:
    """Boosted cross-entropy plus weighted KL as the adversarial loss (MART, Wang et al. 2020, ICLR, section 3).

    With p the clean and q the adversarial probabilities: ``-log q_y - log(1 - max over k != y of q_k)``, plus
    ``beta * KL(p || q) * (1 - p_y)``, which counts most where the clean image is misclassified. The gradient goes
    through p in both places, as in the authors' code. The inner attack maximises the cross-entropy.

    Differs from that code in its constants inside the logarithms, which are not needed here. The official code of CA-AT
    has no beta, which is ``beta=1``; there as here, the whole is the adversarial loss beside CE(clean).

    Args:
        beta: Weight of the second part; the paper's lambda. The authors' scripts take 5 for ResNet-18 and 6 for
            their WideResNet.

    Raises:
        ValueError: If beta is negative or not finite.
    """

    name: ClassVar[str] = "mart"
    inner_objective: ClassVar[str] = "ce"
    needs_clean_logits: ClassVar[bool] = True

    beta: float = 5.0

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not number or not 0 <= self.beta < math.inf:
            raise ValueError(f"beta should be a finite number of at least 0. Found beta = {self.beta!r}.")

    def clean(self, clean_logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(clean_logits, labels)

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        clean_logits, adv_logits = _both(self.name, clean_logits, adv_logits)
        if adv_logits.shape[1] < 2:
            raise ValueError(f"mart needs at least 2 classes. Found {adv_logits.shape[1]}.")
        rival = adv_logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1, keepdim=True)
        # log(1 - q_rival) is log of the sum of the other probabilities, which does not cancel where q_rival is near 1.
        log_not_rival = adv_logits.scatter(1, rival, -torch.inf).logsumexp(dim=1) - adv_logits.logsumexp(dim=1)
        boosted = _cross_entropy(adv_logits, labels) - log_not_rival
        misclassified = -torch.expm1(-_cross_entropy(clean_logits, labels))  # 1 - p_y
        return boosted + self.beta * kl(adv_logits, labels, clean_logits=clean_logits) * misclassified


@dataclass(frozen=True)
class LogitPairing:
    """Distance of clean and adversarial logits as the adversarial loss (Kannan et al. 2018, arXiv:1803.06373).

    The paper calls it CLP, Kannan et al. adversarial logit pairing (their clean logit pairing pairs different images).
    The gradient goes through both, and the inner attack maximises the cross-entropy. A model that gives one answer to
    everything has no such loss at all, so it needs the clean loss beside it.

    Args:
        pairing: "logits": mean over classes of the squared differences of the logits, as in Kannan et al.'s code.
            "probabilities": L2 norm of the difference of the softmax outputs, as in the official code of CA-AT, against
            what its paper says. Where the two are equal that norm has no gradient; 0 is taken.

    Raises:
        ValueError: For another pairing.
    """

    name: ClassVar[str] = "clp"
    inner_objective: ClassVar[str] = "ce"
    needs_clean_logits: ClassVar[bool] = True

    pairing: str = "logits"

    def __post_init__(self) -> None:
        if self.pairing not in ("logits", "probabilities"):
            raise ValueError(f"pairing should be logits or probabilities. Found pairing = {self.pairing!r}.")

    def clean(self, clean_logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(clean_logits, labels)

    def adv(self, adv_logits: Tensor, labels: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        clean_logits, adv_logits = _both(self.name, clean_logits, adv_logits)
        if self.pairing == "logits":
            return (adv_logits - clean_logits).square().mean(dim=1)
        return torch.linalg.vector_norm(adv_logits.softmax(dim=1) - clean_logits.softmax(dim=1), dim=1)


LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in (CrossEntropy, Trades, LogitPairing, Mart)}


def make_loss(name: str, **parameters: Any) -> Loss:
    """The loss of that name, with the parameters that it has: ``beta`` of "mart", ``pairing`` of "clp".

    Raises:
        ValueError: For an unknown name, a parameter that the loss does not have, or a value out of range.
    """
    if name not in LOSSES:
        raise ValueError(f"loss should be one of {', '.join(LOSSES)}. Found loss = {name!r}.")
    known = [field.name for field in fields(LOSSES[name])]
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"loss {name} has no parameter {', '.join(unknown)}; {there}.")
    return LOSSES[name](**parameters)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(_at_least_float32(logits), labels, reduction="none")


def _both(name: str, clean_logits: Tensor | None, adv_logits: Tensor) -> tuple[Tensor, Tensor]:
    if clean_logits is None:
        raise ValueError(f"{name} needs clean_logits: the logits of the clean images.")
    return _at_least_float32(clean_logits), _at_least_float32(adv_logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    """Half precision has too few digits for differences of probabilities, and float16 no room for squares."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
