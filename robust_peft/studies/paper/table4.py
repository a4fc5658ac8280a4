"""Table 4: accuracy under L2 attacks by budget, of models trained under L-inf; CIFAR-10."""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.published import TABLE_4
from robust_peft.studies.paper.setups import L2_BUDGETS, from_scratch, networks, pair, tabulated
from robust_peft.studies.paper.tables import Column, attack_section
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Study

ATTACKS = ("pgd-100", "apgd-ce", "t-apgd-dlr", "autoattack")
COLUMNS = (
    Column("PGD", "pgd"),
    Column("AutoPGD", "apgd-ce"),
    Column("T-AutoPGD", "t-apgd-dlr"),
    Column("AutoAttack", "autoattack"),
)
THREATS = tuple(f"L2 {eps}" for eps in L2_BUDGETS)


def study(scale: str) -> Study:
    return from_scratch(
        "table4",
        scale,
        question="Is CA-AT more accurate than vanilla under L2 attacks of growing budget?",
        methods=pair(),
        axes={"model": networks(scale, "resnet18", "resnet34")},
        measure=tabulated(scale, ATTACKS, [f"l2 {eps}" for eps in L2_BUDGETS]),
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return attack_section("Table 4: L2 attacks by budget", records, output, COLUMNS, TABLE_4, threats=THREATS)
