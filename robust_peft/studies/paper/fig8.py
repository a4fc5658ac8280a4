"""Fig. 8: does training at a larger budget help? Accuracy over the evaluation's budgets, ResNet-18 on CIFAR-10.

The caption says 8/255 and 12/255 and ResNet-18, the text 8/255 and 16/255 and ResNet-34: here all three budgets, and
the caption's network.
"""

from robust_peft.studies.paper.figures import accuracy_over_budgets
from robust_peft.studies.paper.setups import from_scratch, pair, tabulated
from robust_peft.studies.study import Settings, Study

TRAINING_BUDGETS = ("8/255", "12/255", "16/255")
EVALUATION_BUDGETS = tuple(f"{budget}/255" for budget in range(4, 33, 4))
extra = accuracy_over_budgets


def study(scale: str) -> Study:
    panels: dict[str, Settings] = {f"trained at {eps}": {"threat.eps": eps} for eps in TRAINING_BUDGETS}
    return from_scratch(
        "fig8",
        scale,
        question="Does CA-AT gain by training at a larger budget, and does vanilla lose by it?",
        methods=pair(),
        axes={"budget": panels},
        measure=tabulated(scale, ("fgsm", "pgd-20", "autoattack"), EVALUATION_BUDGETS),
        extra=extra,
    )
