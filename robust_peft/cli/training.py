"""``robust-peft train``, and what each recipe's script calls."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from robust_peft.cli.flags import flag_value, guarded, is_main_process, parse
from robust_peft.cli.preset_flags import with_methods
from robust_peft.config import RunConfig
from robust_peft.presets import get_preset


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a run, evaluate it on the test images, and write its folder."""

    output: str
    """Run folder; made if it does not exist."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """The run."""
    preset: str | None = None
    """Published settings as the other flags' defaults: roli (cub_swin, dogs_*), paper, official-code (cifar_resnet)."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    time_limit: float | None = None
    """Seconds after which training stops cleanly, to be resumed."""


def train(
    preset: str, arguments: Sequence[str] | None = None, *, output: str | None = None, prog: str | None = None
) -> int:
    """Train a preset with flags from the command line: what each recipe's script calls. Returns the exit status."""
    return guarded(lambda: _train_preset(preset, sys.argv[1:] if arguments is None else arguments, output, prog))


def run_train(arguments: list[str]) -> None:
    preset = "quickstart"
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    _train_preset(preset, arguments, None, f"robust-peft train {preset}")


def _train_preset(preset: str, arguments: Sequence[str], output: str | None, prog: str | None) -> None:
    variant = flag_value(arguments, "--preset")
    chosen = with_methods(get_preset(preset, variant), arguments)
    default: Any = Train(output=output or f"runs/{preset}", config=chosen, preset=variant)
    parsed = parse(Train, arguments, default=default, prog=prog)

    from robust_peft.data.decoding import BrokenPicture
    from robust_peft.runs import run

    try:
        result = run(
            parsed.config,
            parsed.output,
            resume=parsed.resume,
            overwrite=parsed.overwrite,
            time_limit=parsed.time_limit,
        )
    except BrokenPicture as error:
        raise ValueError(f"{error} --data.skip-broken leaves such pictures out.") from error
    if not is_main_process():
        return
    if not result.finished:
        print(f"Stopped at step {result.fit.steps} by the time limit; go on with the same command and --resume.")
        return
    if result.report is not None:
        print(result.report)
    print(f"Run folder: {parsed.output}")
