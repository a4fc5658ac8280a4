"""From a config to a finished run, and the folder that it leaves behind.

A run folder holds ``config.json`` (everything that was resolved, package versions, commit, hash of the checkpoint),
``metrics.jsonl``, ``adapter/`` (peft's own format, head included) or ``model.safetensors`` where everything was
trained, ``state/`` (for resume), ``evaluation/`` and ``evaluation.json`` (verdicts), and ``README.md``. No pickle is
needed to read a finished run.
"""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from robust_peft import surgery as surgeries
from robust_peft.adapters import BottleneckConfig, attach, find_head, lora_config
from robust_peft.attacks import FGSM, PGD, check_attack_name
from robust_peft.config import (
    AdapterConfig,
    AttackConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    SurgeryConfig,
    differences,
    from_dict,
    to_dict,
)
from robust_peft.data import CropFlip, Splits, digits, evaluation_loader, parquet, train_loader
from robust_peft.evaluation import Report, evaluate
from robust_peft.files import read_json, sha256, write_json, write_text
from robust_peft.models import Normalized, load_backbone, new_head
from robust_peft.models.checkpoints import fingerprint, load_weights
from robust_peft.models.factory import split_name
from robust_peft.processes import on_main_or_raise, process_state
from robust_peft.threat import ThreatModel
from robust_peft.training import FitResult, Trainer
from robust_peft.training.state import STATE_FILE

ADAPTER_FOLDER = "adapter"
FULL_WEIGHTS = "model.safetensors"
EVALUATION_FOLDER = "evaluation"  # every batch's verdicts, so that a killed evaluation goes on with --resume
# What a run writes, and so all that --overwrite removes.
WRITTEN = ("config.json", "metrics.jsonl", ADAPTER_FOLDER, FULL_WEIGHTS, "state", EVALUATION_FOLDER, "evaluation.json")
WRITTEN += ("README.md",)
_MODELS = "a run folder, micro_swin, timm/NAME, hf/NAME or path/to/module.py:factory"
PACKAGES = ("robust_peft", "torch", "torchvision", "timm", "peft", "transformers", "accelerate", "safetensors", "numpy")


@dataclass
class RunResult:
    """A run as `run` left it."""

    folder: Path
    finished: bool
    """False where the time limit came first; the same call with ``resume=True`` goes on."""
    model: nn.Module
    fit: FitResult
    report: Report | None
    """The evaluation on the test images; None without test images or attacks, or where the run is not finished."""
    trainable_parameters: int
    bytes_on_disk: int
    """Size of what was saved: adapter and head, or the whole model."""


def run(
    config: RunConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    time_limit: float | None = None,
    progress: bool = True,
) -> RunResult:
    """Train, save, evaluate, and write the run folder.

    Args:
        config: The whole run.
        output: The run folder; made if it does not exist.
        resume: Go on with the unfinished run in ``output``; its config must be this one.
        overwrite: Remove the run in ``output`` first.
        time_limit: Seconds after which training stops cleanly; ``resume`` goes on.
        progress: Whether to show progress.

    Raises:
        FileExistsError: If ``output`` holds a run and neither ``resume`` nor ``overwrite`` is given, holds something
            else, or another process writes in it.
        FileNotFoundError: If there is no run to resume, or a file that the config names does not exist.
        ValueError: If the run to resume was started with other settings, or data and config do not fit.
    """
    folder = Path(output)
    for name in config.evaluation.attacks:
        check_attack_name(name, config.threat.norm)  # now, not after hours of training
    state = process_state()
    with _claimed(folder) if state.is_main_process else nullcontext():
        on_main_or_raise(lambda: _check_folder(folder, config, resume, overwrite))
        splits = load_data(config.data)
        num_classes = len(splits.classes)
        backbone = build_backbone(config, num_classes)
        going_on = resume and (folder / STATE_FILE).is_file()
        base_hash = fingerprint(backbone, leave_out=find_head(backbone))
        if not going_on:
            _initialise_head(backbone, config, splits, progress)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # adapters start from random numbers too
            model = attach(backbone, adapter_method(config.adapter, backbone))
        if state.is_main_process and not going_on:
            _clear(folder)  # not earlier: a mistake in the config must not cost the run that was here
        trainer = Trainer(
            model,
            attack=make_training_attack(config),
            loss=config.loss,
            surgery=surgeries.make_surgery(config.surgery.name, **config.surgery.parameters()),
            optim=config.optim,
            validation=config.validation,
            augment=CropFlip() if config.data.augment else None,
            conflict_params=config.surgery.conflict_params,
            scope=config.surgery.scope,
            measure_conflict=config.measure_conflict,
            precision=config.precision,
            compile=config.compile,
            seed=config.seed,
            output=folder,
            save_every_steps=config.save_every_steps,
            log_with=config.track_with,
            settings=to_dict(config),
            progress=progress,
        )
        if state.is_main_process and not going_on:
            write_json(folder / "config.json", _description(config, backbone, splits, trainer, base_hash))
        validation = splits.validation
        fit = trainer.fit(
            train_loader(splits.train, config.data.batch_size, seed=config.seed),
            None if validation is None else evaluation_loader(validation, config.evaluation.batch_size),
            resume=going_on,
            time_limit=time_limit,
        )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not fit.finished:
            return RunResult(folder, False, model, fit, None, trainable, 0)
        where = folder if config.adapter.name == "full" else folder / ADAPTER_FOLDER
        if state.is_main_process:
            _save_whole(model, where)
        state.wait_for_everyone()
        size = (where / FULL_WEIGHTS if config.adapter.name == "full" else _adapter_file(folder)).stat().st_size
        report = None
        if splits.test is not None and config.evaluation.attacks:
            report = evaluate(
                model,
                splits.test,
                [make_threat(config)],
                config.evaluation.attacks,
                batch_size=config.evaluation.batch_size,
                limit=config.evaluation.limit,
                each=config.evaluation.each,
                precision=config.evaluation.precision,
                seed=config.seed,
                output=folder / EVALUATION_FOLDER,
                progress=progress and state.is_main_process,
            )
        result = RunResult(folder, True, model, fit, report, trainable, size)
        if state.is_main_process:
            training = {"seconds": fit.seconds, "trainable_parameters": trainable, "bytes_on_disk": size}
            evaluation = {} if report is None else report.to_dict()
            write_json(folder / "evaluation.json", {**evaluation, "training": training})
            write_text(folder / "README.md", _card(config, result))
        state.wait_for_everyone()
        return result


