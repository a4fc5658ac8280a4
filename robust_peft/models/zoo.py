"""Backbones by name, as modules that map pixels in [0, 1] to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_peft.models.checkpoints import load_weights, rows_of
from robust_peft.models.factory import SHAPE, build_module, split_name
from robust_peft.models.micro_swin import MEAN, STD, micro_swin
from robust_peft.models.normalize import Normalized

EMBEDDED_WEIGHTS = "micro_swin.safetensors"


@dataclass(frozen=True)
class ZooEntry:
    """What a name stands for, as ``robust-peft zoo`` shows it."""

    name: str
    architecture: str
    weights: str
    preprocessing: str


ENTRIES = (
    ZooEntry(
        "micro_swin",
        "Swin, 3.1 M parameters, 32 px, convolutional stem, depths 2 and 6",
        "in this package; trained adversarially on CIFAR-10, L-inf 8/255",
        "CIFAR-10 mean and std inside the model",
    ),
    ZooEntry("timm/NAME", "any timm classifier", "timm's own, from the Hub", "timm's mean and std inside the model"),
    ZooEntry("hf/NAME", "any transformers image classifier", "from the Hub", "its image processor's mean and std"),
    ZooEntry(
        SHAPE,
        "what a function in a Python file of your own returns; the file is executed",
        "the function's own, or --checkpoint",
        "the model takes pixels in [0, 1]; a bare timm model gets timm's mean and std",
    ),
)


def load_backbone(
    name: str | nn.Module,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
) -> Normalized:
    """A backbone behind its normalisation: pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`.

    Args:
        name: "micro_swin" (embedded), "timm/NAME", "hf/NAME", "path/to/module.py:factory", or an nn.Module of one's
            own that wants normalised images. A factory is a function without required arguments, or with arguments
            named num_classes, checkpoint or image_size; its file is executed. What it returns maps pixels in [0, 1]
            to logits (a bare timm model: normalised images, by its own mean and std).
        num_classes: Number of logits. Where it differs from the weights', the head is a new, random one. None: as the
            weights have it.
        checkpoint: Local safetensors file with weights for the architecture, or "random" for none. A factory with an
            argument of that name is handed it as it is.
        mean: Mean of each channel in [0, 1] units; None: the backbone's own (a module without one: 0).
        std: Standard deviation of each channel; None: the backbone's own (a module without one: 1).
        image_size: Pixels on each side, where the architecture is built for one; None: its own.

    Raises:
        ValueError: For an unknown name, a checkpoint of another architecture, or a factory that fails or has no
            argument for what is asked of it.
        FileNotFoundError: If the checkpoint or the factory's file does not exist.
        OSError: If weights cannot be downloaded.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes should be at least 1. Found num_classes = {num_classes!r}.")
    if isinstance(name, nn.Module):
        own_mean, own_std = _timm_statistics(name) or ((0.0,) * 3, (1.0,) * 3)
        if num_classes is not None or image_size is not None:
            raise ValueError("num_classes and image_size are for backbones by name; build your module as you want it.")
        backbone = name
        if checkpoint == "random":
            raise ValueError('checkpoint="random" is for backbones by name; a module comes with the weights it has.')
        if checkpoint is not None:
            load_weights(backbone, checkpoint)
    elif (found := split_name(name)) is not None:
        backbone = _from_factory(*found, num_classes, checkpoint, image_size)
        # One entry stands for any number of channels, so that grey images stay grey.
        channels = next((len(given) for given in (mean, std) if given is not None), 1)
        own_mean, own_std = _timm_statistics(backbone) or ((0.0,) * channels, (1.0,) * channels)
    elif name == "micro_swin":
        backbone, own_mean, own_std = _embedded(num_classes, checkpoint, image_size)
    elif name.startswith("timm/"):
        backbone, own_mean, own_std = _from_timm(name.removeprefix("timm/"), num_classes, checkpoint, image_size)
    elif name.startswith("hf/"):
        backbone, own_mean, own_std = _from_hub(name.removeprefix("hf/"), num_classes, checkpoint, image_size)
    else:
        raise ValueError(f"backbone should be {', '.join(entry.name for entry in ENTRIES)}. Found backbone = {name!r}.")
    return Normalized(backbone, mean if mean is not None else own_mean, std if std is not None else own_std)


def _from_factory(
    path: Path, factory: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None
) -> nn.Module:
    options = {
        "num_classes": num_classes,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "image_size": image_size,
    }
    backbone = build_module(path, factory, options)
    # What the factory did not take is left; nothing that was asked for is dropped without a word.
    left = [key for key in ("num_classes", "image_size") if options.get(key) is not None]
    if left:
        raise ValueError(
            f"{path}:{factory} takes no {' and no '.join(left)}; give it such an argument, or leave it out."
        )
    weights = options.get("checkpoint")
    if weights == "random":
        raise ValueError(
            f'{path}:{factory} takes no checkpoint, so that it cannot be told "random"; it gives the weights it has.'
        )
    if weights is not None:
        load_weights(backbone, str(weights))
    return backbone


Built = tuple[nn.Module, Sequence[float], Sequence[float]]


def _embedded(num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    build = partial(micro_swin, image_size=image_size or 32)
    if checkpoint == "random":
        return build(num_classes or 10), MEAN, STD
    if checkpoint is not None:
        model = build(num_classes or rows_of(checkpoint, "head.fc.weight") or 10)
        load_weights(model, checkpoint)
        return model, MEAN, STD
    if image_size not in (None, 32):
        raise ValueError(f"micro_swin's weights are for images of 32 pixels. Found image_size = {image_size}.")
    model = build(num_classes or 10)
    with resources.as_file(resources.files("robust_peft.models") / "weights" / EMBEDDED_WEIGHTS) as path:
        load_weights(model, path)
    return model, MEAN, STD


def _from_timm(name: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    import timm

    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None:
        options["img_size"] = image_size
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "none"
        raise ValueError(f"timm has no model {name!r}. Names like it: {close}.")
    try:
        model: Any = timm.create_model(name, pretrained=checkpoint is None, **options)
    except (OSError, RuntimeError) as error:
        if checkpoint is not None:
            raise
        raise _no_download(f"timm/{name}", error) from error
    if checkpoint is not None and checkpoint != "random":
        classes = rows_of(checkpoint, f"{model.pretrained_cfg.get('classifier')}.weight")
        if num_classes is None and classes is not None:
            model.reset_classifier(classes)
        load_weights(model, checkpoint)
    mean, std = _timm_statistics(model) or ((0.0,) * 3, (1.0,) * 3)
    return model, mean, std


def _from_hub(name: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    options: dict[str, Any] = {} if num_classes is None else {"num_labels": num_classes}
    if image_size is not None and checkpoint != "random":
        # transformers would replace the position embeddings by random ones without a word.
        raise ValueError(
            "image_size of hf/NAME can be set with checkpoint='random' alone: pretrained ones keep theirs."
        )
    if image_size is not None:
        options["image_size"] = image_size
    if num_classes is None and checkpoint not in (None, "random"):
        classes = rows_of(checkpoint, "classifier.weight")
        options |= {} if classes is None else {"num_labels": classes}
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        if checkpoint is None:
            model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **options)
        else:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name, **options))
    except OSError as error:
        raise _no_download(f"hf/{name}", error) from error
    if checkpoint is not None and checkpoint != "random":
        load_weights(model, checkpoint)
    return model, processor.image_mean, processor.image_std


def _timm_statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float]] | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or "mean" not in config:
        return None
    return tuple(config["mean"]), tuple(config["std"])


def _no_download(name: str, error: Exception) -> OSError:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(
        f"The weights of {name} could not be downloaded ({first_line}). With a local copy in safetensors, give it as "
        'checkpoint=; checkpoint="random" builds the architecture without weights.'
    )


@torch.no_grad()
def new_head(head: nn.Module, seed: int) -> None:
    """Give a classifier head fresh random weights, the same for the same seed.

    Normal with standard deviation 0.02 and zero bias, as timm and transformers start theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.02
            parameter.copy_(drawn)
