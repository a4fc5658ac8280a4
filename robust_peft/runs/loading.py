"""Models back from run folders, and from whatever else names one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from robust_peft.adapters import find_head
from robust_peft.config import RunConfig, from_dict
from robust_peft.data import Splits
from robust_peft.files import sha256
from robust_peft.models import ENTRIES, load_backbone
from robust_peft.models.checkpoints import fingerprint, load_weights
from robust_peft.models.factory import split_name
from robust_peft.models.zoo import weights_file
from robust_peft.runs.folder import (
    ADAPTER_FOLDER,
    FULL_WEIGHTS,
    adapter_file,
    is_run,
    load_run_config,
    read_description,
)
from robust_peft.runs.parts import build_backbone, load_data, prepare_data

_MODELS = (
    "a run folder, micro_swin, ares/swin_small (robust-peft zoo lists more), timm/NAME, hf/NAME or "
    "path/to/module.py:factory"
)


def load_run(folder: str | Path) -> nn.Module:
    """The trained model of a finished run: backbone and adapters, in eval mode, pixels in [0, 1] to logits.

    A run of a backbone of one's own (``module.py:factory``) executes that file again, as long as it is the same one.

    Raises:
        FileNotFoundError: If the folder holds no finished run, or the backbone's checkpoint is gone.
        ValueError: If checkpoint or factory are not those of the training, or the factory lies inside the folder.
    """
    folder = Path(folder)
    description = read_description(folder)
    config: RunConfig = from_dict(RunConfig, description["config"])
    _check_factory(folder, config.backbone.name, description.get("factory_sha256"))
    if config.adapter.name == "full":
        backbone = build_backbone(config, len(description["classes"]), weights=False)
        if not (folder / FULL_WEIGHTS).is_file():
            raise FileNotFoundError(f"The run in {folder} is not finished: {FULL_WEIGHTS} is missing.")
        load_weights(backbone, folder / FULL_WEIGHTS)
        return backbone.eval()
    import peft

    recorded = description["checkpoint_sha256"]
    weights = weights_file(config.backbone.name, config.backbone.checkpoint)
    if recorded is not None and weights is not None:
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}, the checkpoint that {folder} was trained on, does not exist.")
        if sha256(weights) != recorded:
            raise ValueError(f"{weights} is not the file that {folder} was trained on (its hash differs).")
    with _quiet():  # that the checkpoint's own head is left out: the run brings another
        backbone = build_backbone(config, len(description["classes"]))
    if fingerprint(backbone, leave_out=find_head(backbone)) != description["backbone_sha256"]:
        raise ValueError(
            f"{config.backbone.name}'s weights are not those that {folder} was trained on (their hash differs): "
            "another version of the package or of the checkpoint?"
        )
    if not adapter_file(folder).is_file():
        raise FileNotFoundError(f"The run in {folder} is not finished: {adapter_file(folder)} is missing.")
    return peft.PeftModel.from_pretrained(backbone, str(folder / ADAPTER_FOLDER)).eval()


def _check_factory(folder: Path, backbone: str, recorded: str | None) -> None:
    """Before a run's own Python file is executed: it is the user's, not the folder's, and the one of the training.

    A run folder may come from somebody else, and is data.
    """
    found = split_name(backbone)
    if found is None:
        return
    path = found[0]
    if path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} names {path}, a Python file inside the run folder, which is not executed.")
    if recorded is not None and path.is_file() and sha256(path) != recorded:
        raise ValueError(f"{path} is not the file that {folder} was trained with (its hash differs).")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("robust_peft")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
            "hf/NAME", "ares/swin_small", "path/to/module.py:factory", ...
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
    families = {entry.name.partition("/")[0] for entry in ENTRIES}  # micro_swin, ares, timm, hf, ...
    if name.partition("/")[0] not in families and split_name(name) is None:
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


def run_images(folder: str | Path) -> Splits:
    """The images of a run at the size that its model sees, none of them augmented.

    Training images are cut in the centre like the others, so that a test image among them can be recognised.
    FileNotFoundError where there is no run.
    """
    config, description = load_run_config(folder), read_description(Path(folder))
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, augment=False, rotation=0.0))
    return prepare_data(plain, load_data(config.data), description.get("image_size"))
