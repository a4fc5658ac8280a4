"""What `robust_peft.run` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from robust_peft.evaluation import Report
from robust_peft.training import FitResult


@dataclass
class RunResult:
    """A run as `run` left it."""

    folder: Path
    finished: bool
    """False where the time limit came first; the same call with ``resume=True`` goes on."""
    model: nn.Module
    fit: FitResult
    report: Report | None
    """The evaluation on the test images; None without test images or attacks, or where the run is not finished."""
    trainable_parameters: int
    bytes_on_disk: int
    """Size of what was saved: adapter and head, or the whole model."""
