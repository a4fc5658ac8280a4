"""Evaluation attacks by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust_peft.attacks import FGSM, PGD, check_attack_name, make_attack
from robust_peft.attacks.apgd import APGD
from robust_peft.attacks.autoattack import AutoAttack
from robust_peft.attacks.square import Square
from robust_peft.attacks.suite import ENTRIES, NAMES, SUITES, components, forwards_of
from robust_peft.attacks.targeted import TargetedPGD
from robust_peft.attacks.victim import Counted
from robust_peft.threat import ThreatModel

LINF, L2 = ThreatModel("linf", "8/255"), ThreatModel("l2", 0.5)
THREATS = [LINF, L2]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fgsm", lambda t: FGSM(t)),
        ("pgd-20", lambda t: PGD(t, steps=20)),
        ("pgd-200x5", lambda t: PGD(t, steps=200, restarts=5)),
        ("pgd-10@2/225", lambda t: PGD(t, steps=10, step_size="2/225")),
        ("t-pgd-7", lambda t: TargetedPGD(t, steps=7)),
        ("apgd-ce", lambda t: APGD(t, "ce", steps=100)),
        ("apgd-dlr-10x2", lambda t: APGD(t, "dlr", steps=10, restarts=2)),
        ("t-apgd-ce", lambda t: APGD(t, "ce", steps=100, targeted=True, num_targets=9)),
        ("t-apgd-dlr", lambda t: APGD(t, "dlr", steps=100, targeted=True, num_targets=9)),
        ("rand-apgd-dlr", lambda t: APGD(t, "dlr", steps=100, eot=20, early_stop=False)),
        ("square", lambda t: Square(t, queries=5000)),
        ("square-300", lambda t: Square(t, queries=300)),
    ],
)
def test_names_are_attacks(threat, name, expected) -> None:
    assert make_attack(name, threat) == expected(threat)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("FGSM", "fgsm"),
        ("PGD-20", "pgd-20"),
        ("pgd-20x1", "pgd-20"),
        ("AutoPGD", "apgd-ce"),
        ("AutoPGD-CE", "apgd-ce"),
        ("AutoPGD-DLR", "apgd-dlr"),
        ("T-AutoPGD-DLR", "t-apgd-dlr"),
        ("T-AutoPGD-CE", "t-apgd-ce"),
        ("apgd-t", "t-apgd-dlr"),
        ("fab-t", "t-fab"),
        ("T-FAB", "t-fab"),
        ("MI-FGSM", "mifgsm"),
        ("C&W", "cw"),
        ("AutoAttack", "autoattack"),
        ("apgd-ce-100", "apgd-ce"),
        ("square-5000", "square"),
    ],
)
def test_papers_names_are_aliases(alias: str, name: str) -> None:
    assert check_attack_name(alias) == name


@pytest.mark.parametrize(
    ("alias", "name"), [("PGD-L2-10", "pgd-10"), ("AutoPGD-L2", "apgd-ce"), ("T-AutoPGD-L2", "t-apgd-dlr")]
)
def test_a_name_that_says_a_norm_is_held_to_it(alias: str, name: str) -> None:
    assert check_attack_name(alias, "l2") == name
    with pytest.raises(ValueError, match="says L2 and the threat model says linf"):
        check_attack_name(alias, "linf")


@pytest.mark.parametrize("name", ["mifgsm", "ddn"])
def test_attacks_of_one_norm_say_so(name: str) -> None:
    other = L2 if name == "mifgsm" else LINF
    with pytest.raises(ValueError, match=f"{name} exists for .* only. Found norm"):
        make_attack(name, other)


@pytest.mark.parametrize(
    ("name", "what"),
    [("fgsm-3", "steps"), ("square@2/255", "step size"), ("fabx3", "restarts"), ("autoattackx2", "restarts")],
)
def test_numbers_that_an_attack_does_not_have_are_refused(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"has no {what} to set. Found attack = '{name}'"):
        check_attack_name(name)


def test_a_wrong_step_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step_size should be .* Found step_size = 'two'"):
        check_attack_name("pgd-3@two")


@pytest.mark.parametrize(
    "name", ["", "pgd", "pgd-", "pgd-0", "pgd-07", "pgd--1", "pgd-1.5", "pgd-20 ", "pgd-20\n", "xpgd-20", "autoattacks"]
)
def test_unknown_name_lists_what_there_is(name: str) -> None:
    for refuse in (lambda: check_attack_name(name), lambda: make_attack(name, LINF)):
        with pytest.raises(ValueError) as error:
            refuse()
        message = str(error.value)
        assert f"Found attack = {name!r}" in message and "\n" not in message
        assert all(known in message for known in NAMES)


def test_clean_and_ensembles_are_no_single_attack() -> None:
    with pytest.raises(ValueError, match="without an attack"):
        make_attack("clean", LINF)
    with pytest.raises(ValueError, match="is made of apgd-ce, t-apgd-dlr, t-fab, square"):
        make_attack("autoattack", LINF)
    with pytest.raises(ValueError, match="needs a second model"):
        make_attack("transfer", LINF)


def test_ensembles() -> None:
    assert components("autoattack") == ("apgd-ce", "t-apgd-dlr", "t-fab", "square")
    assert components("autoattack-10") == ("apgd-ce-10", "t-apgd-dlr-10", "t-fab-10", "square")
    assert components("autoattack-rand") == ("rand-apgd-ce", "rand-apgd-dlr")
    assert components("AutoPGD") == ("apgd-ce",)


def test_suites_hold_known_attacks_of_their_norm() -> None:
    assert SUITES
    for norms in SUITES.values():
        for norm, names in norms.items():
            assert names and [check_attack_name(name, norm) for name in names]


class Certain(nn.Module):
    """Right about everything whatever the pixels are, with a gradient that is not zero."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 48 * classes).reshape(classes, 48))

    def forward(self, images):
        logits = images.flatten(1) @ self.weight.T
        return logits + 1e3 * torch.eye(len(self.weight))[0].to(logits)


