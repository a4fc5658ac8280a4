"""Fig. 1: standard and adversarial accuracy of vanilla and CA-AT as bars, ResNet-18 on CIFAR-10."""

from robust_peft.studies.paper.figures import bars
from robust_peft.studies.paper.setups import from_scratch, networks, pair, tabulated
from robust_peft.studies.study import Study

extra = bars


def study(scale: str) -> Study:
    return from_scratch(
        "fig1",
        scale,
        question="Is CA-AT better than vanilla in both accuracies?",
        methods=pair(),
        axes={"model": networks(scale, "resnet18")},
        measure=tabulated(scale, ("pgd-20", "autoattack")),
        extra=extra,
    )
