"""Backbones by name, as modules that map pixels in [0, 1] to logits."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_peft.models.checkpoints import SUFFIXES, load_weights, rows_of
from robust_peft.models.downloads import cache_folder, check_hash, download
from robust_peft.models.factory import build_module, split_name
from robust_peft.models.micro_swin import MEAN, STD, micro_swin
from robust_peft.models.normalize import Normalized
from robust_peft.models.registry import ENTRIES, PublishedBackbone, published

EMBEDDED_WEIGHTS = "micro_swin.safetensors"
RESNETS = {"resnet18": 18, "resnet34": 34, "wrn28_10": 28}  # depth

# The module, its own mean and standard deviation, and the file with its weights where they are still to be loaded.
Built = tuple[nn.Module, Sequence[float], Sequence[float], str | Path | None]


def load_backbone(
    name: str | nn.Module,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    bn: str | None = None,
    width: int | None = None,
) -> Normalized:
    """A backbone behind its normalisation: pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`.

    Args:
        name: "micro_swin" (embedded), a published robust one ("ares/swin_small", ... see `ENTRIES`), "timm/NAME",
            "hf/NAME", "resnet18", "resnet34" or "wrn28_10" (for 32 pixels, to be trained from random weights, without
            normalisation), "path/to/module.py:factory", or an nn.Module of one's own that wants normalised images. A
            factory is a function without required arguments, or with arguments named num_classes, checkpoint or
            image_size; its file is executed. What it returns maps pixels in [0, 1] to logits (a bare timm model:
            normalised images, by its own mean and std).
        num_classes: Number of logits. Where it differs from the weights', the head is a new, random one. None: as the
            weights have it.
        checkpoint: Local file with weights for the architecture (safetensors, or a state dict by torch.save, in any
            layout that `robust_peft.models.checkpoints.load_weights` understands), or "random" for none. None: the
            published weights, downloaded once. A factory with an argument of that name is handed it as it is.
        mean: Mean of each channel in [0, 1] units; None: the backbone's own (a module without one: 0).
        std: Standard deviation of each channel; None: the backbone's own (a module without one: 1).
        image_size: Pixels on each side, where the architecture is built for one; None: its own. Weights of timm
            architectures are resampled by timm.
        bn: resnet18, resnet34, wrn28_10: "running" (default) or "batch" statistics in every BatchNorm.
        width: resnet18, resnet34: channels of the stem, 64 by default.

    Raises:
        ValueError: For an unknown name, a checkpoint of another architecture or with a normalisation of its own that is
            another one, an image_size that does not fit, or a factory that fails or has no argument for what is asked.
        FileNotFoundError: If the checkpoint or the factory's file does not exist.
        OSError: If weights cannot be downloaded.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes should be at least 1. Found num_classes = {num_classes!r}.")
    resnet_options = {key: value for key, value in (("bn", bn), ("width", width)) if value is not None}
    if resnet_options and not (isinstance(name, str) and name in RESNETS):
        raise ValueError(f"{' and '.join(resnet_options)} are for {', '.join(RESNETS)}. Found backbone = {name!r}.")
    if isinstance(name, nn.Module):
        if num_classes is not None or image_size is not None:
            raise ValueError("num_classes and image_size are for backbones by name; build your module as you want it.")
        if checkpoint == "random":
            raise ValueError('checkpoint="random" is for backbones by name; a module comes with the weights it has.')
        own_mean, own_std = _timm_statistics(name) or ((0.0,) * 3, (1.0,) * 3)
        backbone, weights = name, checkpoint
    elif (found := split_name(name)) is not None:
        backbone, weights = _from_factory(*found, num_classes, checkpoint, image_size)
        # One entry stands for any number of channels, so that grey images stay grey.
        channels = next((len(given) for given in (mean, std) if given is not None), 1)
        own_mean, own_std = _timm_statistics(backbone) or ((0.0,) * channels, (1.0,) * channels)
    elif name in RESNETS:
        backbone, weights = _resnet(name, num_classes, checkpoint, image_size, resnet_options)
        own_mean, own_std = (0.0,) * 3, (1.0,) * 3
    else:
        backbone, own_mean, own_std, weights = _by_name(name, num_classes, checkpoint, image_size)
    model = Normalized(backbone, mean if mean is not None else own_mean, std if std is not None else own_std)
    if weights is not None:
        load_weights(backbone, weights, mean=model.mean.flatten().tolist(), std=model.std.flatten().tolist())
    return model


def weights_file(name: str, checkpoint: str | Path | None = None) -> Path | None:
    """The local file that a backbone's weights come from, as far as there is one: ``checkpoint``, or the cached file of
    a published backbone once it has been downloaded. For records of what was used.
    """
    if checkpoint is not None:
        return None if checkpoint == "random" else Path(checkpoint)
    entry = published(name)
    return cached if entry is not None and (cached := cached_file(entry)).is_file() else None


def cached_file(entry: PublishedBackbone) -> Path:
    """Where the file of a published backbone lies, or will."""
    return cache_folder(entry.name.partition("/")[0]) / entry.file


def _by_name(name: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    entry = published(name)
    if name == "micro_swin":
        return _embedded(num_classes, checkpoint, image_size)
    if entry is not None:
        return _from_publication(entry, num_classes, checkpoint, image_size)
    if name.startswith("timm/"):
        return _from_timm(name.removeprefix("timm/"), num_classes, checkpoint, image_size)
    if name.startswith("hf/"):
        return _from_hub(name.removeprefix("hf/"), num_classes, checkpoint, image_size)
    raise _unknown(name)


def _unknown(name: str) -> ValueError:
    if name in ("ares/swin_tiny", "swin_tiny"):
        return ValueError(
            "There is no robust Swin-T in public: nobody has published an adversarially trained one. The smallest "
            'robust Swin is "ares/swin_small"; ordinary weights are "timm/swin_tiny_patch4_window7_224".'
        )
    if name.lower().endswith(SUFFIXES) or Path(name).is_file():
        return ValueError(
            f'{name} is a file with weights, which need an architecture: name="timm/NAME" (or another of the zoo), '
            f'checkpoint="{name}".'
        )
    names = [entry.name for entry in ENTRIES]
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(f"backbone should be {', '.join(names)}. Found backbone = {name!r}.{hint}")


def _from_factory(
    path: Path, factory: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None
) -> tuple[nn.Module, str | None]:
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
    return backbone, None if weights is None else str(weights)


def _resnet(
    name: str,
    num_classes: int | None,
    checkpoint: str | Path | None,
    image_size: int | None,
    options: dict[str, Any],
) -> tuple[nn.Module, str | Path | None]:
    from robust_peft.models.resnet import cifar_resnet
    from robust_peft.models.wide_resnet import wide_resnet

    if checkpoint is None:
        raise ValueError(
            f'{name} has no published weights: checkpoint="random" to train it from random ones, or a file of your own.'
        )
    if image_size is not None:
        raise ValueError(f"{name} takes images of any size; leave image_size = {image_size} out.")
    weights = None if checkpoint == "random" else checkpoint
    classes = num_classes or (None if weights is None else rows_of(weights, "fc.weight")) or 10
    if name == "wrn28_10":
        if "width" in options:
            raise ValueError("width is for resnet18 and resnet34; the width of wrn28_10 is in its name.")
        return wide_resnet(num_classes=classes, **options), weights
    return cifar_resnet(RESNETS[name], classes, **options), weights


def _embedded(num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    build = partial(micro_swin, image_size=image_size or 32)
    if checkpoint == "random":
        return build(num_classes or 10), MEAN, STD, None
    if checkpoint is not None:
        return build(num_classes or rows_of(checkpoint, "head.fc.weight") or 10), MEAN, STD, checkpoint
    if image_size not in (None, 32):
        raise ValueError(f"micro_swin's weights are for images of 32 pixels. Found image_size = {image_size}.")
    model = build(num_classes or 10)
    with resources.as_file(resources.files("robust_peft.models") / "weights" / EMBEDDED_WEIGHTS) as path:
        load_weights(model, path)
    return model, MEAN, STD, None


def _from_publication(
    entry: PublishedBackbone, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None
) -> Built:
    import timm

    if image_size is not None and (image_size < 1 or image_size % entry.size_step):
        raise ValueError(
            f"image_size of {entry.name} should be a multiple of {entry.size_step}, or left out for its own "
            f"{entry.image_size}. Found image_size = {image_size}."
        )
    if checkpoint is None:
        weights = _fetched(entry)
    else:
        weights = None if checkpoint == "random" else checkpoint
        if weights is not None and Path(weights).name == entry.file and Path(weights).is_file():
            check_hash(weights, entry.sha256)  # under another name it may be somebody's own
    classes = num_classes
    if classes is None and weights is not None:
        classes = rows_of(weights, "head.fc.weight")
    model = timm.create_model(
        entry.architecture,
        pretrained=False,
        num_classes=classes or 1000,
        img_size=image_size or entry.image_size,
        pretrained_cfg_overlay=dict(
            mean=entry.mean, std=entry.std, crop_pct=entry.crop_pct, interpolation=entry.interpolation
        ),
    )
    return model, entry.mean, entry.std, weights


def _fetched(entry: PublishedBackbone) -> Path:
    """The file of a published backbone, from the cache or from where it is published."""
    target = cached_file(entry)
    try:
        if target.is_file():
            return target
        if entry.url is None:
            raise OSError("its page serves it to browsers alone")
        return download(entry.url, target, sha256=entry.sha256)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"The weights of {entry.name} are not at hand: {reason}. They are the file {entry.file} on {entry.page}, "
            f"looked for as {target}. Put it there, or give a local copy as checkpoint= (--backbone.checkpoint PATH); "
            'checkpoint="random" builds the architecture without weights.'
        ) from error


def _from_timm(name: str, num_classes: int | None, checkpoint: str | Path | None, image_size: int | None) -> Built:
    import timm

    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None:
        options["img_size"] = image_size
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        close = close or timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}. Names like it: {', '.join(close) or 'none'}.")
    try:
        model: Any = timm.create_model(name, pretrained=checkpoint is None, **options)
    except TypeError as error:
        if image_size is None or "img_size" not in str(error):
            raise
        raise ValueError(f"timm/{name} is not built for one image size; leave image_size out.") from error
    except (OSError, RuntimeError) as error:
        if checkpoint is not None:
            raise
        raise _no_download(f"timm/{name}", error) from error
    weights = None if checkpoint == "random" else checkpoint
    if weights is not None and num_classes is None:
        classes = rows_of(weights, f"{model.pretrained_cfg.get('classifier')}.weight")
        if classes is not None and classes != model.num_classes:
            model.reset_classifier(classes)
    mean, std = _timm_statistics(model) or ((0.0,) * 3, (1.0,) * 3)
    return model, mean, std, weights


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
            # In float32, whatever the file is in: verdicts are float32's.
            options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
            model = AutoModelForImageClassification.from_pretrained(name, **options)
        else:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name, **options))
    except OSError as error:
        raise _no_download(f"hf/{name}", error) from error
    if getattr(processor, "do_flip_channel_order", False):
        raise ValueError(
            f"hf/{name} wants channels in the order BGR, which is not supported by name; build it in a "
            "module.py:factory that flips them."
        )
    mean, std = (0.0,) * 3, (1.0,) * 3
    if getattr(processor, "do_normalize", False) and processor.image_mean is not None:
        mean, std = processor.image_mean, processor.image_std
    return model, mean, std, None if checkpoint == "random" else checkpoint


def _timm_statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float]] | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or "mean" not in config:
        return None
    return tuple(config["mean"]), tuple(config["std"])


def _no_download(name: str, error: Exception) -> OSError:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(
        f"The weights of {name} could not be downloaded ({first_line}). Give a local copy of the file as checkpoint= "
        '(--backbone.checkpoint PATH); checkpoint="random" builds the architecture without weights.'
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
