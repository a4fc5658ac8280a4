"""Fig. 5: fronts of adapters in a robust ViT, on Stanford Dogs."""

from robust_peft.studies.paper.setups import fine_tuning
from robust_peft.studies.study import Study


def study(scale: str) -> Study:
    return fine_tuning(
        "fig5",
        scale,
        question="Does CA-AT give a better front than vanilla when adapters in a robust ViT are trained?",
        preset="dogs_vit",
        data={"Stanford Dogs": {}},
    )
