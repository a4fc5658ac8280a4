"""The command line: ``robust-peft train | evaluate | audit | plot | zoo``.

A user's mistake is one line and exit status 2.
"""

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

from robust_peft.config import (
    BACKBONE_PARAMETERS,
    METHOD_PARAMETERS,
    AttackConfig,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
)
from robust_peft.presets import PRESETS, get_preset

USAGE = """usage: robust-peft COMMAND ...

  train [PRESET] [--flags]   train a run and evaluate it; --help shows every flag of the preset
                             presets: {presets}
  evaluate MODEL [--flags]   accuracy of a run or any model, without and under attacks and budgets of your choice
  audit MODEL [--flags]      can its figure be believed? named checks, each with evidence
  plot RUN RUN ... [--flags] standard and adversarial accuracy of runs beside each other, as bars
  zoo [attacks]              list the backbones, or the attacks

robust-peft COMMAND --help tells more.
"""


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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the images that it is measured on."""

    source: Annotated[str, tyro.conf.Positional]
    """Run folder, a backbone that `robust-peft zoo` lists (ares/..., timm/NAME, hf/NAME), or module.py:factory."""
    checkpoint: str | None = None
    """Local file with weights for the named backbone (.safetensors, .pth)."""
    data: str | None = None
    """digits, a folder of class folders, a .parquet or .safetensors file; None: the run's own test images."""
    image_size: int | None = None
    """With --data: images are resized and cropped to so many pixels; None: as the run's were, else as they are."""
    norm: str | None = None
    """linf or l2; None: the run's own, else linf."""
    limit: int | None = None
    """Only the first so many images."""
    batch_size: int | None = None
    """Images in a batch; None: the run's own, else 128."""
    seed: int = 0
    """Seed of the attacks' random draws."""
    transfer_from: str | None = None
    """Second model, named as the first, for attacks that are carried over."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Subject):
    """Measure a model's accuracy without and under attacks."""

    attacks: tuple[str, ...] | None = None
    """Attacks by name; `robust-peft zoo attacks` lists them; none: clean and pgd-20."""
    suite: str | None = None
    """A list of attacks by name instead: paper, paper-official-code."""
    eps: tuple[str, ...] = ()
    """One or more budgets in pixel units, e.g. 4/255 8/255; none: the run's own (needed where MODEL is no run)."""
    each: bool = False
    """Try every attack on every sample, also those that another one has broken."""
    precision: str = "fp32"
    """fp32, or bf16 for the attacks' iterations; what counts is confirmed in float32."""
    output: str | None = None
    """Folder that keeps the verdicts of each batch; the same command goes on with it."""
    save_images: bool = False
    """Keep the adversarial images in that folder, and re-check them from the files."""
    time_limit: float | None = None
    """Seconds after which to stop cleanly; the same command with --output goes on."""
    json: str | None = None
    """Write the report to this file."""


@dataclass(frozen=True, kw_only=True)
class Audited(Subject):
    """Check whether a model's robust accuracy can be believed. Exit status 1 where a check failed."""

    limit: int | None = 200
    """Only the first so many images."""
    eps: str | None = None
    """Budget in pixel units, e.g. 8/255; none: the run's own (needed where MODEL is no run)."""
    attack: str = "pgd-20"
    """The attack that the figure was measured with."""
    report: str | None = None
    """Report of `robust-peft evaluate` whose figure is audited, instead of measuring it again."""
    train_data: str | None = None
    """Training images, named as --data, to look for the test images in; none: the run's own."""
    checks: tuple[str, ...] = ()
    """Only these checks; none: all."""
    output: str | None = None
    """Folder for audit.json, audit.md and the pictures."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw standard and adversarial accuracy of finished runs beside each other."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more run folders; the order is kept."""
    output: str = "bars.png"
    """The picture; its ending (png, svg, pdf) is the format."""
    attack: str | None = None
    """The attack, as the evaluation calls it; None: the last one that the runs were evaluated with."""
    title: str | None = None
    """Above the figure; None: the data's name."""


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
        "train": _train,
        "evaluate": _evaluate,
        "audit": _audit,
        "plot": _plot,
        "zoo": _zoo,
    }
    command, rest = arguments[0], arguments[1:]
    if command not in commands:
        return _report(ValueError(f"command should be one of {', '.join(commands)}. Found {command!r}."))
    return guarded(lambda: commands[command](rest))


def guarded(action: Callable[[], Any]) -> int:
    """Run an action; a user's mistake becomes one line on standard error and exit status 2.

    Otherwise the status is what the action returns, or 0.
    """
    try:
        status = action()
        if "torch.distributed" in sys.modules:
            from robust_peft.processes import leave

            leave()
    except (ValueError, OSError, ImportError, FloatingPointError, KeyError) as error:
        return _report(error)
    except KeyboardInterrupt:
        print("Interrupted. A run goes on from its last saved state with --resume.", file=sys.stderr)
        return 130
    return status or 0


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


