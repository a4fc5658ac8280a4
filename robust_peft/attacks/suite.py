"""Evaluation attacks by name. The name says nothing about the norm: the threat model does."""

from __future__ import annotations

import re

from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.threat import ThreatModel

NAMES = ("clean", "fgsm", "pgd-K")
_PGD = re.compile(r"pgd-([1-9]\d*)")


def check_attack_name(name: str) -> str:
    """The name in lower case. ValueError that lists what there is where it is none of them."""
    lowered = name.lower()
    if lowered in ("clean", "fgsm") or _PGD.fullmatch(lowered):
        return lowered
    raise ValueError(f"attack should be one of {', '.join(NAMES)} (K steps, e.g. pgd-20). Found attack = {name!r}.")


def make_attack(name: str, threat: ThreatModel) -> PGD:
    """The attack of that name under a threat model; "clean" is no attack (ValueError)."""
    name = check_attack_name(name)
    if name == "clean":
        raise ValueError('"clean" is the accuracy without an attack.')
    match = _PGD.fullmatch(name)
    return FGSM(threat) if match is None else PGD(threat, steps=int(match.group(1)))
