"""Verdicts on disk, so that an evaluation that was interrupted anywhere goes on where it was.

A folder holds ``settings.json`` (what must not change between calls) and for each process a file of lines, one for each
batch and attack, appended and flushed before the next batch starts. A line that a kill cut short is dropped, and its
batch measured again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_peft.files import read_json, write_json
from robust_peft.processes import gather, on_main_or_raise, process_state

SETTINGS, PROBE = "settings.json", "probe.json"


@dataclass
class Measured:
    """What is known of one attack under one threat model."""

    correct: dict[int, bool] = field(default_factory=dict)
    """Sample index to whether the model was right throughout."""
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


class VerdictStore:
    """Verdicts of all processes by attack and sample, in memory and, with a folder, on disk.

    Args:
        folder: Where to keep them; None: nowhere.
        settings: What every call with this folder must agree on.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If the folder was begun with other settings; names those that differ.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.measured: dict[str, Measured] = {}
        self.hashes: dict[int, str] = {}
        self._unshared: list[dict[str, Any]] = []
        self._file = None
        if folder is None:
            return
        on_main_or_raise(lambda: _begin(folder, settings))
        for path in sorted(folder.glob("verdicts-*.jsonl")):
            for line in _whole_lines(path):
                self._take(line)
        process_state().wait_for_everyone()  # nobody appends before all have read
        self._file = (folder / f"verdicts-{process_state().process_index}.jsonl").open("ab")
        if self._file.tell() and not _ends_with_newline(self._file.name):
            self._file.write(b"\n")  # after a line that was cut short

    def __getitem__(self, job: str) -> Measured:
        return self.measured.setdefault(job, Measured())

    def add(self, job: str, indices: list[int], correct: list[bool], **costs: Any) -> None:
        """Keep the verdicts of a batch; known to the other processes after `share`."""
        line = {"job": job, "indices": indices, "correct": "".join("01"[c] for c in correct), **costs}
        self._take(line)
        self._unshared.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def check_probe(self, logits: list[float]) -> None:
        """Keep the first sample's logits, or refuse those of another model than the one that the verdicts are of.

        Raises:
            ValueError: If they differ by more than rounding from those of the call that began the folder.
        """
        if self.folder is None:
            return
        path = self.folder / PROBE

        def compare() -> None:
            if not path.is_file():
                write_json(path, {"logits of sample 0": logits})
                return
            known = read_json(path)["logits of sample 0"]
            slack = 1e-3 * max(1e-6, *(abs(value) for value in known))
            if len(known) != len(logits) or any(abs(a - b) > slack for a, b in zip(known, logits, strict=True)):
                raise ValueError(
                    f"The evaluation in {self.folder} was begun with a model that answers otherwise. Name another "
                    "folder, or remove this one."
                )

        on_main_or_raise(compare)

    def share(self) -> None:
        """Tell the other processes what was added since the last time; every process has to call it."""
        own, self._unshared = self._unshared, []
        if process_state().num_processes == 1:
            return
        rank = process_state().process_index
        for origin, line in gather([(rank, line) for line in own]):
            if origin != rank:
                self._take(line)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _take(self, line: dict[str, Any]) -> None:
        found = self[line["job"]]
        for index, verdict in zip(line["indices"], line["correct"], strict=True):
            found.correct[index] = verdict == "1"
        for index, content in zip(line["indices"], line.get("hashes", ()), strict=False):
            self.hashes[index] = content
        found.forwards += line.get("forwards", 0)
        found.backwards += line.get("backwards", 0)
        found.seconds += line.get("seconds", 0.0)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    if folder.is_file():
        raise FileExistsError(f"The evaluation folder {folder} is a file.")
    if not (folder / SETTINGS).is_file():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no evaluation. Name another folder.")
        write_json(folder / SETTINGS, settings)
        return
    begun = read_json(folder / SETTINGS)
    changed = [
        f"{key} was {begun.get(key)!r}, is {settings.get(key)!r}"
        for key in {**begun, **settings}
        if begun.get(key) != settings.get(key)
    ]
    if changed:
        raise ValueError(
            f"The evaluation in {folder} was begun with something else: {'; '.join(changed)}. Name another folder, or "
            "remove this one."
        )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill (also in the middle of a character), or the empty end
            continue
        if isinstance(line, dict) and {"job", "indices", "correct"} <= line.keys():
            lines.append(line)
    return lines


def _ends_with_newline(name: str) -> bool:
    with open(name, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
