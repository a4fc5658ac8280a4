"""What an attack maximises: one number for each sample, larger when the model is more wrong.

Every objective has the signature ``objective(logits, labels, *, clean_logits=None, targets=None) -> [B]`` with logits
of shape `[B, C]` and labels and targets of shape `[B]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Objective = Callable[..., Tensor]


def ce(logits: Tensor, labels: Tensor, *, clean_logits: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy with the label, or minus the cross-entropy with the target class where targets are given."""
    if targets is not None:
        return -functional.cross_entropy(logits, targets, reduction="none")
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(
    logits: Tensor, labels: Tensor, *, clean_logits: Tensor | None = None, targets: Tensor | None = None
) -> Tensor:
    """Best other logit minus the label's (Carlini and Wagner 2017, eq. 6), or target minus label; above 0 if wrong."""
    label_logit = _pick(logits, labels)
    if targets is not None:
        return _pick(logits, targets) - label_logit
    _need_classes(logits, 2, "margin")
    return _best_other(logits, labels) - label_logit


def dlr(logits: Tensor, labels: Tensor, *, clean_logits: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, arXiv:2003.01690, eq. 6; targeted: eq. 7).

    Invariant to shift and scale of the logits, so it cannot be saturated by scaling them. Untargeted it needs at least
    3 classes and targeted at least 4; below that it raises ValueError that names ``margin`` as the one to take.
    """
    if targets is None:
        _need_classes(logits, 3, "dlr", "margin")
        ordered = logits.sort(dim=1, descending=True).values
        return (_best_other(logits, labels) - _pick(logits, labels)) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    _need_classes(logits, 4, "targeted dlr", "margin")
    ordered = logits.sort(dim=1, descending=True).values
    spread = ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3])
    return (_pick(logits, targets) - _pick(logits, labels)) / (spread + 1e-12)


def kl(logits: Tensor, labels: Tensor, *, clean_logits: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
    """KL(clean || adversarial) (TRADES, Zhang et al. 2019, arXiv:1901.08573, eq. 3); ignores the labels.

    Its gradient at the clean image is zero, so the attack that uses it needs a random start. No targeted form.
    """
    if targets is not None:
        raise ValueError("kl has no targeted form; use ce, margin or dlr with targets.")
    if clean_logits is None:
        raise ValueError("kl needs clean_logits: the logits of the clean images.")
    log_clean = functional.log_softmax(clean_logits, dim=1)
    log_adv = functional.log_softmax(logits, dim=1)
    return (log_clean.exp() * (log_clean - log_adv)).sum(dim=1)


OBJECTIVES: dict[str, Objective] = {"ce": ce, "kl": kl, "margin": margin, "dlr": dlr}


def get_objective(name: str) -> Objective:
    """The objective of that name. ValueError that lists the names where there is none."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective should be one of {', '.join(OBJECTIVES)}. Found objective = {name!r}.")
    return OBJECTIVES[name]


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes.unsqueeze(1)).squeeze(1)


def _best_other(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1)


def _need_classes(logits: Tensor, least: int, name: str, instead: str | None = None) -> None:
    if logits.shape[1] < least:
        advice = f"; use {instead}" if instead else ""
        raise ValueError(f"{name} needs at least {least} classes. Found {logits.shape[1]}{advice}.")