def load_run(folder: str | Path) -> nn.Module:
    """The trained model of a finished run: backbone and adapters, in eval mode, pixels in [0, 1] to logits.

    Raises:
        FileNotFoundError: If the folder holds no finished run, or the backbone's checkpoint is gone.
        ValueError: If the backbone's checkpoint is not the one that the run was trained on.
    """
    folder = Path(folder)
    description = _read_description(folder)
    config: RunConfig = from_dict(RunConfig, description["config"])
    recorded = description["checkpoint_sha256"]
    if recorded is not None and sha256(config.backbone.checkpoint or "") != recorded:
        raise ValueError(
            f"{config.backbone.checkpoint} is not the file that {folder} was trained on (its hash differs)."
        )
    if config.adapter.name == "full":
        backbone = build_backbone(config, len(description["classes"]), weights=False)
        if not (folder / FULL_WEIGHTS).is_file():
            raise FileNotFoundError(f"The run in {folder} is not finished: {FULL_WEIGHTS} is missing.")
        load_weights(backbone, folder / FULL_WEIGHTS)
        return backbone.eval()
    import peft

    backbone = build_backbone(config, len(description["classes"]))
    if fingerprint(backbone, leave_out=find_head(backbone)) != description["backbone_sha256"]:
        raise ValueError(
            f"{config.backbone.name}'s weights are not those that {folder} was trained on (their hash differs): "
            "another version of the package or of the checkpoint?"
        )
    if not _adapter_file(folder).is_file():
        raise FileNotFoundError(f"The run in {folder} is not finished: {_adapter_file(folder)} is missing.")
    return peft.PeftModel.from_pretrained(backbone, str(folder / ADAPTER_FOLDER)).eval()


def is_run(source: str | Path) -> bool:
    """Whether this is a run folder: one whose ``config.json`` is a run's (transformers calls its own file so too)."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return False
    description = read_json(path)
    return isinstance(description, dict) and "config" in description and "classes" in description


def load_model(
    source: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The model that a source stands for, in eval mode: pixels of shape `[B, C, H, W]` in [0, 1] to logits `[B, K]`.

    Args:
        source: A run folder (`load_run`), or what `robust_peft.load_backbone` takes by name: "micro_swin", "timm/NAME",
            "hf/NAME", "path/to/module.py:factory".
        checkpoint: As in `robust_peft.load_backbone`, like the others; a run folder takes none of them, it says it all.

    Raises:
        ValueError: For a source that is none of these, or arguments that do not go with it.
        FileNotFoundError: If a file is missing, or the run is not finished.
        OSError: If weights cannot be downloaded.
    """
    options = {
        "checkpoint": checkpoint,
        "num_classes": num_classes,
        "image_size": image_size,
        "mean": mean,
        "std": std,
    }
    if is_run(source):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{source} is a run folder, which knows its own {', '.join(given)}; leave that out.")
        return load_run(source)
    name = str(source)
    if not (name == "micro_swin" or name.startswith(("timm/", "hf/")) or split_name(name)):
        if Path(source).is_dir():
            saved = (Path(source) / "config.json").is_file()
            hint = f' (one that transformers saved is "hf/{name}")' if saved else ""
            raise ValueError(f"The folder {name!r} holds no run{hint}. A model is {_MODELS}.")
        if Path(source).is_file():
            raise ValueError(
                f"{name} is a file; weights go with an architecture, as its checkpoint. A model is {_MODELS}."
            )
        raise ValueError(f"A model is {_MODELS}. Found {name!r}, and there is no such folder.")
    return load_backbone(name, **options).eval()


