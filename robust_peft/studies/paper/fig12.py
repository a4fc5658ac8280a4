"""Fig. 12: learning rate and batch size, ResNet-18 on CIFAR-10.

Of the values only the rate of 0.4 is in the paper's text; 1,024 and all others are ours.
"""

from robust_peft.studies.paper.figures import accuracy_over_settings
from robust_peft.studies.paper.setups import check_scale, from_scratch, pair, tabulated
from robust_peft.studies.study import Settings, Study

# The first of each is what the other one is varied at.
RATES = {"paper": (0.4, 0.1, 0.2, 0.8), "tiny": (0.1, 0.05, 0.2)}
BATCHES = {"paper": (1024, 256, 512, 2048), "tiny": (50, 25, 100)}
extra = accuracy_over_settings


def study(scale: str) -> Study:
    check_scale(scale)
    rate, batch = RATES[scale][0], BATCHES[scale][0]
    runs = [*((other, batch) for other in RATES[scale]), *((rate, other) for other in BATCHES[scale][1:])]
    panels: dict[str, Settings] = {f"lr {r}, batch {b}": {"optim.lr": r, "data.batch_size": b} for r, b in runs}
    return from_scratch(
        "fig12",
        scale,
        question="Does the comparison of CA-AT and vanilla hold at other learning rates and batch sizes?",
        methods=pair(),
        axes={"training": panels},
        measure=tabulated(scale, ("pgd-20", "autoattack")),
        extra=extra,
    )
