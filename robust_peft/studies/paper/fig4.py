"""Fig. 4: fronts of adapters in a robust Swin, on CUB-200, Stanford Dogs and, at 224 pixels, CIFAR-10 and -100."""

from robust_peft.presets import get_preset
from robust_peft.studies.paper.setups import fine_tuning
from robust_peft.studies.study import Settings, Study

# CIFAR's pictures are many and small: fewer passes, as the preset cifar_swin has them.
_OPTIM = get_preset("cifar_swin").optim
CIFAR: Settings = {"optim.epochs": _OPTIM.epochs, "optim.warmup_epochs": _OPTIM.warmup_epochs}


def study(scale: str) -> Study:
    return fine_tuning(
        "fig4",
        scale,
        question="Does CA-AT give a better front than vanilla when adapters in a robust Swin are trained?",
        preset="cub_swin",
        data={
            "CUB-200": {},
            "Stanford Dogs": {"data.name": "stanford_dogs"},
            "CIFAR-10": {"data.name": "cifar10", **CIFAR},
            "CIFAR-100": {"data.name": "cifar100", **CIFAR},
        },
    )
