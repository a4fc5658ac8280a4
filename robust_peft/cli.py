"""The command line: ``robust-peft train | evaluate | zoo``. Errors of the user are one line and exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from robust_peft.config import METHOD_PARAMETERS, RunConfig
from robust_peft.presets import PRESETS, get_preset

USAGE = """usage: robust-peft COMMAND ...

  train [PRESET] [--flags]   train a run and evaluate it; --help shows every flag of the preset
                             presets: {presets}
  evaluate FOLDER [--flags]  measure a finished run again, with attacks and budgets of your choice
  zoo                        list the backbones

robust-peft COMMAND --help tells more.
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a run, evaluate it on the test images, and write its folder."""

    output: str
    """Run folder; made if it does not exist."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """The run."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    time_limit: float | None = None
    """Seconds after which training stops cleanly, to be resumed."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a finished run on its test images."""

    folder: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    attacks: tuple[str, ...] = ("clean", "pgd-20")
    """Attacks by name: clean, fgsm, pgd-K."""
    norm: str | None = None
    """linf or l2; with eps, a threat model other than the run's own."""
    eps: str | None = None
    """Budget in pixel units, e.g. 8/255."""
    limit: int | None = None
    """Only the first so many test images."""
    batch_size: int = 128
    """Images in a batch."""
    seed: int = 0
    """Seed of the attacks' random starts."""
    json: str | None = None
    """Also write the verdicts to this file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(PRESETS)))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from robust_peft import __version__

        print(__version__)
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {"train": _train, "evaluate": _evaluate, "zoo": _zoo}
    command, rest = arguments[0], arguments[1:]
    if command not in commands:
        return _report(ValueError(f"command should be one of {', '.join(commands)}. Found {command!r}."))
    return guarded(lambda: commands[command](rest))


def guarded(action: Callable[[], Any]) -> int:
    """Run an action; a user's mistake becomes one line on standard error and exit status 2."""
    try:
        action()
        if "torch.distributed" in sys.modules:
            from robust_peft.processes import leave

            leave()
    except (ValueError, OSError, ImportError, FloatingPointError, KeyError) as error:
        return _report(error)
    except KeyboardInterrupt:
        print("Interrupted. A run goes on from its last saved state with --resume.", file=sys.stderr)
        return 130
    return 0


def train(
    preset: str, arguments: Sequence[str] | None = None, *, output: str | None = None, prog: str | None = None
) -> int:
    """Train a preset with flags from the command line: what each recipe's script calls. Returns the exit status."""
    return guarded(lambda: _train_preset(preset, sys.argv[1:] if arguments is None else arguments, output, prog))


def _train(arguments: list[str]) -> None:
    preset = "quickstart"
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    _train_preset(preset, arguments, None, f"robust-peft train {preset}")


def _train_preset(preset: str, arguments: Sequence[str], output: str | None, prog: str | None) -> None:
    chosen = with_methods(get_preset(preset), arguments)
    default: Any = Train(output=output or f"runs/{preset}", config=chosen)
    parsed = parse(Train, arguments, default=default, prog=prog)

    from robust_peft.runs import run

    result = run(
        parsed.config,
        parsed.output,
        resume=parsed.resume,
        overwrite=parsed.overwrite,
        time_limit=parsed.time_limit,
    )
    if not is_main_process():
        return
    if not result.finished:
        print(f"Stopped at step {result.fit.steps} by the time limit; go on with the same command and --resume.")
        return
    if result.report is not None:
        print(result.report)
    print(f"Run folder: {parsed.output}")


def _evaluate(arguments: list[str]) -> None:
    parsed = parse(Evaluate, arguments, prog="robust-peft evaluate")

    from robust_peft.evaluation import evaluate
    from robust_peft.processes import process_state
    from robust_peft.runs import load_data, load_run, load_run_config, make_threat
    from robust_peft.threat import ThreatModel

    config = load_run_config(parsed.folder)
    threat = make_threat(config)
    if parsed.norm not in (None, threat.norm) and parsed.eps is None:
        raise ValueError(f"--norm {parsed.norm} needs --eps: the run's own budget, {threat}, is one of another norm.")
    if parsed.norm is not None or parsed.eps is not None:
        threat = ThreatModel(parsed.norm or threat.norm, parsed.eps if parsed.eps is not None else threat.eps)
    test = load_data(config.data).test
    if test is None:
        raise ValueError(f"The run in {parsed.folder} has no test images.")
    report = evaluate(
        load_run(parsed.folder).to(process_state().device),
        test,
        [threat],
        parsed.attacks,
        batch_size=parsed.batch_size,
        limit=parsed.limit,
        seed=parsed.seed,
        progress=True,
    )
    if not is_main_process():
        return
    print(report)
    if parsed.json is None:
        print("Not saved; --json FILE keeps it.")
    else:
        report.save(parsed.json)


def _zoo(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: robust-peft zoo\n\nLists the backbones that --backbone.name takes.")
        return
    from robust_peft.models import ENTRIES

    for entry in ENTRIES:
        print(
            f"{entry.name}\n  {entry.architecture}\n  weights: {entry.weights}\n  preprocessing: {entry.preprocessing}"
        )


def parse(kind: type, arguments: Sequence[str], **options: Any) -> Any:
    """Flags to a config. A wrong or unknown flag is a ValueError of one line; --help prints and ends the program."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro frames its complaint; what is inside, without title and help texts, is the error."""
    inside = [line.strip(" │╭╮╰╯─-") for line in box.splitlines()]
    inside = [line for line in inside if line]
    for place, line in enumerate(inside):
        if line.startswith(("Argument helptext", "For full helptext", "Perhaps you meant", "Similar")):
            inside = inside[:place]
            break
    return " ".join(inside[1:] or inside).rstrip(".") + ". See --help."


def with_methods(preset: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """The preset as the flags' defaults: where a flag names another method, the preset's parameters of its own go.

    Otherwise ``--surgery.name vanilla`` would be refused because of a gamma that the user never set.
    """
    for part, name, table in METHOD_PARAMETERS:
        flag = f"--{part}.{name}"
        given = [value for key, value in itertools.pairwise(arguments) if key == flag]
        given += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{flag}=")]
        config = getattr(preset, part)
        if given and given[-1] in table and given[-1] != getattr(config, name):
            own = {parameter: None for parameter in table[getattr(config, name)]}
            changed = dataclasses.replace(config, **{name: given[-1]}, **own)
            preset = dataclasses.replace(preset, **{part: changed})
    return preset


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    from robust_peft.processes import process_state

    return process_state().is_main_process


def _report(error: BaseException) -> int:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
