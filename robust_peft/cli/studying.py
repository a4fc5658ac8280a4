"""``robust-peft study run | status | commands | point | report``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from robust_peft.cli.flags import is_main_process, parse

USAGE = """usage: robust-peft study COMMAND FILE [--flags]

  run FILE       train, measure and confirm what is missing; the same command goes on after an interruption
  status FILE    what is done, running, waiting or failed, and the time left
  commands FILE  one command for each missing point, for a cluster's scheduler
  point FILE     one point alone: what those commands call
  report FILE    tables and figures of what there is

FILE is a Python file with study = Study(...) or a function study(scale), or a study that comes with the package:

{built_in}

robust-peft study COMMAND --help tells more.
"""


@dataclass(frozen=True, kw_only=True)
class Studied:
    """A study and its folder."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file with study = Study(...) or def study(scale), or the name of one that comes with the package."""
    output: str | None = None
    """The study's folder; None: runs/studies/NAME."""
    scale: str | None = None
    """What study(scale) is called with, e.g. tiny or paper; None: its default."""


@dataclass(frozen=True, kw_only=True)
class Run(Studied):
    """Run what is missing of a study. Exit status 1 if any point failed."""

    jobs: int | None = None
    """Points done side by side, each with its share of the cores, and a GPU of its own where there are several;
    None: one (ray: one for each GPU of the cluster, without GPUs for each core)."""
    engine: Literal["local", "ray"] = "local"
    """Processes on this machine, or Ray's, whose cluster has to see the same folders."""
    retry_failed: bool = False
    """Try points again that failed before."""
    time_limit: float | None = None
    """Seconds after which to stop cleanly; the same command goes on."""


@dataclass(frozen=True, kw_only=True)
class Status(Studied):
    """Say what is done, running, waiting or failed, and the time left."""

    jobs: int | None = None
    """For the time left: points done side by side; None: as many as are running, at least one."""


@dataclass(frozen=True, kw_only=True)
class Commands(Studied):
    """Print one command for each missing point, and a last one for what is left then."""

    retry_failed: bool = False
    """Points that failed before, too."""


@dataclass(frozen=True, kw_only=True)
class OnePoint(Studied):
    """Train and measure one point, unless another process is at it. Exit status 1 if it failed."""

    key: str
    """The point, as `robust-peft study commands` names it."""
    time_limit: float | None = None
    """Seconds after which to stop cleanly; the same command goes on."""


@dataclass(frozen=True, kw_only=True)
class Reported(Studied):
    """Write the report: tables and figures of what is measured so far."""


def run_study_command(arguments: list[str]) -> int | None:
    """``robust-peft study ...``. Returns the exit status."""
    from robust_peft.studies import built_in_studies

    if not arguments or arguments[0] in ("-h", "--help"):
        names = textwrap.fill(", ".join(built_in_studies()), 78, initial_indent="  ", subsequent_indent="  ")
        print(USAGE.format(built_in=names))
        return 0 if arguments else 2
    commands: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "run": (Run, _run),
        "status": (Status, _status),
        "commands": (Commands, _commands),
        "point": (OnePoint, _point),
        "report": (Reported, _report),
    }
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise ValueError(f"The command of study should be one of {', '.join(commands)}. Found {name!r}.")
    kind, action = commands[name]
    return action(parse(kind, rest, prog=f"robust-peft study {name}"))


def _load(parsed: Studied) -> tuple[Any, Path]:
    from robust_peft.studies import load_study

    study = load_study(parsed.source, parsed.scale)
    return study, Path(parsed.output or f"runs/studies/{study.name}")


def _run(parsed: Run) -> int:
    from robust_peft.studies import make_engine, run_study
    from robust_peft.studies.status import describe_end

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("study run starts its own processes; call it without accelerate launch or torchrun.")
    study, output = _load(parsed)
    engine = make_engine(parsed.engine, parsed.jobs)
    print(f"{study.name}: {len(study.points())} points, in {output}", flush=True)
    with _ended_in_order():
        findings = run_study(
            study,
            output,
            engine=engine,
            retry_failed=parsed.retry_failed,
            time_limit=parsed.time_limit,
            say=lambda line: print(line, flush=True),
        )
    print(describe_end(findings))
    return 1 if any(finding.error is not None for finding in findings) else 0


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A scheduler's SIGTERM ends this process as Ctrl-C does: with those that it started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(parsed: Status) -> None:
    from robust_peft.studies.status import describe_status

    study, output = _load(parsed)
    print(describe_status(study, output, jobs=parsed.jobs))


def _commands(parsed: Commands) -> None:
    from robust_peft.studies.survey import survey

    study, output = _load(parsed)
    flags = [parsed.source]
    flags += [] if parsed.output is None else ["--output", parsed.output]
    flags += [] if parsed.scale is None else ["--scale", parsed.scale]
    for finding in survey(study, output):
        if finding.to_measure or (parsed.retry_failed and finding.status == "failed"):
            point = ["study", "point", *flags, "--key", finding.point.key]
            print(shlex.join(["accelerate", "launch", "-m", "robust_peft.cli", *point]))
    rest = (["robust-peft", "study", command, *flags] for command in ("run", "report"))
    print(" && ".join(shlex.join(words) for words in rest))


def _point(parsed: OnePoint) -> int:
    from robust_peft.studies.runner import run_point

    study, output = _load(parsed)
    said, status = run_point(study, output, parsed.key, time_limit=parsed.time_limit)
    if is_main_process():
        print(said)
    return status


def _report(parsed: Reported) -> None:
    from robust_peft.studies import collect
    from robust_peft.studies.report import write_report

    study, output = _load(parsed)
    if not output.is_dir():
        raise FileNotFoundError(f"{output} does not exist: nothing of {study.name} has been run there.")
    print(f"Report: {write_report(study, collect(study, output), output)}")
