"""Evaluation attacks by name. The name says nothing about the norm: the threat model does.

A name may carry numbers: ``NAME-K`` for K steps, ``xR`` for R random restarts, ``@STEP`` for the step size in pixel
units, as in "pgd-20x5" or "mifgsm-10@2/225". What is not named is the source paper's or the standard's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from robust_peft.attacks.apgd import APGD
from robust_peft.attacks.lending import library
from robust_peft.attacks.libraries import DDN, FAB, MIFGSM, CarliniWagner
from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.attacks.square import Square
from robust_peft.attacks.targeted import TargetedPGD
from robust_peft.attacks.transfer import Transfer
from robust_peft.pixel_units import step_size_problem
from robust_peft.threat import ThreatModel


class Attack(Protocol):
    """What every attack can do: adversarial images of the same shape and dtype, inside ball and box."""

    threat: ThreatModel

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class AttackEntry:
    """An attack as ``robust-peft zoo attacks`` lists it.

    ``forwards`` and ``backwards`` are formulas of the passes for one image that withstands, with K steps, C classes,
    T = min(9, C - 1) targets, and ``l2`` true under that norm; an image that falls early costs less.
    """

    name: str
    about: str
    norms: tuple[str, ...]
    knowledge: str
    forwards: str
    backwards: str
    source: str
    library: str
    parameters: str = ""
    """Which of K, x and @ its name may carry."""
    steps: int | None = None
    """The default of K; None where K has to be given or does not exist."""
    aliases: tuple[str, ...] = ()


BOTH = ("linf", "l2")
APGD_SOURCE = "Croce and Hein 2020, arXiv:2003.01690"
FAB_SOURCE = "Croce and Hein 2020, arXiv:1907.02044"
ENTRIES = (
    AttackEntry("clean", "no attack", BOTH, "none", "1", "0", "", "robust_peft", aliases=("standard",)),
    AttackEntry("fgsm", "one step of the size of the budget", BOTH, "white", "1", "1",
                "Goodfellow et al. 2015, arXiv:1412.6572", "robust_peft", "@"),
    AttackEntry("pgd-K", "K projected steps on the cross-entropy from a random start", BOTH, "white", "K", "K",
                "Madry et al. 2018, arXiv:1706.06083", "robust_peft", "Kx@", aliases=("pgd-l2-K",)),
    AttackEntry("t-pgd-K", "the same towards each of T classes", BOTH, "white", "T * (K + 1) + 1", "T * K",
                "Madry et al. 2018, arXiv:1706.06083", "robust_peft", "K@", aliases=("t-pgd-l2-K",)),
    AttackEntry("mifgsm", "signed steps with momentum", ("linf",), "white", "K", "K",
                "Dong et al. 2018, arXiv:1710.06081", "foolbox", "K@", 10, ("mi-fgsm",)),
    AttackEntry("apgd-ce", "Auto-PGD on the cross-entropy", BOTH, "white", "K + 1", "K", APGD_SOURCE, "robust_peft",
                "Kx", 100, ("autopgd", "autopgd-ce", "autopgd-l2")),
    AttackEntry("apgd-dlr", "Auto-PGD on the difference of logits ratio", BOTH, "white", "K + 1", "K", APGD_SOURCE,
                "robust_peft", "Kx", 100, ("autopgd-dlr",)),
    AttackEntry("t-apgd-ce", "Auto-PGD on the cross-entropy of each of T classes", BOTH, "white", "T * (K + 1) + 1",
                "T * K", APGD_SOURCE, "robust_peft", "Kx", 100, ("t-autopgd-ce",)),
    AttackEntry("t-apgd-dlr", "Auto-PGD on the targeted difference of logits ratio, T classes", BOTH, "white",
                "T * (K + 1) + 1", "T * K", APGD_SOURCE, "robust_peft", "Kx", 100,
                ("apgd-t", "t-autopgd", "t-autopgd-dlr", "t-autopgd-l2")),
    AttackEntry("fab", "nearest boundary, minimal norm", BOTH, "white", "2 * K + 2", "(C - 1) * K", FAB_SOURCE,
                "torchattacks", "K", 100),
    AttackEntry("t-fab", "nearest boundary with each of T classes", BOTH, "white", "T * (2 * K + 2) + 1", "T * K",
                FAB_SOURCE, "torchattacks", "K", 100, ("fab-t",)),
    AttackEntry("square", "random search over squares, K queries", BOTH, "black", "K + 1", "0",
                "Andriushchenko et al. 2020, arXiv:1912.00049", "robust_peft", "Kx", 5000, ("square-attack",)),
    AttackEntry("autoattack", "the standard: apgd-ce, t-apgd-dlr, t-fab, square, each on what still stands", BOTH,
                "white and black", "their sum", "their sum", APGD_SOURCE, "robust_peft, torchattacks", "K", 100),
    AttackEntry("autoattack-rand", "for randomised models: apgd-ce and apgd-dlr, gradients averaged over 20 passes",
                BOTH, "white", "40 * K", "40 * K", APGD_SOURCE, "robust_peft", "K", 100),
    AttackEntry("cw", "Carlini and Wagner: minimal norm with binary search under L2; PGD on the margin under L-inf",
                BOTH, "white", "9 * K + 2 if l2 else K", "9 * K if l2 else K",
                "Carlini and Wagner 2017, arXiv:1608.04644", "foolbox (linf: robust_peft)", "K", 100, ("c&w",)),
    AttackEntry("ddn", "minimal norm, direction and length decoupled", ("l2",), "white", "K + 2", "K",
                "Rony et al. 2019, arXiv:1811.09600", "foolbox", "K", 100, ("ddn-attack",)),
    AttackEntry("transfer", "apgd-ce made on a second model", BOTH, "black", "0", "0",
                "Liu et al. 2017, arXiv:1611.02770", "robust_peft", "K", 100),
)  # fmt: skip
NAMES = tuple(entry.name for entry in ENTRIES)

SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    # The attacks of the paper's Table 2 at their sources' strength.
    "paper": {
        "linf": ("fgsm", "pgd-100", "mifgsm", "apgd-ce", "t-apgd-dlr", "fab", "t-fab", "autoattack"),
        "l2": ("pgd-100", "t-pgd-100", "apgd-ce", "t-apgd-dlr", "fab", "t-fab", "autoattack"),
    },
    # The same as the official evaluation ran them: ten iterations of everything (torchattacks' default also inside its
    # AutoAttack), and steps that cannot reach large L-inf budgets nor any L2 budget in use. For comparison only.
    "paper-official-code": {
        "linf": ("fgsm", "pgd-10@2/225", "mifgsm-10@2/255", "apgd-ce-10", "t-apgd-dlr-10", "fab-10", "t-fab-10",
                 "autoattack-10"),
        "l2": ("pgd-10@2/225", "t-pgd-10@2/225", "apgd-ce-10", "t-apgd-dlr-10", "fab-10", "t-fab-10", "autoattack-10"),
    },
}  # fmt: skip

_BY_NAME = {name: entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}
_NUMBERS = re.compile(r"(?:-([1-9]\d*))?(?:x([1-9]\d*))?(?:@(\S+))?")


@dataclass(frozen=True)
class AttackName:
    """A name taken apart."""

    entry: AttackEntry
    steps: int | None
    restarts: int | None
    step_size: str | None

    def __str__(self) -> str:
        base = self.entry.name.removesuffix("-K")
        steps = f"-{self.steps}" if self.steps is not None else ""
        restarts = f"x{self.restarts}" if self.restarts is not None else ""
        return base + steps + restarts + (f"@{self.step_size}" if self.step_size is not None else "")


def parse_attack_name(name: str) -> AttackName:
    """The attack and the numbers of a name. ValueError that lists what there is where it is none."""
    lowered = name.lower() if isinstance(name, str) else ""
    for known in sorted(_BY_NAME, key=len, reverse=True):
        entry, base = _BY_NAME[known], known.removesuffix("-K")
        if not lowered.startswith(base):
            continue
        found = _NUMBERS.fullmatch(lowered[len(base) :])
        if found is None:
            continue
        steps, restarts, step_size = found.groups()
        for letter, value, what in (("K", steps, "steps"), ("x", restarts, "restarts"), ("@", step_size, "step size")):
            if value is not None and letter not in entry.parameters:
                raise ValueError(f"attack {entry.name} has no {what} to set. Found attack = {name!r}.")
        if steps is None and known.endswith("-K"):
            break
        if step_size is not None and (wrong := step_size_problem(step_size)):
            raise ValueError(f"{wrong} (in attack = {name!r})")
        chosen = None if steps is None or int(steps) == entry.steps else int(steps)
        return AttackName(entry, chosen, None if restarts is None or int(restarts) == 1 else int(restarts), step_size)
    raise ValueError(f"attack should be one of {', '.join(NAMES)} (K steps, e.g. pgd-20). Found attack = {name!r}.")


def check_attack_name(name: str, norm: str | None = None) -> str:
    """The name as this package writes it: lower case, aliases resolved.

    Raises:
        ValueError: For an unknown name, a number that the attack does not have, or an attack that does not exist for
            ``norm``.
    """
    parsed = parse_attack_name(name)
    if norm not in (None, "l2") and "-l2" in name.lower():
        raise ValueError(f"{name} says L2 and the threat model says {norm}; the attack's name here is {parsed}.")
    if norm is not None and norm not in parsed.entry.norms:
        raise ValueError(f"{parsed} exists for {', '.join(parsed.entry.norms)} only. Found norm = {norm!r}.")
    return str(parsed)


def components(name: str) -> tuple[str, ...]:
    """The attacks that an ensemble runs one after another, each on what still stands; of others, the attack itself."""
    parsed = parse_attack_name(name)
    steps = f"-{parsed.steps}" if parsed.steps is not None else ""
    if parsed.entry.name == "autoattack":
        return (f"apgd-ce{steps}", f"t-apgd-dlr{steps}", f"t-fab{steps}", "square")
    if parsed.entry.name == "autoattack-rand":
        return (f"rand-apgd-ce{steps}", f"rand-apgd-dlr{steps}")
    return (str(parsed),)


def forwards_of(name: str, norm: str, num_classes: int) -> int:
    """Forward passes for one image that withstands the attack, by the entry's formula; about, for a progress bar."""
    randomised = name.startswith("rand-")
    parsed = parse_attack_name(name.removeprefix("rand-"))
    steps = parsed.steps if parsed.steps is not None else parsed.entry.steps or 1
    names = {"K": steps, "C": num_classes, "T": min(9, num_classes - 1), "l2": norm == "l2"}
    count = int(eval(parsed.entry.forwards, {"__builtins__": {}}, names))  # our own constants
    return max(1, count * (parsed.restarts or 1) * (20 if randomised else 1))


