"""One point of a study: trained, measured, confirmed; each part goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import shutil
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from robust_peft.attacks.suite import check_attack_name, parse_attack_name
from robust_peft.data.decoding import BrokenPicture
from robust_peft.evaluation import Report, audit, evaluate
from robust_peft.evaluation.evaluator import VERSIONED
from robust_peft.evaluation.store import VerdictStore
from robust_peft.files import read_json, write_json
from robust_peft.processes import gather, process_state
from robust_peft.runs import load_run, make_threat, run, run_images
from robust_peft.runs.folder import PACKAGES
from robust_peft.studies.memory import PeakMemory
from robust_peft.studies.store import CONFIRMED, MEASURED
from robust_peft.studies.study import Measurement
from robust_peft.studies.task import BUSY, DONE, FAILED, STOPPED, Task
from robust_peft.threat import ThreatModel


def perform(task: Task) -> str:
    """Do a task, whatever of it is missing, while holding the point.

    What goes wrong is kept in the point's folder and stops nothing else. Every process of a distributed run calls this.

    Returns:
        "done", "failed", "stopped" (by the time limit) or "busy" (another process holds the point).
    """
    files, main = task.files, process_state().is_main_process
    with ExitStack() as stack:
        held = stack.enter_context(files.claimed()) if main else False
        if not gather([held])[0]:
            return BUSY
        if gather([main and files.mismatch() is not None])[0]:
            return FAILED  # as whoever looks at the folder is told, until the run is removed
        if main:
            files.forget_failure()  # an earlier try's
        work = _Work(task)
        try:
            finished = work.confirm() if task.confirm is not None else work.train_and_measure()
        except Exception as error:
            if main:
                files.write_failure(work.stage, work.measurement, _said(error), traceback.format_exc())
            return FAILED
        return DONE if finished else STOPPED


class _Work:
    """The stages of one task; ``stage`` and ``measurement`` say where it is."""

    def __init__(self, task: Task) -> None:
        self.task, self.files, self.config = task, task.files, task.point.config
        self.stage, self.measurement = task.stage
        self.main = process_state().is_main_process
        self.deadline = None if task.time_limit is None else time.monotonic() + task.time_limit

    def train_and_measure(self) -> bool:
        if not self.files.trained and not self._timed("train", None, self._train):
            return False
        if self.files.report(MEASURED, self.task.measure) is None:
            measure = self.task.measure
            if not self._timed(MEASURED, measure, lambda: self._evaluate(MEASURED, measure)):
                return False
        return True

    def confirm(self) -> bool:
        wanted = self.task.confirm
        assert wanted is not None
        if self.files.report(CONFIRMED, wanted) is None:
            if not self._timed(CONFIRMED, wanted, lambda: self._evaluate(CONFIRMED, wanted)):
                return False
        if wanted.audit and self.files.read_audit(wanted) is None:
            return self._timed(CONFIRMED, wanted, lambda: self._audit(wanted))
        return True

    def _timed(self, stage: str, measurement: Measurement | None, action: Any) -> bool:
        """Do a stage, with its start and end in the log; gives whether it was finished within the time limit."""
        self.stage, self.measurement = stage, measurement
        began = time.monotonic()
        if self.main:
            self.files.log(stage=stage, event="started")
        finished = action()
        process_state().wait_for_everyone()
        if self.main:
            seconds = round(time.monotonic() - began, 3)
            self.files.log(stage=stage, event="finished" if finished else "stopped", seconds=seconds)
        return finished

    def _train(self) -> bool:
        going_on = (self.files.run / "config.json").is_file()
        if not going_on and self.main:
            self.files.forget_results()
            _remove_unfinished(self.files.run)
        process_state().wait_for_everyone()
        with PeakMemory() as memory:
            try:
                result = run(self.config, self.files.run, resume=going_on, time_limit=self._time_left(), progress=False)
            except BrokenPicture as error:
                raise ValueError(f"{error} The setting data.skip_broken leaves such pictures out.") from error
        if memory.peak is not None and self.main:
            path = self.files.notes / "memory.json"
            before = read_json(path)["peak_memory_bytes"] if path.is_file() else 0
            write_json(path, {"peak_memory_bytes": max(before, memory.peak), "of": memory.of})
        return result.finished

    def _evaluate(self, stage: str, measurement: Measurement) -> bool:
        model, images = self._model(), self._images(measurement)
        kept = self.files.verdicts(stage)
        if self.main:
            _remove_outdated(kept, images.name)
        process_state().wait_for_everyone()
        own = make_threat(self.config)
        threats = list(dict.fromkeys([own, *(ThreatModel(*budget) for budget in measurement.budgets(own.norm))]))
        reports: list[Report] = []
        for norm, attacks in attacks_by_norm(measurement.attacks, [threat.norm for threat in threats]).items():
            found = evaluate(
                model,
                images,
                [threat for threat in threats if threat.norm == norm],
                attacks,
                batch_size=self.config.evaluation.batch_size,
                limit=measurement.limit,
                seed=self.config.seed,
                each=measurement.each,
                precision=self.config.evaluation.precision,
                output=kept,
                time_limit=self._time_left(),
            )
            if not found.finished:
                return False
            reports.append(found)
        content = _content_of(kept, len(reports[0].results[0].verdicts))
        report = reports[0]
        report.results += [row for other in reports[1:] for row in other.results if row.threat is not None]
        if self.main:
            values = report.to_dict()
            for row, result in zip(values["results"], report.results, strict=True):
                row["threat"] = "" if result.threat is None else str(result.threat)
            values |= {"images_sha256": content, "versions": _versions((*PACKAGES, *VERSIONED))}
            self.files.write_report(stage, measurement, values)
        return True

    def _audit(self, measurement: Measurement) -> bool:
        images, found = self._images(measurement), self.files.report(CONFIRMED, measurement)
        assert found is not None
        total = len(found["results"][0]["verdicts"])
        result = audit(
            self._model(),
            images,
            make_threat(self.config),
            attack=measurement.attacks[-1],
            limit=min(AUDITED_IMAGES, total),
            batch_size=self.config.evaluation.batch_size,
            seed=self.config.seed,
            train_data=run_images(self.files.run).train,
            report=Report.from_dict(found),
            output=self.files.audit,
        )
        if self.main:
            self.files.write_audit(measurement, result.to_dict())
        return True

    def _model(self) -> Any:
        return load_run(self.files.run).to(process_state().device)

    def _images(self, measurement: Measurement) -> Any:
        images = getattr(run_images(self.files.run), measurement.split)
        if images is None:
            more = " Let data.validation_share hold some out." if measurement.split == "validation" else ""
            raise ValueError(f"{self.config.data.name} brings no {measurement.split} images to measure on.{more}")
        return images

    def _time_left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()


def attacks_by_norm(attacks: Sequence[str], norms: Sequence[str]) -> dict[str, list[str]]:
    """Norm -> which of the attacks exist for it, in their order.

    Args:
        attacks: Attacks by name, "clean" among them.
        norms: The norms of a measurement.

    Raises:
        ValueError: For an attack that exists for none of the norms, or a norm that has none of the attacks.
    """
    found: dict[str, list[str]] = {norm: [] for norm in norms}
    for name in attacks:
        having = [norm for norm in found if norm in parse_attack_name(name).entry.norms]
        if not having:
            check_attack_name(name, norms[0])  # says for which norms it exists
        for norm in having:
            found[norm].append(name)
    for norm, names in found.items():
        if all(check_attack_name(name) == "clean" for name in names):
            raise ValueError(f"attacks should have one that exists for {norm}. Found {', '.join(attacks)}.")
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


AUDITED_IMAGES = 200  # as `robust_peft.audit` takes by itself


def _remove_unfinished(folder: Path) -> None:
    """A process that was killed before it wrote a run's first file leaves a part of that file."""
    if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
        shutil.rmtree(folder)


def _remove_outdated(folder: Path, title: str) -> None:
    """Verdicts that cannot be gone on with: of the other split, or of another version of a package."""
    path = folder / "settings.json"
    if not path.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return
    begun = read_json(path)
    if begun["data"] != title or begun["versions"] != _versions(begun["versions"]):
        shutil.rmtree(folder)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed, with their versions."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _content_of(verdicts: Path, total: int) -> str:
    """SHA-256 over the first samples' content, images and labels in their order, as an evaluation's folder has it."""
    store = VerdictStore(verdicts, read_json(verdicts / "settings.json"))
    store.close()
    return hashlib.sha256("\n".join(store.hashes[index] for index in range(total)).encode()).hexdigest()
