"""Fig. 10: fronts with the loss TRADES on CIFAR-10, ResNet-34 and WRN-28-10."""

from robust_peft.studies.paper.setups import from_scratch, front, networks
from robust_peft.studies.study import Study


def study(scale: str) -> Study:
    return from_scratch(
        "fig10",
        scale,
        question="Does CA-AT with the loss TRADES give a better front than vanilla in larger networks?",
        methods=front(scale),
        axes={"model": {k: {**v, "loss.name": "trades"} for k, v in networks(scale, "resnet34", "wrn28_10").items()}},
    )