def load_run_config(folder: str | Path) -> RunConfig:
    """The config of a run folder. FileNotFoundError where there is no run."""
    return from_dict(RunConfig, _read_description(Path(folder))["config"])


def run_classes(folder: str | Path) -> tuple[str, ...]:
    """The names of a run's classes, in the order of its logits. FileNotFoundError where there is no run."""
    return tuple(_read_description(Path(folder))["classes"])


# --- from config to parts ---


def make_threat(config: RunConfig) -> ThreatModel:
    """The threat model of a run."""
    return ThreatModel(config.threat.norm, config.threat.eps)


def make_training_attack(config: RunConfig) -> PGD:
    """The inner maximisation of a run."""
    chosen: AttackConfig = config.attack
    given = {
        k: getattr(chosen, k) for k in ("step_size", "objective", "random_start") if getattr(chosen, k) is not None
    }
    if chosen.name == "fgsm":
        return FGSM(make_threat(config), **given)
    given |= {k: getattr(chosen, k) for k in ("steps", "restarts") if getattr(chosen, k) is not None}
    return PGD(make_threat(config), **given)


def adapter_method(config: AdapterConfig, backbone: nn.Module) -> Any:
    """What `robust_peft.attach` is to insert into the backbone."""
    if config.name == "bottleneck":
        given = {"reduction_factor": config.reduction_factor, "activation": config.activation}
        blocks = None if config.blocks is None else list(config.blocks)
        return BottleneckConfig(blocks=blocks, **{k: v for k, v in given.items() if v is not None})
    if config.name == "lora":
        return lora_config(backbone, rank=config.rank or 16, alpha=config.alpha or 16)
    return config.name


def load_data(config: DataConfig) -> Splits:
    """The images of a run."""
    if config.name == "digits":
        splits = digits()
    else:
        assert config.train is not None  # the config saw to it
        splits = parquet(config.train, config.test, config.validation_share)
    return splits.limited(config.limit)


def build_backbone(config: RunConfig, num_classes: int, *, weights: bool = True) -> Normalized:
    """The backbone of a run, the same each time: random parts are drawn from the run's seed.

    ``weights=False`` builds the embedded backbone without reading weights that would be overwritten anyway.
    """
    checkpoint = config.backbone.checkpoint
    if not weights and config.backbone.name == "micro_swin":
        checkpoint = "random"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return load_backbone(
            config.backbone.name,
            num_classes=num_classes,
            checkpoint=checkpoint,
            image_size=config.backbone.image_size,
        )


def _initialise_head(backbone: nn.Module, config: RunConfig, splits: Splits, progress: bool) -> None:
    """A random head, or one trained before on the frozen backbone (Hua et al. 2024, RoLI, arXiv:2312.05716)."""
    chosen = config.adapter
    if chosen.head_init == "keep":
        return
    name = find_head(backbone)
    new_head(backbone.get_submodule(name), config.seed)
    if chosen.head_init == "random":
        return
    # The probe trains on a copy, so that nothing of peft's wrapping stays in the backbone.
    probe = attach(copy.deepcopy(backbone), "linear")
    robust = chosen.head_init == "robust-linear-probe"
    trainer = Trainer(
        probe,
        attack=make_training_attack(config),
        surgery=surgeries.Vanilla(lam=1.0 if robust else 0.0),
        measure_conflict=False,
        optim=OptimConfig(lr=chosen.head_lr, weight_decay=0.0, epochs=chosen.head_epochs),
        augment=CropFlip() if config.data.augment else None,
        precision=config.precision,
        seed=config.seed,
        progress=progress,
    )
    trainer.fit(train_loader(splits.train, config.data.batch_size, seed=config.seed))
    trained = dict(trainer.trainable)
    with torch.no_grad():
        for key, parameter in backbone.get_submodule(name).named_parameters():
            (found,) = [value for full, value in trained.items() if full.endswith(f".{key}")]
            parameter.copy_(found)


