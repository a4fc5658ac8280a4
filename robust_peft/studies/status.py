"""Where a study stands, in words; without torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import fmean

from robust_peft.studies.store import CONFIRMED, MEASURED, other_runs, others_said
from robust_peft.studies.study import Study
from robust_peft.studies.survey import Finding, survey

STATUSES = ("done", "running", "trained", "waiting", "failed")


def describe_status(study: Study, output: str | Path, *, jobs: int | None = None) -> str:
    """What is done, running, waiting or failed, panel by panel and method by method, and the time left.

    Args:
        study: The study.
        output: Its folder; need not exist yet.
        jobs: How many points are done side by side; None: as many as are running now, at least one.
    """
    findings = survey(study, output)
    lines = [f"{study.name} in {output}: {_counted(findings)}"]
    for panel in dict.fromkeys(finding.point.panel_name for finding in findings):
        members = [finding for finding in findings if finding.point.panel_name == panel]
        lines += ["", f"{panel}: {_counted(members)}{_confirmation(study, members)}"]
        names = list(dict.fromkeys(finding.point.method.name for finding in members))
        width = max(map(len, names))
        for name in names:
            lines.append(f"  {name:<{width}}  {_counted([f for f in members if f.point.method.name == name])}")
    return "\n".join([*lines, "", *_others(study, output), *_failures(findings), time_left(study, findings, jobs)])


def describe_end(findings: list[Finding]) -> str:
    """What `robust_peft.studies.run_study` leaves, with every failure."""
    final = sum(finding.status == "done" and finding.error is not None for finding in findings)
    more = f"; {final} final measurement{'s' if final != 1 else ''} failed" if final else ""
    return "\n".join([*_failures(findings), _counted(findings) + more])


def time_left(study: Study, findings: list[Finding], jobs: int | None = None) -> str:
    """One sentence about the time left, from what finished points took.

    A point is taken to need what the others of its panel needed on average, before there is one what all did.
    """
    left = [finding for finding in findings if finding.left]
    if not left:
        return "Nothing is left to do."
    jobs = jobs or max(1, sum(finding.status == "running" or finding.confirming for finding in findings))
    stages = [("train", MEASURED), (CONFIRMED,)]
    total, known, unknown = 0.0, 0, False
    for confirming, wanted in enumerate(stages):
        took: dict[str, list[float]] = {}
        for finding in findings:
            done = finding.confirmed if confirming else finding.measured
            seconds = None if done is None else _seconds(finding, wanted)
            if seconds is not None:
                took.setdefault(finding.point.panel_name, []).append(seconds)
        every = [seconds for of_panel in took.values() for seconds in of_panel]
        known += 0 if confirming else len(every)
        for finding in left:
            if bool(confirming) == (finding.to_confirm or finding.confirming):
                total += fmean(took.get(finding.point.panel_name) or every or [0.0])
                unknown = unknown or not every
    if unknown and total == 0:
        return "The time left is not known before a first one is finished."
    side = f"{jobs} side by side" if jobs > 1 else "one after another"
    more = "" if not unknown else "; what is being confirmed is not in it, before a first one is"
    pending = study.confirm is not None and any(finding.chosen is None for finding in findings)
    more += "; the confirmation of the fronts comes on top" if pending else ""
    points = f"{known} finished point{'s' if known != 1 else ''}"
    return f"Time left: about {duration(total / jobs)}, {side}, by what {points} took{more}."


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _seconds(finding: Finding, stages: tuple[str, ...]) -> float | None:
    """What a point's stages took together; None where a kill left a piece without an end."""
    events = [event for event in finding.files.events() if event["stage"] in stages]
    ends = [event["seconds"] for event in events if "seconds" in event]
    starts = sum(event["event"] == "started" for event in events)
    return sum(ends) if ends and starts == len(ends) else None


def _counted(findings: list[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    shown = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{', '.join(shown)} of {len(findings)}" if len(shown) > 1 else shown[0]


def _confirmation(study: Study, members: list[Finding]) -> str:
    if study.confirm is None or members[0].chosen is None:
        return ""
    chosen = [finding for finding in members if finding.chosen]
    done = sum(not finding.to_confirm and not finding.confirming and not finding.error for finding in chosen)
    return f"; {done} of {len(chosen)} on the fronts confirmed"


def _failures(findings: list[Finding]) -> list[str]:
    """Each error once, with the points that it stopped."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.error is not None:
            found.setdefault(finding.error, []).append(finding)
    lines = []
    for error, members in found.items():
        first = members[0]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        lines.append(f"FAILED: {first.point.name}{more}: {error} ({first.files.notes / 'error.txt'})")
    return [*lines, "study run --retry-failed tries again what failed."] if lines else []


def _others(study: Study, output: str | Path) -> list[str]:
    count = len(other_runs(study, output))
    return [others_said(count)] if count else []
