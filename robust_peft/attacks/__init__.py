"""Attacks: what an adversary does to the pixels."""

from robust_peft.attacks.apgd import APGD
from robust_peft.attacks.autoattack import AutoAttack
from robust_peft.attacks.libraries import DDN, FAB, MIFGSM, CarliniWagner
from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.attacks.square import Square
from robust_peft.attacks.suite import ENTRIES, SUITES, check_attack_name, components, make_attack
from robust_peft.attacks.targeted import TargetedPGD
from robust_peft.attacks.training import SOLVERS, Solver, make_solver
from robust_peft.attacks.transfer import Transfer
from robust_peft.attacks.victim import Counted, as_victim

__all__ = [
    "APGD",
    "DDN",
    "ENTRIES",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "SOLVERS",
    "SUITES",
    "AutoAttack",
    "CarliniWagner",
    "Counted",
    "Solver",
    "Square",
    "TargetedPGD",
    "Transfer",
    "as_victim",
    "check_attack_name",
    "components",
    "make_attack",
    "make_solver",
]
