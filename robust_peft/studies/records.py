"""What is known of a study's points: the one table that fronts, statistics and reports are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from robust_peft.results import Accuracy


@dataclass(frozen=True)
class Verdicts:
    """One attack's verdicts on one model: who is still classified correctly, by sample.

    Attributes:
        attack: The attack's name as the evaluation calls it; "clean" for none.
        threat: The threat model in words, e.g. "L-inf 8/255"; empty for "clean".
        correct: Sample index to whether the model is right (worst case over the attacks up to this one, as
            `robust_peft.evaluate` counts unless each attack tried every sample).
    """

    attack: str
    threat: str
    correct: Mapping[int, bool]

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(sum(self.correct.values()), len(self.correct))


@dataclass(frozen=True)
class Record:
    """One point of a study, finished or not.

    Attributes:
        key: `robust_peft.studies.study.Point.key`.
        panel: Axis to label.
        family: The method's family.
        label: The method's label within the family.
        seed: The run's seed.
        folder: The run folder.
        status: "waiting", "running", "trained" (not measured yet), "done" or "failed".
        error: What a failed point said; also of a point that is "done", where its final measurement failed.
        measured: Verdicts of the measurement that every point gets: "clean" first, then each attack; else empty.
        confirmed: Verdicts of the final measurement; empty where the point was not chosen for it.
        audit: "passed", "failed", "warnings", or None where there was no audit; ``audit_failures`` names checks.
        confirmation: How far the final measurement is: "waiting", "running", "failed", "done"; None where the point was
            not chosen for it, or the choice is still to be made.
        versions: Stage ("measured", "confirmed") to the packages' versions that it was measured with, as far as known.
        images: Stage to a hash of the images' and labels' content, as far as known.
        training: What training took: "seconds", "seconds_per_step", "trainable_parameters", "bytes_on_disk",
            "peak_memory_bytes" as far as known.
    """

    key: str
    panel: Mapping[str, str]
    family: str
    label: str
    seed: int
    folder: Path
    status: str
    error: str | None = None
    measured: tuple[Verdicts, ...] = ()
    confirmed: tuple[Verdicts, ...] = ()
    audit: str | None = None
    audit_failures: tuple[str, ...] = ()
    confirmation: str | None = None
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return f"{self.family} ({self.label})" if self.label else self.family
