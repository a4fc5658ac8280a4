"""Fig. 6: fronts by adversarial loss, ResNet-18 on CIFAR-10."""

from robust_peft.studies.paper.setups import from_scratch, front
from robust_peft.studies.study import Study


def study(scale: str) -> Study:
    return from_scratch(
        "fig6",
        scale,
        question="Does CA-AT give a better front than vanilla, whatever the adversarial loss?",
        methods=front(scale),
        axes={
            "loss": {
                "cross-entropy": {"loss.name": "ce"},
                "TRADES": {"loss.name": "trades"},
                "CLP": {"loss.name": "clp"},
            }
        },
    )
