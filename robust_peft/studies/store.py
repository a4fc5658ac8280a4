"""A study's folder: where what lies, who works on a point, and what is known of it.

``OUTPUT/runs/POINT`` is a run folder as `robust_peft.runs.run` writes it. ``OUTPUT/points/POINT`` is the study's: the
measurement's verdicts by batch (``measured/``) and its report (``measured.json``), the same of the final measurement
(``confirmed/``, ``confirmed.json``), ``audit/``, ``memory.json``, ``error.json`` with ``error.txt`` (the traceback),
``log.jsonl`` (every start and end) and ``output.txt`` (what the process printed). Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from robust_peft.config import to_dict
from robust_peft.files import read_json, write_json, write_text
from robust_peft.studies.study import Measurement, Point, Study

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MEASURED, CONFIRMED = "measured", "confirmed"


class PointFolder:
    """The files of one point.

    Args:
        output: The study's folder.
        point: The point.
    """

    def __init__(self, output: str | Path, point: Point) -> None:
        self._config = point.config
        self.run = Path(output) / "runs" / point.folder
        self.notes = Path(output) / "points" / point.folder
        self.audit = self.notes / "audit"

    @property
    def trained(self) -> bool:
        """Whether training is finished and saved: the model card is the last file that a run writes."""
        return (self.run / "evaluation.json").is_file() and (self.run / "README.md").is_file()

    def mismatch(self) -> str | None:
        """What is wrong with a run that was trained with other settings than the point's, in words; else None.

        The folder's name stands for what the study changes; a default may be another one in another version of this
        package. Settings that only one of the two versions knows are left out.
        """
        path = self.run / "config.json"
        if not path.is_file():
            return None
        was, now = _flat(read_json(path).get("config", {})), _flat(to_dict(self._config))
        changed = [
            f"{name} was {was[name]!r}, is {now[name]!r}" for name in now if was.get(name, now[name]) != now[name]
        ]
        if not changed:
            return None
        return (
            f"The run in {self.run} was trained with other settings: {'; '.join(changed)}. Remove that folder to train "
            "it anew, or give the study another name to keep it."
        )

    def verdicts(self, stage: str) -> Path:
        """Folder of the verdicts of a stage, `MEASURED` or `CONFIRMED`."""
        return self.notes / stage

    def report(self, stage: str, measurement: Measurement) -> dict[str, Any] | None:
        """The report of a stage; None where there is none, or one of another plan."""
        path = self.notes / f"{stage}.json"
        if not path.is_file() or not self.trained:
            return None
        found = read_json(path)
        return found if found.get("plan") == plan_of(measurement) else None

    def write_report(self, stage: str, measurement: Measurement, report: dict[str, Any]) -> None:
        """Keep the report of a stage with the plan that it answers."""
        write_json(self.notes / f"{stage}.json", {**report, "plan": plan_of(measurement)})

    def read_audit(self, measurement: Measurement) -> dict[str, Any] | None:
        """The audit that goes with a confirmation; None where there is none, or one of another plan."""
        path = self.notes / "audit.json"
        if not path.is_file() or not self.trained:
            return None
        found = read_json(path)
        return found if found.get("plan") == plan_of(measurement) else None

    def write_audit(self, measurement: Measurement, audit: dict[str, Any]) -> None:
        """Keep an audit with the plan that it belongs to."""
        write_json(self.notes / "audit.json", {**audit, "plan": plan_of(measurement)})

    def forget_results(self) -> None:
        """Remove what was measured on an earlier model."""
        for stage in (MEASURED, CONFIRMED):
            shutil.rmtree(self.verdicts(stage), ignore_errors=True)
            (self.notes / f"{stage}.json").unlink(missing_ok=True)
        shutil.rmtree(self.audit, ignore_errors=True)
        for name in ("audit.json", "memory.json"):
            (self.notes / name).unlink(missing_ok=True)

    def failure(self, stage: str, measurement: Measurement | None) -> str | None:
        """What went wrong in a stage, in one line; None where nothing did, or it was another plan that failed."""
        path = self.notes / "error.json"
        if not path.is_file():
            return None
        found = read_json(path)
        same = found["plan"] == (None if measurement is None else plan_of(measurement))
        return found["error"] if found["stage"] == stage and same else None

    def write_failure(self, stage: str, measurement: Measurement | None, error: str, details: str) -> None:
        """Keep an error: one line, and the whole of it in a file of its own. The caller holds the point."""
        write_text(self.notes / "error.txt", details)
        plan = None if measurement is None else plan_of(measurement)
        write_json(self.notes / "error.json", {"stage": stage, "error": " ".join(error.split()), "plan": plan})
        self.log(stage=stage, event="failed")

    def forget_failure(self) -> None:
        for name in ("error.json", "error.txt"):
            (self.notes / name).unlink(missing_ok=True)

    @contextmanager
    def claimed(self, patience: float = 0.5) -> Iterator[bool]:
        """Hold the point for this process; gives False where another one does, after so many seconds.

        The system lets go of it when the process ends, however it ends. Patience, because whoever looks (`busy`) keeps
        others from it for a moment.
        """
        self.notes.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @property
    def busy(self) -> bool:
        """Whether a living process holds the point. Any number may look at once."""
        if not self._lock.is_file():
            return False
        with self.looked_at() as free:
            return not free

    @contextmanager
    def looked_at(self) -> Iterator[bool]:
        """Share the point with all who only look; gives False where a process holds it for itself."""
        if fcntl is None:  # where locks cannot be shared, looking is holding
            with self.claimed() as free:
                yield free
            return
        with self._lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                yield False
                return
            yield True

    @property
    def _lock(self) -> Path:
        return self.notes / "claim.lock"

    def log(self, **event: Any) -> None:
        """Note a start or an end; only the process that holds the point calls this."""
        line = {"time": round(time.time(), 3), "host": platform.node(), "pid": os.getpid(), **event}
        with (self.notes / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """What `log` noted; a line that a kill cut short is left out."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.notes / "log.jsonl").read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found


def other_runs(study: Study, output: str | Path) -> list[str]:
    """Names of the run folders in a study's folder that none of its points has: an earlier form of the study made them.

    Args:
        study: The study.
        output: Its folder; need not exist yet.
    """
    folder = Path(output) / "runs"
    known = {point.folder for point in study.points()}
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and path.name not in known)


def others_said(count: int) -> str:
    """What to say of `other_runs`."""
    runs = "1 more run lies" if count == 1 else f"{count} more runs lie"
    return f"{runs} in this folder, made with settings that the study does not have now: left alone and not counted."


def plan_of(measurement: Measurement) -> dict[str, Any]:
    """What a report answers, as plain JSON values; an audit is no part of it."""
    return json.loads(json.dumps({k: v for k, v in asdict(measurement).items() if k != "audit"}))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
