"""Table 2: CA-AT with PGD or PGD-DLR as the training attack, ResNet-18 on CIFAR-10.

Vanilla is trained beside it, which the paper's table leaves out: without it nobody sees what CA-AT changes.
"""

from collections.abc import Sequence
from pathlib import Path

from robust_peft.studies.paper.published import TABLE_2
from robust_peft.studies.paper.setups import ca_at, from_scratch, networks, tabulated, vanilla
from robust_peft.studies.paper.tables import Column, attack_section
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Section
from robust_peft.studies.study import Settings, Study

SOLVERS: dict[str, Settings] = {
    "PGD": {"attack.name": "pgd", "attack.steps": 10, "attack.step_size": "2/255"},
    "PGD-DLR": {"attack.name": "pgd-dlr", "attack.steps": 10, "attack.step_size": "2/255"},
}
ATTACKS = ("t-apgd-dlr", "t-fab", "fgsm", "pgd-100", "apgd-ce", "mifgsm", "fab", "autoattack")
LINF, L2 = "L-inf 8/255", "L2 0.5"  # the L2 budget is not said; its figures are those of Table 4 at 0.5
COLUMNS = (
    Column("T-AutoPGD-DLR", "t-apgd-dlr", LINF),
    Column("T-AutoPGD-L2", "t-apgd-dlr", L2),
    Column("T-FAB", "t-fab", LINF),
    Column("FGSM", "fgsm", LINF),
    Column("PGD", "pgd", LINF),
    Column("AutoPGD", "apgd-ce", LINF),
    Column("MI-FGSM", "mifgsm", LINF),
    Column("FAB", "fab", LINF),
    Column("PGD-L2", "pgd", L2),
    Column("AutoPGD-L2", "apgd-ce", L2),
    Column("AutoAttack", "autoattack", LINF),
)


def study(scale: str) -> Study:
    ((network, settings),) = networks(scale, "resnet18").items()
    return from_scratch(
        "table2",
        scale,
        question="Does the training attack matter for CA-AT?",
        methods=(*vanilla(0.5), *ca_at(0.8, 0.9)),
        axes={"training": {f"{network}, {solver}": {**settings, **attack} for solver, attack in SOLVERS.items()}},
        measure=tabulated(scale, ATTACKS, ("l2 0.5",)),
        confirmed=False,  # a family has several methods: the figures are final as they are
        extra=extra,
    )


def extra(study: Study, records: Sequence[Record], output: Path) -> list[Section]:
    return attack_section("Table 2: the training attack", records, output, COLUMNS, TABLE_2, mean=True)
