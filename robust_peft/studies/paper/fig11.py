"""Fig. 11: fronts with the loss CLP on CIFAR-10, ResNet-34 and WRN-28-10."""

from robust_peft.studies.paper.setups import from_scratch, front, networks
from robust_peft.studies.study import Study


def study(scale: str) -> Study:
    return from_scratch(
        "fig11",
        scale,
        question="Does CA-AT with the loss CLP give a better front than vanilla in larger networks?",
        methods=front(scale),
        axes={"model": {k: {**v, "loss.name": "clp"} for k, v in networks(scale, "resnet34", "wrn28_10").items()}},
    )
