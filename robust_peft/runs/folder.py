"""The run folder: who may write it, what lies in it, and how it is read.

It holds ``config.json`` (everything that was resolved, package versions, commit, hash of the checkpoint),
``metrics.jsonl``, ``adapter/`` (peft's own format, head included) or ``model.safetensors`` where everything was
trained, ``state/`` (for resume), ``evaluation/`` and ``evaluation.json`` (verdicts), and ``README.md``. No pickle is
needed to read a finished run.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from robust_peft.config import RunConfig, differences, from_dict, to_dict
from robust_peft.data import Splits
from robust_peft.files import read_json, sha256
from robust_peft.models import Normalized
from robust_peft.models.factory import split_name
from robust_peft.models.zoo import weights_file
from robust_peft.training.precision import resolve_precision

ADAPTER_FOLDER = "adapter"
FULL_WEIGHTS = "model.safetensors"
PROBE_FOLDER = "probe"  # metrics and state of the training that initialised the head
EVALUATION_FOLDER = "evaluation"  # every batch's verdicts, so that a killed evaluation goes on with --resume
# What a run writes, and so all that --overwrite removes.
WRITTEN = ("config.json", "metrics.jsonl", ADAPTER_FOLDER, FULL_WEIGHTS, "state", EVALUATION_FOLDER, "evaluation.json")
WRITTEN += ("README.md", PROBE_FOLDER)
PACKAGES = ("robust_peft", "torch", "torchvision", "timm", "peft", "transformers", "accelerate", "safetensors", "numpy")


def claimed(folder: Path) -> AbstractContextManager:
    """Hold the folder for this process. The system lets go of it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder.parent / f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"Another process is writing in the run folder {folder}. Wait for it or stop it."
        ) from None


def check_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
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


def check_same_start(folder: Path, base_hash: str | None, classes: Sequence[str]) -> None:
    """Refuse to go on with a run whose frozen backbone or classes have changed since it was started.

    ``base_hash`` is None where everything is trained, so that the saved state replaces it all.
    """
    before = read_description(folder)
    if base_hash is not None and before["backbone_sha256"] != base_hash:
        raise ValueError(f"The backbone's weights are not those that the run in {folder} was started with.")
    if before["classes"] != list(classes):
        raise ValueError(f"The classes are not those that the run in {folder} was started with.")


def read_description(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: config.json is missing.")
    return read_json(folder / "config.json")


def clear(folder: Path) -> None:
    for name in WRITTEN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_whole(model: Any, where: Path) -> None:
    """Save a model so that its files are there whole or not at all: peft writes its folder file by file."""
    if not hasattr(model, "peft_config"):
        model.save_pretrained(where)  # one file, whole by itself
        return
    unfinished = where.with_name(f".{where.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    shutil.rmtree(where, ignore_errors=True)
    unfinished.rename(where)


def adapter_file(folder: Path) -> Path:
    return folder / ADAPTER_FOLDER / "adapter_model.safetensors"


def description_of(
    config: RunConfig, backbone: Normalized, splits: Splits, image_size: int | None, state: Any, base_hash: str
) -> dict[str, Any]:
    weights = weights_file(config.backbone.name, config.backbone.checkpoint)
    return {
        "config": to_dict(config),
        "classes": list(splits.classes),
        "images": {part: len(getattr(splits, part) or ()) for part in ("train", "validation", "test")},
        "image_size": image_size,
        "skipped_images": splits.skipped,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "checkpoint_sha256": None if weights is None else sha256(weights),
        "backbone_sha256": base_hash,
        "factory_sha256": factory_hash(config.backbone.name),
        "precision": resolve_precision(config.precision, state.device),
        "processes": state.num_processes,
        "device": _device_name(state.device),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "command": command_line(),
    }


def command_line() -> str:
    """How this process was called, as one would type it again: without the folder that the interpreter lies in."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.parent.name == "robust_peft":
        words = ["python", "-m", f"robust_peft.{called.parent.name}"]
    elif called.suffix == ".py":
        words = ["python", sys.argv[0]]
    else:
        words = [called.name]
    return shlex.join([*words, *sys.argv[1:]])


def factory_hash(backbone: str) -> str | None:
    """SHA-256 of the Python file that builds a backbone; None for one by name."""
    found = split_name(backbone)
    return None if found is None else sha256(found[0])


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
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def is_run(source: str | Path) -> bool:
    """Whether this is a run folder: one whose ``config.json`` is a run's (transformers calls its own file so too)."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return False
    description = read_json(path)
    return isinstance(description, dict) and "config" in description and "classes" in description


def load_run_config(folder: str | Path) -> RunConfig:
    """The config of a run folder. FileNotFoundError where there is no run."""
    return from_dict(RunConfig, read_description(Path(folder))["config"])


def run_image_size(folder: str | Path) -> int | None:
    """Pixels on each side to which a run's images are brought; None where they stay as they are stored."""
    return read_description(Path(folder)).get("image_size")


def run_classes(folder: str | Path) -> tuple[str, ...]:
    """The names of a run's classes, in the order of its logits. FileNotFoundError where there is no run."""
    return tuple(read_description(Path(folder))["classes"])
