"""The state of an unfinished run: saved whole, resumed exactly.

One file holds everything that the next step depends on. Random numbers are keyed by seed, step and sample (see
`robust_peft.keyed_random`), dropout by seed and step, and the order of the samples by seed and epoch, so there is no
random state to keep. The file is written by ``torch.save`` and read with ``weights_only=True``: nothing in it
is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_peft.files import write_text, write_whole
from robust_peft.training.optim import MovingAverage

STATE_FILE = "state/last.pt"
METRICS_FILE = "metrics.jsonl"


@dataclass
class RunState:
    """Where a training stands. The fields named in `SAVED` go into the state file."""

    epoch: int = 0
    batch: int = 0
    """Micro-batches of the epoch that are done."""
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: dict[str, Any] | None = None
    best_tensors: dict[str, Tensor] | None = None
    records: int = 0
    """Records in the log when the state was saved."""
    change_norm: Tensor = field(default_factory=lambda: torch.tensor(float("nan")))
    """Norm of the last step's change of the parameters; logged with the next step, to spare a wait for the device."""
    vanilla_optimizer: dict[str, Any] | None = None
    """State of the second optimizer of ``match_change``; it goes along with the parameters."""
    log: MetricsLog = field(default_factory=lambda: MetricsLog(None))


SAVED = (
    "epoch",
    "batch",
    "step",
    "seconds",
    "skipped",
    "skipped_in_a_row",
    "best",
    "best_tensors",
    "records",
    "change_norm",
    "vanilla_optimizer",
)


@dataclass
class Checkpoint:
    """Saves and restores a training whole.

    Args:
        folder: The run folder; None saves nothing.
        settings: What a resumed run must agree with.
        tensors: Gives what training changes, by name.
        optimizer: And the other parts that have a state.
        average: The moving average of weights, or None.
    """

    folder: Path | None
    settings: dict[str, Any]
    tensors: Callable[[], dict[str, Tensor]]
    optimizer: Any
    schedule: Any
    scaler: Any
    average: MovingAverage | None

    def save(self, run: RunState) -> None:
        """Put the present state in the place of the last one."""
        if self.folder is None:
            return
        run.records = len(run.log.records)
        average = self.average
        state = {
            "settings": self.settings,
            "tensors": self.tensors(),
            "average": None if average is None else {"averages": average.averages, "step": average.step},
            "run": {name: getattr(run, name) for name in SAVED},
        }
        state |= {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "scaler")}
        write_whole(self.folder / STATE_FILE, lambda temporary: torch.save(state, temporary))

    def load(self, run: RunState) -> None:
        """Go back to the last complete state.

        Raises:
            FileNotFoundError: Where there is none.
            ValueError: If it is broken, or was saved under other settings, which are named.
        """
        if self.folder is None:
            raise ValueError("resume=True needs output: the run folder with the state.")
        state = load_state(self.folder)
        before = state["settings"]
        if before != self.settings:
            changed = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
            raise ValueError(f"The run in {self.folder} was started with other settings: {', '.join(changed)}.")
        restore(self.tensors(), state["tensors"])
        for name in ("optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.average is not None:
            for own, saved in zip(self.average.averages, state["average"]["averages"], strict=True):
                own.copy_(saved)
            self.average.step = state["average"]["step"]
        for name in SAVED:
            setattr(run, name, state["run"][name])


@torch.no_grad()
def restore(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved tensors over the model's own, name by name."""
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def load_state(folder: Path) -> dict[str, Any]:
    """The last complete state. FileNotFoundError where there is none, ValueError where the file is broken."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: this run saved no state to go on from.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, appended as the run goes on.

    Args:
        folder: The run folder; None to keep the records in memory alone.
        keep: When resuming, how many records the resumed state had written; later ones are cut off. None for a new
            file.
    """

    def __init__(self, folder: Path | None, keep: int | None = None) -> None:
        self.path = None if folder is None else folder / METRICS_FILE
        self.records: list[dict[str, Any]] = []
        if self.path is None:
            return
        if keep is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()[:keep]
            self.records = [json.loads(line) for line in lines]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; NaN and infinity become null, which JSON has instead."""
        record = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
