"""Inner solvers by name: what makes the adversarial images that training minimises over.

An evaluation wants an image that the model gets wrong and may stop there; training wants the maximum of its loss. So
every solver here goes on to its last step for every image, and keeps the highest objective that it saw (where it looks:
one run of PGD keeps its last image). With a model that depends on the batch (BatchNorm on batch statistics) an image's
objective was seen in the company of the others' iterates of that step, and need not be the highest beside their bests.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from robust_peft.attacks.apgd import APGD
from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.threat import ThreatModel

# Name -> what can be set. Names say nothing about the norm: the threat model does.
SOLVERS: dict[str, tuple[str, ...]] = {
    "pgd": ("steps", "step_size", "restarts", "random_start", "objective"),
    "fgsm": ("step_size", "random_start", "objective"),
    "pgd-dlr": ("steps", "step_size", "restarts", "random_start"),
    "apgd": ("steps", "restarts", "objective"),
    "apgd-dlr": ("steps", "restarts"),
    "t-apgd-dlr": ("steps", "restarts", "num_targets"),
}
ALIASES = {"autopgd": "apgd", "autopgd-dlr": "apgd-dlr", "t-autopgd-dlr": "t-apgd-dlr"}  # as the CA-AT paper writes


class Solver(Protocol):
    """What a training step asks of its inner maximisation; `PGD` and `APGD` are such."""

    @property
    def threat(self) -> ThreatModel:
        """Norm, budget and box."""
        ...

    @property
    def objective(self) -> str | None:
        """What is maximised; None where the training loss is to say."""
        ...

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """Adversarial images for a model that is held in eval mode and frozen, and left as it was."""
        ...


def make_solver(
    name: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    step_size: float | str | None = None,
    restarts: int | None = None,
    random_start: bool | None = None,
    objective: str | None = None,
    num_targets: int | None = None,
) -> PGD | APGD:
    """The inner solver of that name under a threat model. What is None takes its default.

    An image costs K forward and backward passes with "pgd", one forward more with "apgd", and (K + 1) T + 1 forward
    and K T backward passes with "t-apgd-dlr", for K steps and T targets; R restarts take R times that, and with "pgd"
    a forward for each.

    Args:
        name: "pgd", "fgsm", "pgd-dlr", "apgd", "apgd-dlr" or "t-apgd-dlr"; "autopgd" for "apgd" as in the paper. The
            DLR is replaced by the margin where it is undefined (fewer than 3 classes, targeted fewer than 4).
        threat: Norm, budget and box.
        steps: Steps; default 10.
        step_size: pgd, pgd-dlr, fgsm: in the units of the pixels, as in `PGD`. The others adapt their own.
        restarts: Independent random starts, of which the highest objective is kept; default 1.
        random_start: pgd, pgd-dlr, fgsm: start inside the ball (default, but not for fgsm). The others always do.
        objective: pgd, fgsm, apgd: "ce", "kl", "margin" or "dlr"; default the training loss's own.
        num_targets: t-apgd-dlr: towards so many classes in turn, those with the highest clean logits other than the
            label. Default 1, the likeliest wrong class at the cost of an untargeted run: it is the one that the model
            falls to first. The evaluation attack of that name takes up to 9, at 9 times the cost.

    Raises:
        ValueError: For an unknown name, a parameter that the solver does not have, or a value out of range.
    """
    name = ALIASES.get(name, name)
    if name not in SOLVERS:
        raise ValueError(f"solver should be one of {', '.join(SOLVERS)}. Found solver = {name!r}.")
    asked: dict[str, Any] = {
        "steps": steps,
        "step_size": step_size,
        "restarts": restarts,
        "random_start": random_start,
        "objective": objective,
        "num_targets": num_targets,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    unknown = [key for key in given if key not in SOLVERS[name]]
    if unknown:
        raise ValueError(f"solver {name} has no {', '.join(unknown)}; it has {', '.join(SOLVERS[name])}.")
    if name == "fgsm":
        return FGSM(threat, **given)
    if name.endswith("-dlr"):
        given["objective"] = "dlr"
    if name.startswith("pgd"):
        return PGD(threat, **given, fooling_first=False)
    given = {"steps": 10, "objective": None} | given
    if name == "t-apgd-dlr":
        given = {"num_targets": 1, "targeted": True} | given
    return APGD(threat, **given, early_stop=False, fooling_first=False)
