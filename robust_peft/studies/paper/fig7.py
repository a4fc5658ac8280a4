"""Fig. 7: fronts on CIFAR-100 by attack, ResNet-18 and ResNet-34."""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.figures import fronts_by_attack
from robust_peft.studies.paper.setups import from_scratch, front, networks, searched
from robust_peft.studies.paper.tables import Column
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Study

# Section 5.3. The L2 budget is not said; it is Table 4's first.
ATTACKS = ("t-fab", "pgd-100", "mifgsm", "t-pgd-100", "autoattack")
COLUMNS = (
    Column("T-FAB", "t-fab", "L-inf 8/255"),
    Column("PGD", "pgd", "L-inf 8/255"),
    Column("MI-FGSM", "mifgsm", "L-inf 8/255"),
    Column("T-PGD-L2", "t-pgd", "L2 0.5"),
    Column("AutoAttack", "autoattack", "L-inf 8/255"),
)


def study(scale: str) -> Study:
    return from_scratch(
        "fig7",
        scale,
        question="Does CA-AT give a better front than vanilla on CIFAR-100?",
        methods=front(scale),
        axes={"model": networks(scale, "resnet18", "resnet34")},
        settings={"data.name": "cifar100"},
        measure=searched(scale, ATTACKS, ("l2 0.5",)),
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return fronts_by_attack("Fig. 7", study, records, output, COLUMNS)
