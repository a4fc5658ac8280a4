"""Attacks: what an adversary does to the pixels."""

from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.attacks.suite import check_attack_name, make_attack
from robust_peft.attacks.victim import as_victim

__all__ = ["FGSM", "PGD", "as_victim", "check_attack_name", "make_attack"]
