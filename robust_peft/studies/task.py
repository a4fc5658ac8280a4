"""What one process of a study is asked to do, and how it may end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust_peft.studies.store import CONFIRMED, MEASURED, PointFolder
from robust_peft.studies.study import Measurement, Point

DONE, FAILED, STOPPED, BUSY = "done", "failed", "stopped", "busy"


@dataclass(frozen=True)
class Task:
    """What one process does: a point's training and measurement, or its final measurement.

    Attributes:
        output: The study's folder.
        point: The point.
        measure: How it is measured.
        confirm: With this the final measurement is made instead.
        time_limit: Seconds after which to stop cleanly.
    """

    output: Path
    point: Point
    measure: Measurement
    confirm: Measurement | None = None
    time_limit: float | None = None

    @property
    def files(self) -> PointFolder:
        return PointFolder(self.output, self.point)

    @property
    def stage(self) -> tuple[str, Measurement | None]:
        """What is under way or comes next, "train", `MEASURED` or `CONFIRMED`, with how it is measured."""
        if self.confirm is not None:
            return CONFIRMED, self.confirm
        return (MEASURED, self.measure) if self.files.trained else ("train", None)
