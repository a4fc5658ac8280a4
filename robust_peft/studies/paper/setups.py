"""What the paper's experiments have in common: two scales, the methods, the networks, the measurements.

"paper" is the paper's own size. "tiny" runs the same code within minutes on two cores and without any download: MNIST
digits, the embedded backbone, narrow ResNets, few images and short attacks. Its figures say nothing about the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Measurement, Method, Settings, Study, grid

Extra = Callable[[Study, Sequence[Record], Path], list[Section]]
"""What makes further sections of a report, as `Study.extra`."""

SCALES = ("tiny", "paper")

FRONT_LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # section 5.3
FRONT_GAMMAS = (0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
PEFT_LAMBDAS = (0.0, 0.5, 1.0)  # section 5.2
PEFT_GAMMAS = (0.8, 0.9, 1.0)
CONFLICT_LAMBDAS = (0.5, 1.0)  # section 3.2, of Fig. 3
CONFLICT_GAMMAS = (0.8, 0.9)

LINF_BUDGETS = ("16/255", "24/255", "32/255")  # Table 1, beside 8/255
L2_BUDGETS = ("0.5", "1", "1.5", "2")  # Table 4

# Networks from random weights: their name here -> label and settings.
NETWORKS: dict[str, dict[str, tuple[str, Settings]]] = {
    "paper": {
        "resnet18": ("ResNet-18", {"backbone.name": "resnet18"}),
        "resnet34": ("ResNet-34", {"backbone.name": "resnet34"}),
        "wrn28_10": ("WRN-28-10", {"backbone.name": "wrn28_10"}),
    },
    "tiny": {
        "resnet18": ("ResNet-18, width 4", {"backbone.name": "resnet18", "backbone.width": 4}),
        "resnet34": ("ResNet-34, width 4", {"backbone.name": "resnet34", "backbone.width": 4}),
        # A WRN-28-10 has no narrow form here; a wider one of the narrow ResNets takes its place.
        "wrn28_10": ("ResNet-18, width 8", {"backbone.name": "resnet18", "backbone.width": 8}),
    },
}
TINY_FROM_SCRATCH: Settings = {
    "backbone.width": 4,
    "data.name": "digits",
    "data.limit": 300,
    "data.batch_size": 50,
    "data.augment": False,  # a digit's mirror image is no digit
    "data.rotation": 0.0,
    "optim.lr": 0.1,
    "optim.epochs": 3,
    "validation.every": 0,
    "evaluation.batch_size": 50,
    "precision": "fp32",
}
TINY_PEFT: Settings = {"data.limit": 1000, "attack.steps": 2}

# What stands for an attack at the tiny scale. AutoAttack is left out: its Square alone takes 5,000 queries.
TINY_ATTACKS = {
    "pgd-20": "pgd-5",
    "pgd-100": "pgd-5",
    "t-pgd-100": "t-pgd-3",
    "mifgsm": "mifgsm-5",
    "apgd-ce": "apgd-ce-5",
    "t-apgd-dlr": "t-apgd-dlr-3",
    "fab": "fab-3",
    "t-fab": "t-fab-3",
    "square": "square-50",
    "cw": "cw-5",
    "ddn": "ddn-5",
}
SEARCH = {
    "paper": Measurement(("clean", "apgd-ce", "t-apgd-dlr"), split="validation"),
    "tiny": Measurement(("clean", "apgd-ce-5", "t-apgd-dlr-3"), split="validation", limit=50),
}
FINAL = {
    "paper": Measurement(("clean", "autoattack"), audit=True),
    "tiny": Measurement(("clean", "apgd-ce-10", "t-apgd-dlr-5"), limit=50),
}


def vanilla(*lambdas: float) -> tuple[Method, ...]:
    """Weighted average of the two gradients, one method for each weight of the adversarial one."""
    return grid("vanilla", "surgery.lam", lambdas, {"surgery.name": "vanilla"})


def ca_at(*gammas: float) -> tuple[Method, ...]:
    """CA-AT, one method for each gamma but 1, which is Vanilla(0) and trained under that name."""
    return grid("CA-AT", "surgery.gamma", [gamma for gamma in gammas if gamma != 1], {"surgery.name": "ca-at"})


def pair() -> tuple[Method, ...]:
    """The two models that the paper's tables compare."""
    return (*vanilla(0.5), *ca_at(0.8))


