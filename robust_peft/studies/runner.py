"""Runs what is missing of a study."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robust_peft.files import read_json, write_json
from robust_peft.studies.engines import Engine
from robust_peft.studies.local_engine import LocalEngine
from robust_peft.studies.study import Point, Study
from robust_peft.studies.survey import Finding, accuracies, survey
from robust_peft.studies.task import BUSY, DONE, FAILED, STOPPED, Task

POLL_SECONDS = 2.0  # between two looks at what other processes do


def run_study(
    study: Study,
    output: str | Path,
    *,
    engine: Engine | None = None,
    retry_failed: bool = False,
    time_limit: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Finding]:
    """Train and measure what is missing, confirm each panel's fronts once it is through, and say what was found.

    It may be killed at any moment; the same call goes on. Several at once on one folder share the points. One that
    fails is kept with its error and stops nothing else.

    Args:
        study: The study.
        output: Its folder; made if it does not exist.
        engine: What does the work; None: one process after another on this machine.
        retry_failed: Try points again that failed before.
        time_limit: Seconds after which to stop cleanly.
        say: Gets one line for each end.

    Returns:
        What is known of each point in the end.

    Raises:
        ValueError: If the folder is another study's, or an attack's name is none.
    """
    output = Path(output)
    _check_attacks(study)
    claim_folder(study, output)
    engine = LocalEngine() if engine is None else engine
    deadline = None if time_limit is None else time.monotonic() + time_limit
    try:
        if retry_failed:
            _forget_failures(survey(study, output))
        return _Runner(study, output, engine, deadline, say).run()
    finally:
        engine.close()


def run_point(study: Study, output: str | Path, key: str, *, time_limit: float | None = None) -> tuple[str, int]:
    """Train and measure one point in this process (or in the processes of a distributed run), also one that failed.

    Returns:
        What became of it, in words, and an exit status: 1 if it failed.

    Raises:
        ValueError: If the study has no such point, or the folder is another study's.
    """
    from robust_peft.processes import on_main_or_raise
    from robust_peft.studies.work import perform

    points = [point for point in study.points() if point.key == key]
    if not points:
        raise ValueError(f"{study.name} has no point {key}; robust-peft study commands lists them.")
    output = Path(output)
    on_main_or_raise(lambda: claim_folder(study, output))
    tasks = [Task(output, point, study.measure, time_limit=time_limit) for point in points]  # panels may share a run
    outcomes = [perform(task) for task in tasks]
    findings = [finding for finding in survey(study, output) if finding.point.key == key]
    said = [_described(*of_point) for of_point in zip(tasks, outcomes, findings, strict=True)]
    return "\n".join(said), int(FAILED in outcomes)


def _check_attacks(study: Study) -> None:
    """A misspelt attack is better found before the training than after it."""
    from robust_peft.studies.work import attacks_by_norm

    for measurement in filter(None, (study.measure, study.confirm)):
        for own in dict.fromkeys(point.config.threat.norm for point in study.points()):
            norms = [own, *(norm for norm, _ in measurement.budgets(own))]
            attacks_by_norm(measurement.attacks, list(dict.fromkeys(norms)))


def claim_folder(study: Study, output: Path) -> None:
    """Make the folder a study's, or refuse another's."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, and no folder for a study. Name another as --output.")
    path = output / "study.json"
    if path.is_file():
        found = read_json(path)["name"]
        if found != study.name:
            raise ValueError(f"{output} holds the study {found}, not {study.name}. Name another folder.")
    else:
        write_json(path, {"name": study.name})


def _forget_failures(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.error is not None:
            with finding.files.claimed() as held:
                if held:
                    finding.files.forget_failure()


class _Runner:
    def __init__(
        self, study: Study, output: Path, engine: Engine, deadline: float | None, say: Callable[[str], None]
    ) -> None:
        self.study, self.output, self.engine, self.deadline, self.say = study, output, engine, deadline, say
        self.in_flight: set[str] = set()

    def run(self) -> list[Finding]:
        findings = survey(self.study, self.output)
        while True:
            waiting = [f for f in findings if f.point.folder not in self.in_flight and (f.to_measure or f.to_confirm)]
            while waiting and self.engine.free and not self._late():
                self._submit(waiting.pop(0))
            if not self.in_flight and (self._late() or not any(finding.left for finding in findings)):
                return findings
            ended = self.engine.ended(POLL_SECONDS)
            for task, outcome in ended:
                self.in_flight.discard(task.point.folder)
                if outcome not in (DONE, FAILED, STOPPED, BUSY):
                    self._note_crash(task, outcome)
            if ended or not self.in_flight or self.engine.free:
                findings = survey(self.study, self.output)
            for task, outcome in ended:
                self._tell(task, outcome, findings)

    def _submit(self, finding: Finding) -> None:
        left = None if self.deadline is None else self.deadline - time.monotonic()
        confirm = self.study.confirm if finding.to_confirm else None
        self.engine.submit(Task(self.output, finding.point, self.study.measure, confirm, left))
        self.in_flight.add(finding.point.folder)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _note_crash(self, task: Task, said: str) -> None:
        """A process that ended without a word has failed its point, or the next start would run into the same."""
        time.sleep(0.5)  # whoever ends all processes of a session at once ends this one too
        with task.files.claimed() as held:
            if held:
                details = f"{said} What it printed is in {task.files.notes / 'output.txt'}.\n"
                task.files.write_failure(*task.stage, said, details)

    def _tell(self, task: Task, outcome: str, findings: list[Finding]) -> None:
        if outcome != BUSY:
            (finding,) = [f for f in findings if f.point.folder == task.point.folder]
            done = sum(f.status in ("done", "failed") for f in findings)
            self.say(f"[{done}/{len(findings)}] {_described(task, outcome, finding)}")


def _described(task: Task, outcome: str, finding: Finding) -> str:
    """One line about a task's end; what is known by now may be another process's doing."""
    name = finding.point.name
    if outcome == BUSY:
        return f"{name}: another process is at it."
    if outcome == STOPPED:
        return f"{name}: stopped by the time limit; the same command goes on."
    if outcome == FAILED:
        again = ", and is being tried again." if finding.error is None else f". {finding.error}"
        return f"{name}: FAILED{again}"
    if outcome != DONE:
        return f"{name}: FAILED. {outcome}"
    report = finding.measured if task.confirm is None else finding.confirmed
    if report is None:
        return f"{name}: done, and is being worked on again."
    return f"{name}: {'' if task.confirm is None else 'confirmed, '}{describe(finding.point, report)}"


def describe(point: Point, report: dict[str, Any]) -> str:
    """Both accuracies of a point's report in words."""
    standard, adversarial = accuracies(point, report)
    threat = report["results"][1]["threat"]
    return f"{100 * standard:.1f} % standard, {100 * adversarial:.1f} % adversarial ({threat})"
