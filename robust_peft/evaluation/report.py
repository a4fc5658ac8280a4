"""What an evaluation found: verdicts for each sample, counted, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_peft.attacks.suite import check_attack_name
from robust_peft.files import read_json, write_json
from robust_peft.results import Accuracy
from robust_peft.threat import ThreatModel

WITHSTOOD, BROKEN, BROKEN_BEFORE, UNKNOWN = "1", "0", ".", "?"


@dataclass(frozen=True)
class AttackResult:
    """Verdicts of one attack under one threat model; the clean accuracy has no threat model."""

    attack: str
    threat: ThreatModel | None
    verdicts: str
    """One character for each sample, in the data's order: "1" the model was right throughout, "0" it was not, "." an
    attack before this one had broken the sample, so that this one was not tried on it, "?" not measured yet."""
    components: tuple[AttackResult, ...] = ()
    """Of an ensemble: the attacks that it ran, each on what the earlier ones left standing."""
    forwards: int = field(default=0, compare=False)
    """Images that went forwards through the model."""
    backwards: int = field(default=0, compare=False)
    """Images that went backwards."""
    seconds: float = field(default=0.0, compare=False)
    """Time spent, summed over processes."""

    def __post_init__(self) -> None:
        if set(self.verdicts) - set(WITHSTOOD + BROKEN + BROKEN_BEFORE + UNKNOWN):
            raise ValueError(f"verdicts should be made of 1, 0, . and ?. Found {self.verdicts!r}.")

    @property
    def finished(self) -> bool:
        """Whether every sample has its verdict."""
        return UNKNOWN not in self.verdicts

    @property
    def correct(self) -> tuple[bool, ...]:
        """For each sample whether it withstood this attack and, where those came first, the ones before it."""
        return tuple(verdict == WITHSTOOD for verdict in self.verdicts)

    @property
    def own(self) -> bool:
        """Whether the figure is the attack's alone: no sample was spared because another attack had broken it."""
        return BROKEN_BEFORE not in self.verdicts

    @property
    def accuracy(self) -> Accuracy:
        """Samples still right, with the 95 % Wilson interval of their share.

        A sample that an attack before had broken counts as broken, so that this is the attack's own figure only where
        ``own`` is true and what is left after it otherwise. ValueError where the evaluation is not finished.
        """
        self.check_finished()
        return Accuracy(sum(self.correct), len(self.verdicts))

    def check_finished(self) -> None:
        """ValueError that says how many samples have no verdict, if any has none."""
        if not self.finished:
            left = self.verdicts.count(UNKNOWN)
            raise ValueError(f"{self.attack} is not finished: {left} of {len(self.verdicts)} samples have no verdict.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        row: dict[str, Any] = {"attack": self.attack}
        if self.threat is not None:
            row |= {"norm": self.threat.norm, "eps": self.threat.eps, "box": self.threat.box}
        if self.finished:
            accuracy = self.accuracy
            row |= {"accuracy": accuracy.accuracy, "correct": accuracy.correct, "total": accuracy.total}
            row |= {"interval": list(accuracy.interval), "own": self.own}
        row |= {"forwards": self.forwards, "backwards": self.backwards, "seconds": round(self.seconds, 3)}
        row |= {"verdicts": self.verdicts}
        if self.components:
            row["components"] = [component.to_dict() for component in self.components]
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> AttackResult:
        """What `to_dict` wrote down."""
        box = row.get("box")
        threat = ThreatModel(row["norm"], row["eps"], box if box is None else tuple(box)) if "norm" in row else None
        components = tuple(cls.from_dict(component) for component in row.get("components", ()))
        counts = (row.get("forwards", 0), row.get("backwards", 0), row.get("seconds", 0.0))
        return cls(row["attack"], threat, row["verdicts"], components, *counts)


@dataclass
class Report:
    """What `evaluate` found.

    ``report[threat, "pgd-20"]`` is the `Accuracy` under that attack, ``report.clean`` the one without an attack,
    ``report.worst_case(threat)`` counts the samples that withstood every attack under the threat model.
    """

    data: str
    seed: int
    results: list[AttackResult] = field(default_factory=list)
    precision: str = "fp32"
    """What the attacks' iterations ran in; verdicts are float32's (or the model's own) in any case."""
    randomised: bool = False
    """Whether the model gives one batch two answers; it is then judged by mean logits of several passes."""
    rechecked: str | None = None
    """What the re-check of saved adversarial images found."""
    fixed_batches: int | None = None
    """Batch size, where predictions depend on who else is in the batch, so that the figures hold for it alone."""

    @property
    def finished(self) -> bool:
        """False where the time limit came first."""
        return all(result.finished for result in self.results)

    def find(self, attack: str, threat: ThreatModel | None) -> AttackResult:
        """The verdicts of one attack. KeyError that lists what was measured where there are none."""
        with suppress(ValueError):  # of a name that is unknown, which the error below then says
            attack = check_attack_name(attack)
        for result in self.results:
            if result.attack == attack and result.threat == threat:
                return result
        there = ", ".join(f"{r.attack} ({r.threat})" if r.threat else r.attack for r in self.results)
        raise KeyError(f"{attack} under {threat} was not measured. Measured: {there}.")

    def __getitem__(self, key: tuple[ThreatModel, str]) -> Accuracy:
        threat, attack = key
        return self.find(attack, None if attack == "clean" else threat).accuracy

    @property
    def clean(self) -> Accuracy:
        """Accuracy without an attack."""
        return self.find("clean", None).accuracy

    def worst_case(self, threat: ThreatModel) -> Accuracy:
        """Samples that withstood every attack measured under ``threat``, and no attack at all."""
        found = [r for r in self.results if r.threat == threat]
        if not found:
            raise KeyError(f"No attack was measured under {threat}.")
        for result in found:
            result.check_finished()
        withstood = [all(verdicts) for verdicts in zip(*(r.correct for r in found), strict=True)]
        return Accuracy(sum(withstood), len(withstood))

    def adversarial_mean_accuracy(self, threats: Sequence[ThreatModel] | None = None) -> float:
        """Mean over attacks of the accuracy under each, as the CA-AT paper's Table 2 summarises.

        A mean over attacks is no measure of robustness (an adversary takes the worst of them, `worst_case`); it is here
        to compare with tables that print it.

        Args:
            threats: Only attacks under these; None: under all.

        Raises:
            ValueError: If nothing was measured, or some samples were spared an attack (evaluate with ``each=True``).
        """
        rows = [r for r in self.results if r.threat is not None and (threats is None or r.threat in threats)]
        if not rows:
            raise ValueError("No attack was measured.")
        spared = [row.attack for row in rows if not row.own]
        if spared:
            raise ValueError(f"The mean needs each attack's own figure: evaluate with each=True ({', '.join(spared)}).")
        return sum(row.accuracy.accuracy for row in rows) / len(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: counts and intervals for people, verdicts as a string for programs."""
        head = {"data": self.data, "seed": self.seed, "confidence": 0.95, "finished": self.finished}
        head |= {"precision": self.precision, "fixed_batches": self.fixed_batches, "randomised": self.randomised}
        head |= {"rechecked": self.rechecked}
        worst = []
        for threat in dict.fromkeys(r.threat for r in self.results if r.threat is not None):
            if self.finished:
                accuracy = self.worst_case(threat)
                worst.append(
                    {"norm": threat.norm, "eps": threat.eps, "box": threat.box, "accuracy": accuracy.accuracy}
                    | {"correct": accuracy.correct, "total": accuracy.total, "interval": list(accuracy.interval)}
                )
        return {**head, "worst_case": worst, "results": [result.to_dict() for result in self.results]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report that `to_dict` wrote down."""
        results = [AttackResult.from_dict(row) for row in values["results"]]
        known = {key: values[key] for key in ("precision", "randomised", "rechecked", "fixed_batches") if key in values}
        return cls(values["data"], values["seed"], results, **known)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote."""
        return cls.from_dict(read_json(path))

    def __str__(self) -> str:
        lines = [f"{self.data}:"]
        width = max((len(r.attack) + 6 for r in self.results), default=0)
        for result in self.results:
            name = result.attack if result.own else f"after {result.attack}"
            lines.append(f"  {name:<{width}} {str(result.threat or ''):<14} {_figure(result)}")
            for component in result.components:
                lines.append(f"    {'after ' + component.attack:<{width + 13}} {_figure(component)}")
        threats = dict.fromkeys(r.threat for r in self.results if r.threat is not None)
        for threat in threats if self.finished else ():
            if sum(r.threat == threat for r in self.results) > 1:
                lines.append(f"  {'worst case':<{width}} {str(threat):<14} {self.worst_case(threat)}")
        if any(not result.own for result in self.results):
            lines.append('  "after": samples that an earlier attack had broken were not attacked again.')
        if self.precision != "fp32":
            lines.append(f"  Searched in {self.precision}, judged in float32.")
        if self.randomised:
            lines.append(
                "  The model is random: judged by mean logits of several passes; only autoattack-rand suits it."
            )
        if self.rechecked is not None:
            lines.append(f"  {self.rechecked}.")
        if self.fixed_batches is not None:
            lines.append(
                f"  Predictions depend on who else is in the batch: figures are for ordered batches of "
                f"{self.fixed_batches}."
            )
        return "\n".join(lines)


def _figure(result: AttackResult) -> str:
    if result.finished:
        return str(result.accuracy)
    return f"not finished: {result.verdicts.count(UNKNOWN)} of {len(result.verdicts)} samples to go"