def front(scale: str) -> tuple[Method, ...]:
    """The fronts of training from scratch; fewer points at the tiny scale."""
    if scale == "tiny":
        return peft_front()
    return (*vanilla(*FRONT_LAMBDAS), *ca_at(*FRONT_GAMMAS))


def peft_front() -> tuple[Method, ...]:
    """The fronts of fine-tuning adapters."""
    return (*vanilla(*PEFT_LAMBDAS), *ca_at(*PEFT_GAMMAS))


def networks(scale: str, *names: str) -> dict[str, Settings]:
    """An axis of networks, by their names in `NETWORKS`."""
    check_scale(scale)
    return dict(NETWORKS[scale][name] for name in names)


def tabulated(scale: str, attacks: Sequence[str], eps: Sequence[str] = ()) -> Measurement:
    """Every attack on every one of the first 1,000 test images (tiny: 30), at the run's budget and at others.

    Nothing may be chosen by these figures, which are of test images: `Study` refuses a final measurement of a family's
    better ones.

    Args:
        scale: "paper" or "tiny", where shorter attacks stand for these.
        attacks: Attacks by name, without "clean".
        eps: Budgets beside the run's own, as `Measurement` takes them: "16/255", or "l2 0.5".
    """
    limit = 1000 if scale == "paper" else 30
    return Measurement(("clean", *_at(scale, attacks)), limit=limit, each=True, eps=tuple(eps))


def searched(scale: str, attacks: Sequence[str], eps: Sequence[str] = ()) -> Measurement:
    """Every attack on every validation image (tiny: the first 50): for fronts, from which methods are chosen.

    Args:
        scale: "paper" or "tiny", where shorter attacks stand for these.
        attacks: Attacks by name, without "clean".
        eps: Budgets beside the run's own.
    """
    limit = None if scale == "paper" else 50
    return Measurement(("clean", *_at(scale, attacks)), split="validation", limit=limit, each=True, eps=tuple(eps))


def _at(scale: str, attacks: Sequence[str]) -> list[str]:
    check_scale(scale)
    if scale == "paper":
        return list(attacks)
    return [TINY_ATTACKS.get(name, name) for name in attacks if name != "autoattack"]


def from_scratch(
    name: str,
    scale: str,
    *,
    question: str,
    methods: Sequence[Method],
    axes: Mapping[str, Mapping[str, Settings]],
    settings: Settings | None = None,
    measure: Measurement | None = None,
    confirmed: bool = True,
    extra: Extra | None = None,
) -> Study:
    """Adversarial training of ResNets from random weights, as section 5.1 has it (preset cifar_resnet, variant paper).

    Args:
        name: The experiment's name, e.g. "fig6".
        scale: "paper" or "tiny".
        question: What it asks.
        methods: What is compared.
        axes: What else varies, at this scale.
        settings: What all runs change in the preset at the paper's scale; the tiny one has the digits instead.
        measure: How every run is measured; None: on validation images, as a search.
        confirmed: Whether the fronts are measured finally (AutoAttack and audit on all test images); not where
            ``measure`` takes test images and a family has several methods.
        extra: Further sections of the report.
    """
    check_scale(scale)
    return Study(
        name=f"paper-{name}-{scale}",
        question=question,
        base="cifar_resnet",
        variant="paper",
        settings=TINY_FROM_SCRATCH if scale == "tiny" else settings or {},
        axes=axes,
        methods=methods,
        measure=measure or SEARCH[scale],
        confirm=FINAL[scale] if confirmed else None,
        extra=extra,
    )


def fine_tuning(name: str, scale: str, *, question: str, preset: str, data: Mapping[str, Settings]) -> Study:
    """Fronts of adapters in a robust backbone; at the tiny scale in the embedded one, on digits.

    Args:
        name: The experiment's name, e.g. "fig4".
        scale: "paper" or "tiny".
        question: What it asks.
        preset: The preset at the paper's scale.
        data: The axis of data sets at the paper's scale.
    """
    check_scale(scale)
    tiny = scale == "tiny"
    return Study(
        name=f"paper-{name}-{scale}",
        question=question,
        base="quickstart" if tiny else preset,
        settings=TINY_PEFT if tiny else {},
        axes={"data": {"digits": {}} if tiny else data},
        methods=peft_front(),
        measure=SEARCH[scale],
        confirm=FINAL[scale],
    )


def check_scale(scale: str) -> None:
    """ValueError that lists the scales where this is none."""
    if scale not in SCALES:
        raise ValueError(f"scale should be one of {', '.join(SCALES)}. Found scale = {scale!r}.")