def _evaluate(arguments: list[str]) -> None:
    parsed: Evaluate = parse(Evaluate, arguments, prog="robust-peft evaluate")

    from robust_peft.attacks import check_attack_name
    from robust_peft.evaluation import evaluate

    threats = _threats(parsed, parsed.eps)
    for name in parsed.attacks or ():  # before a model is loaded
        check_attack_name(name)
    model, data, other = _subject(parsed)
    report = evaluate(
        model,
        data,
        threats,
        parsed.attacks,
        suite=parsed.suite,
        batch_size=_batch_size(parsed),
        limit=parsed.limit,
        seed=parsed.seed,
        each=parsed.each,
        precision=parsed.precision,
        transfer_from=other,
        output=parsed.output,
        save_images=parsed.save_images,
        time_limit=parsed.time_limit,
        progress=True,
    )
    if not is_main_process():
        return
    print(report)
    where = parsed.json or (f"{parsed.output}/report.json" if parsed.output else None)
    if not report.finished:
        print("Stopped by the time limit." + (" The same command goes on." if parsed.output else ""))
    if where is None:
        print("Not saved; --output FOLDER keeps every verdict, --json FILE the report.")
    else:
        report.save(where)
        print(f"Report: {where}")


def _audit(arguments: list[str]) -> int:
    parsed: Audited = parse(Audited, arguments, prog="robust-peft audit")

    from robust_peft.data import load_images
    from robust_peft.evaluation import Report, audit
    from robust_peft.runs import is_run, run_images

    (threat,) = _threats(parsed, () if parsed.eps is None else (parsed.eps,))
    model, data, other = _subject(parsed)
    train: Any = None
    if parsed.train_data is not None:
        train = load_images(parsed.train_data, image_size=_image_size(parsed))
    elif is_run(parsed.source):
        train = run_images(parsed.source).train
    found = audit(
        model,
        data,
        threat,
        attack=parsed.attack,
        limit=parsed.limit,
        batch_size=_batch_size(parsed),
        seed=parsed.seed,
        train_data=train,
        transfer_from=other,
        report=None if parsed.report is None else Report.load(parsed.report),
        checks=parsed.checks or None,
        output=parsed.output,
        progress=True,
    )
    print(found)
    print(f"Written to {parsed.output}." if parsed.output else "Not saved; --output FOLDER keeps it, with pictures.")
    return 1 if found.failed else 0


def _plot(arguments: list[str]) -> None:
    parsed: Plot = parse(Plot, arguments, prog="robust-peft plot")

    from robust_peft.studies.bars import bars_from_runs

    print(f"Picture: {bars_from_runs(parsed.runs, parsed.output, attack=parsed.attack, title=parsed.title)}")


def _threats(parsed: Subject, budgets: Sequence[str]) -> list[Any]:
    """The threat models that flags and run say."""
    from robust_peft.runs import is_run, load_run_config, make_threat
    from robust_peft.threat import ThreatModel

    own = make_threat(load_run_config(parsed.source)) if is_run(parsed.source) else None
    if not budgets and own is None:
        raise ValueError(f"Give the budget as --eps, e.g. --eps 8/255: {parsed.source} is no run that names its own.")
    if not budgets and parsed.norm not in (None, own.norm):  # type: ignore[union-attr]
        raise ValueError(f"--norm {parsed.norm} needs --eps: the run's own budget, {own}, is one of another norm.")
    norm = parsed.norm or (own.norm if own is not None else "linf")
    return [ThreatModel(norm, eps) for eps in budgets] or [own]


def _subject(parsed: Subject) -> tuple[Any, Any, Any]:
    """The model, its images, and the second model or None."""
    from robust_peft.data import load_images
    from robust_peft.processes import process_state
    from robust_peft.runs import is_run, load_model, run_classes, run_images

    device = process_state().device
    if parsed.image_size is not None and parsed.data is None:
        raise ValueError("--image-size goes with --data: a run's own test images have the size that it was trained at.")
    if parsed.data is not None:
        data: Any = load_images(parsed.data, image_size=_image_size(parsed))
        if is_run(parsed.source) and tuple(data.classes) != run_classes(parsed.source):
            own = run_classes(parsed.source)
            raise ValueError(
                f"The run in {parsed.source} was trained on {len(own)} classes ({', '.join(own[:3])}, ...), "
                f"{parsed.data} has {len(data.classes)} ({', '.join(data.classes[:3])}, ...): a label would not mean "
                "the same. Give images with the run's classes in its order."
            )
    elif is_run(parsed.source):
        data = run_images(parsed.source).test
        if data is None:
            raise ValueError(f"The run in {parsed.source} has no test images; name some as --data.")
    else:
        raise ValueError(f"Name the images as --data: {parsed.source} is no run with images of its own.")
    model = load_model(parsed.source, checkpoint=parsed.checkpoint).to(device)
    other = None if parsed.transfer_from is None else load_model(parsed.transfer_from).to(device)
    return model, data, other