# --- the folder ---


def _claimed(folder: Path) -> AbstractContextManager:
    """Hold the folder for this process. The system lets go of it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder.parent / f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"Another process is writing in the run folder {folder}. Wait for it or stop it."
        ) from None


def _check_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other.")
    if folder.is_file():
        raise FileExistsError(f"The run folder {folder} is a file.")
    holds_run = (folder / "config.json").is_file()
    if resume:
        if not holds_run:
            raise FileNotFoundError(f"{folder} holds no run to resume.")
        started = from_dict(RunConfig, read_json(folder / "config.json")["config"])
        changed = differences(started, config)
        if changed:
            raise ValueError(
                f"The run in {folder} was started with other settings: {'; '.join(changed)}. Give the same flags."
            )
    elif holds_run and not overwrite:
        raise FileExistsError(f"{folder} holds a run. Resume it (--resume), replace it (--overwrite), or name another.")
    elif not holds_run and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _read_description(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: config.json is missing.")
    return read_json(folder / "config.json")


def _clear(folder: Path) -> None:
    for name in WRITTEN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _save_whole(model: Any, where: Path) -> None:
    """Save a model so that its files are there whole or not at all: peft writes its folder file by file."""
    if not hasattr(model, "peft_config"):
        model.save_pretrained(where)  # one file, whole by itself
        return
    unfinished = where.with_name(f".{where.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    shutil.rmtree(where, ignore_errors=True)
    unfinished.rename(where)


def _adapter_file(folder: Path) -> Path:
    return folder / ADAPTER_FOLDER / "adapter_model.safetensors"


def _description(
    config: RunConfig, backbone: Normalized, splits: Splits, trainer: Trainer, base_hash: str
) -> dict[str, Any]:
    checkpoint = config.backbone.checkpoint
    return {
        "config": to_dict(config),
        "classes": list(splits.classes),
        "images": {part: len(getattr(splits, part) or ()) for part in ("train", "validation", "test")},
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "checkpoint_sha256": sha256(checkpoint) if checkpoint not in (None, "random") else None,
        "backbone_sha256": base_hash,
        "precision": trainer.precision,
        "processes": trainer.accelerator.num_processes,
        "device": _device_name(trainer.device),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "command": " ".join(sys.argv),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this package's own repository, where it runs from one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def describe_surgery(config: SurgeryConfig) -> str:
    """The method and its parameter as people write it: "CA-AT, gamma 0.8"."""
    shown = {"vanilla": "vanilla", "ca-at": "CA-AT", "pcgrad": "PCGrad", "mgda": "MGDA", "cagrad": "CAGrad"}
    title = shown.get(config.name, "GradVac")
    made = surgeries.make_surgery(config.name, **config.parameters())
    names = {"vanilla": ["lam"], "ca-at": ["gamma"], "cagrad": ["c"], "gradvac": ["target"]}.get(config.name, [])
    parts = [f"{name} {getattr(made, name):g}" for name in names]
    if getattr(made, "rescale", "none") != "none":
        parts.append(f"rescale {made.rescale}")  # type: ignore[union-attr]
    return ", ".join([title, *parts])


def _card(config: RunConfig, result: RunResult) -> str:
    description = read_json(result.folder / "config.json")
    lines = [
        f"# {result.folder.name}",
        "",
        f"{config.backbone.name} fine-tuned on {config.data.name} by {config.adapter.name} "
        f"({result.trainable_parameters:,} trainable parameters, {result.bytes_on_disk / 1e6:.2f} MB), "
        f"{describe_surgery(config.surgery)}, loss {config.loss}, {make_training_attack(config)}; "
        f"{config.optim.epochs} epoch(s) in {result.fit.seconds:.0f} s on {description['device']}, "
        f"{description['precision']}, {description['processes']} process(es), seed {config.seed}.",
        "",
    ]
    if result.report is not None:
        lines += ["| measured on test images | accuracy, 95 % interval |", "| --- | --- |"]
        for row in result.report.results:
            name = "no attack" if row.threat is None else f"{row.attack}, {row.threat}"
            name = name if row.own else f"after {name}"
            lines.append(f"| {name} | {row.accuracy} |")
        lines.append("")
    lines += [
        "An accuracy under attack is an upper bound: a stronger attack may find more. `robust-peft evaluate` with "
        "`--attacks autoattack` runs the standard one, and `robust-peft audit` tells whether a figure can be believed.",
        "",
        "```python",
        "import robust_peft as rp",
        "",
        f'model = rp.load_run("{result.folder.as_posix()}")  # pixels of shape [B, 3, H, W] in [0, 1] -> logits',
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