# The formulas are what a user plans with, so they are compared with what the model sees.
FORMULAS = [
    (entry.name.replace("-K", "-6") if entry.name.endswith("-K") else f"{entry.name}-6" if "K" in entry.parameters
     else entry.name, entry, threat)
    for entry in ENTRIES for threat in THREATS
    if threat.norm in entry.norms and entry.name not in ("clean", "autoattack", "autoattack-rand", "transfer")
]  # fmt: skip


@pytest.mark.parametrize(("name", "entry", "threat"), FORMULAS, ids=lambda v: v if isinstance(v, str) else "")
def test_costs_are_as_listed(name, entry, threat) -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    counted = Counted(Certain())
    make_attack(name, threat).perturb(counted, images, torch.zeros(3, dtype=torch.int64), keys=torch.arange(3))
    numbers = {"K": 6, "C": 4, "T": 3, "l2": threat.norm == "l2"}
    assert counted.backwards == 3 * eval(entry.backwards, {}, numbers)
    # Some libraries classify the clean image once or twice more.
    assert 0 <= counted.forwards - 3 * forwards_of(name, threat.norm, 4) <= 9
    assert forwards_of(name, threat.norm, 4) == eval(entry.forwards, {}, numbers)


def test_targeted_pgd_finds_the_class_that_gives_way() -> None:
    # Class 1 is the likeliest wrong one but no pixel moves it; class 2 gives way.
    class OneWay(nn.Module):
        def forward(self, images):
            mean = images.flatten(1).mean(dim=1)
            return torch.stack([torch.zeros_like(mean), -0.1 + 0 * mean, 20 * (mean - 0.55)], dim=1)

    images = torch.full((2, 3, 4, 4), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel("linf", 0.1)
    model = OneWay()
    assert (model(TargetedPGD(threat, steps=5)(model, images, labels)).argmax(1) == 2).all()
    assert (model(TargetedPGD(threat, steps=5, num_targets=1)(model, images, labels)).argmax(1) == 0).all()


def test_autoattack_of_images_at_hand_is_what_the_evaluator_measures() -> None:
    import robust_peft as rp
    from robust_peft import keyed_random
    from robust_peft.data import ImageSet

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    images = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 4  # one that is wrong as it is
    threat = ThreatModel("linf", 0.04)
    keys = keyed_random.sample_keys(0, 0, torch.arange(12))
    adv_images = AutoAttack(threat)(model, images, labels, keys=keys)
    assert threat.contains(adv_images, images).all()
    with torch.no_grad():
        standing = (model(adv_images).argmax(dim=1) == labels).tolist()
    report = rp.evaluate(model, ImageSet(images, labels, tuple("abcd")), [threat], ["autoattack"])
    assert report.find("autoattack", threat).correct == tuple(standing)
    assert 0 < sum(standing) < 11
