"""Table 3: standard training, vanilla and CA-AT under DDN, Carlini and Wagner, and Square; CIFAR-10.

The paper names no budgets. Here the minimal-norm attacks DDN and Carlini and Wagner have L2 0.5, as in Table 4, and
Square L-inf 8/255. Standard training is Vanilla(0).
"""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.published import TABLE_3
from robust_peft.studies.paper.setups import ca_at, from_scratch, networks, tabulated, vanilla
from robust_peft.studies.paper.tables import Column, attack_section
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Study

ATTACKS = ("square", "cw", "ddn", "autoattack")  # DDN under L2 alone
COLUMNS = (
    Column("DDN", "ddn", "L2 0.5"),
    Column("C&W", "cw", "L2 0.5"),
    Column("Square", "square", "L-inf 8/255"),
    Column("AutoAttack", "autoattack", "L-inf 8/255"),
    Column("AutoAttack-L2", "autoattack", "L2 0.5"),
)


def study(scale: str) -> Study:
    return from_scratch(
        "table3",
        scale,
        question="Is CA-AT more accurate than vanilla under attacks without gradients and by optimisation?",
        methods=(*vanilla(0.0, 0.5), *ca_at(0.8)),
        axes={"model": networks(scale, "resnet18", "resnet34")},
        measure=tabulated(scale, ATTACKS, ("l2 0.5",)),
        confirmed=False,  # a family has several methods: the figures are final as they are
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return attack_section("Table 3: black-box and optimisation-based attacks", records, output, COLUMNS, TABLE_3)
