"""Table 1: accuracy under L-inf attacks by budget, ResNet-18 and ResNet-34 on CIFAR-10."""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.published import TABLE_1
from robust_peft.studies.paper.setups import LINF_BUDGETS, from_scratch, networks, pair, tabulated
from robust_peft.studies.paper.tables import Column, attack_section
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Study

ATTACKS = ("pgd-100", "apgd-ce", "mifgsm", "fab", "t-fab", "fgsm", "autoattack")
COLUMNS = (
    Column("PGD", "pgd"),
    Column("AutoPGD", "apgd-ce"),
    Column("MI-FGSM", "mifgsm"),
    Column("FAB", "fab"),
    Column("T-FAB", "t-fab"),
    Column("FGSM", "fgsm"),
    Column("AutoAttack", "autoattack"),
)
THREATS = tuple(f"L-inf {eps}" for eps in ("8/255", *LINF_BUDGETS))


def study(scale: str) -> Study:
    return from_scratch(
        "table1",
        scale,
        question="Is CA-AT more accurate than vanilla under L-inf attacks of growing budget?",
        methods=pair(),
        axes={"model": networks(scale, "resnet18", "resnet34")},
        measure=tabulated(scale, ATTACKS, LINF_BUDGETS),
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return attack_section("Table 1: L-inf attacks by budget", records, output, COLUMNS, TABLE_1, threats=THREATS)
