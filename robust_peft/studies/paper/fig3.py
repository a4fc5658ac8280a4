"""Fig. 3: the conflict mu over the epochs, by data set, network and training attack."""

from robust_peft.studies.paper.figures import conflict_over_epochs
from robust_peft.studies.paper.setups import (
    CONFLICT_GAMMAS,
    CONFLICT_LAMBDAS,
    NETWORKS,
    ca_at,
    check_scale,
    from_scratch,
    vanilla,
)
from robust_peft.studies.study import Settings, Study

SOLVERS: dict[str, Settings] = {
    "AutoPGD": {"attack.name": "apgd", "attack.steps": 10},
    "AutoPGD-DLR": {"attack.name": "apgd-dlr", "attack.steps": 10},
    "T-AutoPGD-DLR": {"attack.name": "t-apgd-dlr", "attack.steps": 10},
}
extra = conflict_over_epochs


def study(scale: str) -> Study:
    check_scale(scale)
    data = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"} if scale == "paper" else {"digits": "digits"}
    panels: dict[str, Settings] = {}
    for images, name in data.items():
        for network in ("resnet18", "resnet34"):
            label, settings = NETWORKS[scale][network]
            panels[f"{images}, {label}, PGD"] = {"data.name": name, **settings}
    images, name = next(iter(data.items()))
    label, settings = NETWORKS[scale]["resnet18"]
    steps: Settings = {} if scale == "paper" else {"attack.steps": 3}
    for solver, attack in SOLVERS.items():
        panels[f"{images}, {label}, {solver}"] = {"data.name": name, **settings, **attack, **steps}
    return from_scratch(
        "fig3",
        scale,
        question="Does CA-AT keep the conflict mu smaller than vanilla does, whatever data, network and attack?",
        methods=(*vanilla(*CONFLICT_LAMBDAS), *ca_at(*CONFLICT_GAMMAS)),
        axes={"training": panels},
        confirmed=False,
        extra=extra,
    )
