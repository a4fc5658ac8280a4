"""Table 5: training with MART; CIFAR-10. The caption names ResNet-18, the table has ResNet-34 too."""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.published import TABLE_5
from robust_peft.studies.paper.setups import from_scratch, networks, pair, tabulated
from robust_peft.studies.paper.tables import Column, attack_section
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Study

ATTACKS = ("t-apgd-dlr", "t-fab", "fgsm", "pgd-100", "apgd-ce", "mifgsm", "fab", "autoattack")
THREAT = "L-inf 8/255"
COLUMNS = (
    Column("T-AutoPGD", "t-apgd-dlr", THREAT),
    Column("T-FAB", "t-fab", THREAT),
    Column("FGSM", "fgsm", THREAT),
    Column("PGD", "pgd", THREAT),
    Column("AutoPGD", "apgd-ce", THREAT),
    Column("MI-FGSM", "mifgsm", THREAT),
    Column("FAB", "fab", THREAT),
    Column("AutoAttack", "autoattack", THREAT),
)


def study(scale: str) -> Study:
    mart = {
        label: {**settings, "loss.name": "mart"} for label, settings in networks(scale, "resnet18", "resnet34").items()
    }
    return from_scratch(
        "table5",
        scale,
        question="Is CA-AT better than vanilla when the adversarial loss is MART's?",
        methods=pair(),
        axes={"model": mart},
        measure=tabulated(scale, ATTACKS),
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return attack_section("Table 5: MART", records, output, COLUMNS, TABLE_5)
