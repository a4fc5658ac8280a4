"""Ways to fine-tune the embedded backbone, on the same footing: accuracies, parameters, disk, time, memory."""

from robust_peft.studies.baselines import adapters
from robust_peft.studies.small.setup import SEARCH, SETTINGS
from robust_peft.studies.study import Measurement, Study

RATES = (0.001, 0.006, 0.03)


def study() -> Study:
    return Study(
        name="small-adapters",
        question="Which adapter gives what accuracies, and at what cost?",
        base="quickstart",
        settings={**SETTINGS, "surgery.name": "vanilla", "surgery.lam": 0.5},
        methods=adapters(RATES),
        seeds=range(3),
        measure=SEARCH,
        confirm=Measurement(SEARCH.attacks, limit=200),  # the same on test images, for the rates chosen here
    )
