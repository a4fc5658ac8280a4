"""The command line: ``robust-peft train | evaluate | audit | study | plot | zoo``.

A user's mistake is one line and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from robust_peft.cli.flags import flag_value, guarded, is_main_process, parse, report_mistake
from robust_peft.cli.measuring import Audited, Evaluate, run_audit, run_evaluate
from robust_peft.cli.preset_flags import with_methods
from robust_peft.cli.showing import run_plot, run_zoo
from robust_peft.cli.studying import run_study_command
from robust_peft.cli.training import Train, run_train, train
from robust_peft.presets import PRESETS

__all__ = [
    "Audited",
    "Evaluate",
    "Train",
    "flag_value",
    "guarded",
    "is_main_process",
    "main",
    "parse",
    "train",
    "with_methods",
]

USAGE = """usage: robust-peft COMMAND ...

  train [PRESET] [--flags]   train a run and evaluate it; --help shows every flag of the preset
                             presets: {presets}
  evaluate MODEL [--flags]   accuracy of a run or any model, without and under attacks and budgets of your choice
  audit MODEL [--flags]      can its figure be believed? named checks, each with evidence
  study COMMAND FILE [...]   many runs that answer one question; COMMAND: run, status, commands, point, report
  plot RUN RUN ... [--flags] standard and adversarial accuracy of runs beside each other, as bars
  zoo [attacks]              list the backbones, or the attacks

robust-peft COMMAND --help tells more.
"""


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
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": run_train,
        "evaluate": run_evaluate,
        "audit": run_audit,
        "study": run_study_command,
        "plot": run_plot,
        "zoo": run_zoo,
    }
    command, rest = arguments[0], arguments[1:]
    if command not in commands:
        return report_mistake(ValueError(f"command should be one of {', '.join(commands)}. Found {command!r}."))
    return guarded(lambda: commands[command](rest))