def check_installed(name: str) -> None:
    """Import the library that serves an attack or a component. ImportError that names the extra where it is missing."""
    served = parse_attack_name(name.removeprefix("rand-")).entry.library
    for package in ("torchattacks", "foolbox"):
        if package in served:
            library(package)


def make_attack(
    name: str, threat: ThreatModel, *, early_stop: bool = True, transfer_from: nn.Module | None = None
) -> Any:
    """The attack of that name under a threat model.

    Args:
        name: A name of `ENTRIES`, an alias, or a component of an ensemble.
        threat: Norm, budget and box.
        early_stop: Whether a sample that is fooled is left alone from then on (the same verdict for less). False
            where predictions depend on the batch, so that nobody may leave it.
        transfer_from: The second model, for "transfer".

    Raises:
        ValueError: For an unknown name, an attack that does not exist for the norm, "clean" (no attack), an ensemble
            (see `components`), or "transfer" without a second model.
    """
    randomised = name.lower().startswith("rand-")
    parsed = parse_attack_name(name.lower().removeprefix("rand-"))
    base = parsed.entry.name
    check_attack_name(str(parsed), threat.norm)
    if base == "clean":
        raise ValueError('"clean" is the accuracy without an attack.')
    if base in ("autoattack", "autoattack-rand"):
        raise ValueError(f"{base} is made of {', '.join(components(name))}: make AutoAttack, or one of them.")
    options: dict[str, Any] = {}
    steps = parsed.steps if parsed.steps is not None else parsed.entry.steps
    if parsed.restarts is not None:
        options["restarts"] = parsed.restarts
    if parsed.step_size is not None:
        options["step_size"] = parsed.step_size
    # What fools a random model once may not do so on average, so that there the search goes on.
    stopping = {"early_stop": early_stop and not randomised}
    makers: dict[str, Callable[[], Any]] = {
        "fgsm": lambda: FGSM(threat, **options),
        "pgd-K": lambda: PGD(threat, steps=steps or 1, **options),
        "t-pgd-K": lambda: TargetedPGD(threat, steps=steps or 1, **options, **stopping),
        "mifgsm": lambda: MIFGSM(threat, steps=steps or 1, **options),
        "fab": lambda: FAB(threat, steps=steps or 1, **stopping),
        "t-fab": lambda: FAB(threat, steps=steps or 1, targeted=True, **stopping),
        "square": lambda: Square(threat, queries=steps or 1, **options, **stopping),
        "cw": lambda: CarliniWagner(threat, steps=steps or 1),
        "ddn": lambda: DDN(threat, steps=steps or 1),
    }
    if base == "transfer":
        if transfer_from is None:
            raise ValueError("transfer needs a second model: give it as transfer_from.")
        return Transfer(threat, transfer_from, steps=steps or 1)
    if "apgd" in base:
        targeted, objective = base.startswith("t-"), base.rsplit("-", 1)[1]
        return APGD(
            threat, objective, steps=steps or 1, targeted=targeted, eot=20 if randomised else 1, **options, **stopping
        )
    return makers[base]()
