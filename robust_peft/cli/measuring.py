"""``robust-peft evaluate`` and ``robust-peft audit``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from robust_peft.cli.flags import is_main_process, parse


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


def run_evaluate(arguments: list[str]) -> None:
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


def run_audit(arguments: list[str]) -> int:
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
