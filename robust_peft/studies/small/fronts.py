"""Does CA-AT give a better front than vanilla, and does it still in steps of equal length?

``--scale digits`` has 6 seeds on the digits that come with the package; ``--scale all`` has 3 on Fashion-MNIST beside
them, from the Hub (or from a local copy, see docs/studies.md).
"""

from robust_peft.studies.baselines import ca_at, ca_at_length_matched, multi_task, vanilla
from robust_peft.studies.small.setup import SEARCH, SETTINGS
from robust_peft.studies.study import Measurement, Settings, Study

DATA: dict[str, Settings] = {
    "MNIST digits": {"data.name": "digits", "threat.eps": "0.15"},
    "Fashion-MNIST": {"data.name": "fashion_mnist", "threat.eps": "0.1"},
}


def study(scale: str = "digits") -> Study:
    if scale not in ("digits", "all"):
        raise ValueError(f"scale should be digits or all. Found scale = {scale!r}.")
    return Study(
        name=f"small-fronts-{scale}",
        question="Does CA-AT give a better front than vanilla, and does it still when the steps' length is matched?",
        base="quickstart",
        settings=SETTINGS,
        axes={"data": DATA if scale == "all" else {"MNIST digits": DATA["MNIST digits"]}},
        methods=(*vanilla(), *ca_at(), *ca_at_length_matched(), *multi_task(cagrad=(), gradvac=())),
        seeds=range(6),
        panel_seeds={"Fashion-MNIST": range(3)} if scale == "all" else {},
        measure=SEARCH,
        confirm=Measurement(("clean", "autoattack"), limit=32, audit=True),
        confirm_seeds=2,  # four core-minutes a model
    )
