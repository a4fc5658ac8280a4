"""Evaluation attacks by name."""

from __future__ import annotations

import pytest

from robust_peft.attacks import FGSM, PGD, check_attack_name, make_attack
from robust_peft.attacks.suite import NAMES
from robust_peft.threat import ThreatModel

THREATS = [ThreatModel("linf", "8/255"), ThreatModel("l2", 0.5)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("steps", [1, 10, 20, 200])
def test_pgd(threat: ThreatModel, steps: int) -> None:
    assert make_attack(f"pgd-{steps}", threat) == PGD(threat, steps=steps)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_fgsm(threat: ThreatModel) -> None:
    assert make_attack("fgsm", threat) == FGSM(threat)


@pytest.mark.parametrize(
    ("name", "lowered"),
    [
        ("clean", "clean"),
        ("fgsm", "fgsm"),
        ("pgd-20", "pgd-20"),
        ("Clean", "clean"),
        ("FGSM", "fgsm"),
        ("PGD-20", "pgd-20"),
    ],
)
def test_case_plays_no_part(name: str, lowered: str) -> None:
    assert check_attack_name(name) == lowered
    if lowered != "clean":
        assert make_attack(name, THREATS[0]) == make_attack(lowered, THREATS[0])


def test_every_listed_name_is_known() -> None:
    assert NAMES
    for name in NAMES:
        example = name.replace("-K", "-7")
        assert check_attack_name(example) == example


@pytest.mark.parametrize(
    "name", ["", "pgd", "pgd-", "pgd-0", "pgd-07", "pgd--1", "pgd-1.5", "pgd-20 ", "pgd-20\n", "xpgd-20", "autoattacks"]
)
def test_unknown_name_lists_what_there_is(name: str) -> None:
    for refuse in (lambda: check_attack_name(name), lambda: make_attack(name, THREATS[0])):
        with pytest.raises(ValueError) as error:
            refuse()
        message = str(error.value)
        assert f"Found attack = {name!r}" in message and "\n" not in message
        assert all(known in message for known in NAMES)


def test_clean_is_no_attack() -> None:
    with pytest.raises(ValueError, match="without an attack"):
        make_attack("clean", THREATS[0])
