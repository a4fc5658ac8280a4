"""The state of an unfinished run: saved whole, resumed exactly.

One file holds everything that the next step depends on. Random numbers are keyed by seed, step and sample (see
`robust_peft.keyed_random`), dropout by seed and step, and the order of the samples by seed and epoch, so there is no
random state to keep. The file is written by ``torch.save`` and read with ``weights_only=True``: nothing in it
is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from robust_peft.files import write_text, write_whole

STATE_FILE = "state/last.pt"
METRICS_FILE = "metrics.jsonl"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Put ``state`` (tensors, numbers, strings, dicts and lists of them) in the place of the last one."""
    write_whole(folder / STATE_FILE, lambda temporary: torch.save(state, temporary))


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
