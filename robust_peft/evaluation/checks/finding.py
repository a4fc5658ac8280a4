"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PASSED, WARNING, FAILED, NOT_RUN = "passed", "warning", "failed", "not run"
STATUSES = (FAILED, WARNING, PASSED, NOT_RUN)
"""From the gravest on."""


@dataclass(frozen=True)
class Finding:
    """What one check found on one model."""

    status: str
    """One of `STATUSES`."""
    evidence: str
    """One or two sentences with the numbers."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The same for programs: plain JSON values."""


@dataclass(frozen=True)
class Check:
    """A finding, with the question that it answers and the rule that it was judged by."""

    name: str
    question: str
    """What is asked; the answer "no" is a failed check."""
    status: str
    evidence: str
    threshold: str
    """The rule, with its numbers."""
    source: str
    """Where the check comes from."""
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status should be one of {', '.join(STATUSES)}. Found status = {self.status!r}.")


def gravest(*statuses: str) -> str:
    """The status that a reader has to be told of first."""
    return min(statuses, key=STATUSES.index)


def said(error: Exception) -> str:
    """An exception as a sentence: its kind and its first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."
