"""From flags to a config, and from a user's mistake to one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro


def guarded(action: Callable[[], Any]) -> int:
    """Run an action; a user's mistake becomes one line on standard error and exit status 2.

    Otherwise the status is what the action returns, or 0.
    """
    try:
        status = action()
        if "torch.distributed" in sys.modules:
            from robust_peft.processes import leave

            leave()
        sys.stdout.flush()  # while a reader's absence can still be told from a mistake
    except BrokenPipeError as error:
        return _without_reader() or report_mistake(error)
    except (ValueError, OSError, ImportError, FloatingPointError, KeyError) as error:
        return report_mistake(error)
    except KeyboardInterrupt:
        said = "Interrupted. A run goes on from its last saved state with --resume, a study with the same command."
        print(said, file=sys.stderr)
        return 130
    return status or 0


def _without_reader() -> int:
    """141, as the shell calls it, where whoever read the output has gone (`... | head`); else 0."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 141
    return 0


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


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """What a flag is given, before the flags are parsed; None where it is not there."""
    given = [value for key, value in itertools.pairwise(arguments) if key == flag]
    given += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{flag}=")]
    return given[-1] if given else None


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    from robust_peft.processes import process_state

    return process_state().is_main_process


def report_mistake(error: BaseException) -> int:
    """Say what was wrong in one line. Returns the exit status."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
    return 2