def _batch_size(parsed: Subject) -> int:
    from robust_peft.runs import is_run, load_run_config

    if parsed.batch_size is not None:
        return parsed.batch_size
    return load_run_config(parsed.source).evaluation.batch_size if is_run(parsed.source) else 128


def _image_size(parsed: Subject) -> int | None:
    """The size asked for, else the one that a run's images were brought to."""
    from robust_peft.runs import is_run, run_image_size

    if parsed.image_size is not None:
        return parsed.image_size
    return run_image_size(parsed.source) if is_run(parsed.source) else None


def _zoo(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            "usage: robust-peft zoo [attacks]\n\nLists the backbones that --backbone.name takes, or the attacks that "
            "--attacks takes."
        )
        return
    if arguments not in ([], ["attacks"]):
        raise ValueError(f"zoo takes nothing, or attacks. Found {' '.join(arguments)}.")
    if arguments:
        _zoo_attacks()
        return
    from robust_peft.models import ENTRIES

    print("\n\n".join(entry.describe() for entry in ENTRIES))


def _zoo_attacks() -> None:
    from robust_peft.attacks.suite import ENTRIES, SUITES

    for entry in ENTRIES:
        also = f" (also {', '.join(entry.aliases)})" if entry.aliases else ""
        steps = f", K = {entry.steps}" if entry.steps is not None else ""
        print(f"{entry.name}{also}\n  {entry.about}")
        print(f"  norms: {', '.join(entry.norms)}; knowledge: {entry.knowledge}; by {entry.library}")
        print(f"  passes for an image that withstands: {entry.forwards} forwards, {entry.backwards} backwards{steps}")
        if entry.source:
            print(f"  {entry.source}")
    print("\nK: steps; C: classes; T = min(9, C - 1): targets. A name may carry numbers: pgd-20 (steps), pgd-20x5 (and")
    print("restarts), pgd-10@2/225 (and the step size), apgd-ce-20, square-1000.")
    print("Suites (--suite):")
    for name, norms in SUITES.items():
        for norm, attacks in norms.items():
            print(f"  {name}, {norm}: {', '.join(attacks)}")


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
        given = flag_value(arguments, f"--{part}.{name}")
        config = getattr(preset, part)
        if given in table and given != getattr(config, name):
            own = {parameter: None for parameter in table[getattr(config, name)]}
            changed = dataclasses.replace(config, **{name: given}, **own)
            preset = dataclasses.replace(preset, **{part: changed})
    given = {flag: flag_value(arguments, f"--{flag}") for flag in PRESET_DEPENDENT}
    return dataclasses.replace(
        preset,
        backbone=_for_backbone(preset.backbone, given["backbone.name"]),
        data=_for_data(preset.data, given),
        attack=_for_budget(preset, given),
        optim=_for_epochs(preset.optim, given["optim.epochs"]),
    )


# Flags that make other values of a preset meaningless.
PRESET_DEPENDENT = ("backbone.name", "data.name", "data.root", "data.train", "data.test", "threat.norm", "threat.eps")
PRESET_DEPENDENT += ("attack.steps", "optim.epochs")


def _for_backbone(backbone: BackboneConfig, name: str | None) -> BackboneConfig:
    if name is None or name == backbone.name:
        return backbone
    foreign = {field: None for field, takers in BACKBONE_PARAMETERS.items() if name not in takers}
    return dataclasses.replace(backbone, name=name, **foreign)


def _for_data(data: DataConfig, given: dict[str, str | None]) -> DataConfig:
    """Paths of one dataset are nothing to another."""
    name = given["data.name"]
    if name is None or name == data.name:
        return data
    paths = {part: given[f"data.{part}"] for part in ("root", "train", "test")}
    return dataclasses.replace(data, name=name, **paths)


def _for_budget(preset: RunConfig, given: dict[str, str | None]) -> AttackConfig:
    """A step size goes with norm, budget and number of steps: where one changes, the default takes its place."""
    now = {"threat.norm": preset.threat.norm, "threat.eps": preset.threat.eps, "attack.steps": str(preset.attack.steps)}
    if all(given[flag] in (None, value) for flag, value in now.items()):
        return preset.attack
    return dataclasses.replace(preset.attack, step_size=None)


def _for_epochs(optim: OptimConfig, epochs: str | None) -> OptimConfig:
    """The warm-up stays the same part of the run."""
    if epochs is None or not epochs.isdecimal():
        return optim
    return dataclasses.replace(
        optim, epochs=int(epochs), warmup_epochs=optim.warmup_epochs * int(epochs) / optim.epochs
    )


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """What a flag is given, before the flags are parsed; None where it is not there."""
    given = [value for key, value in itertools.pairwise(arguments) if key == flag]
    given += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{flag}=")]
    return given[-1] if given else None


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
