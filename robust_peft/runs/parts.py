"""What a config's parts stand for: threat model, attack, adapter, images, backbone, head."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_peft import surgery as surgeries
from robust_peft.adapters import BottleneckConfig, attach, find_head, lora_config
from robust_peft.attacks import APGD, PGD, make_solver
from robust_peft.config import AdapterConfig, DataConfig, OptimConfig, RunConfig, SurgeryConfig
from robust_peft.data import CropFlip, ImageSet, PreparedImages, Splits, load_splits, train_loader
from robust_peft.data.splits import Images
from robust_peft.models import Normalized, load_backbone, new_head
from robust_peft.models.factory import split_name
from robust_peft.models.image_size import expected_image_size
from robust_peft.threat import ThreatModel
from robust_peft.training import FitResult, Trainer
from robust_peft.training.state import STATE_FILE

logger = logging.getLogger("robust_peft")


def make_threat(config: RunConfig) -> ThreatModel:
    """The threat model of a run."""
    return ThreatModel(config.threat.norm, config.threat.eps)


def make_training_attack(config: RunConfig) -> PGD | APGD:
    """The inner maximisation of a run."""
    return make_solver(config.attack.name, make_threat(config), **config.attack.parameters())


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
    """The images of a run, as they are stored; `prepare_data` makes them the size that the backbone wants."""
    splits = load_splits(
        config.name,
        root=config.root,
        train=config.train,
        test=config.test,
        image_column=config.image_column,
        label_column=config.label_column,
        validation_share=config.validation_share,
        skip_broken=config.skip_broken,
        partial=config.partial,
    )
    return splits.limited(config.limit)


def resolve_image_size(config: DataConfig, backbone: nn.Module, splits: Splits) -> int | None:
    """Pixels on each side to which the images are brought; None: they stay as they are stored.

    What the config says; else what the backbone is built for, where it takes no other size or where the images are
    pictures of any size. Small images in memory stay as they are in front of a network that takes any size.
    """
    if config.image_size is not None:
        return config.image_size
    size, only_this = expected_image_size(backbone)
    if not isinstance(splits.train, ImageSet):
        return size or 224
    stored = tuple(splits.train.images.shape[2:])
    if size is None or stored == (size, size):
        return None
    if only_this:
        return size
    logger.warning(
        "The images have %d x %d pixels, the backbone was made for %d x %d; data.image_size=%d would enlarge them.",
        *stored, size, size, size,
    )  # fmt: skip
    return None


def prepare_data(config: RunConfig, splits: Splits, image_size: int | None) -> Splits:
    """The images resized and cut for the backbone: training ones at random places, if they are augmented."""
    return splits.prepared(image_size, resize=config.data.resize, crop=config.data.augment, seed=config.seed)


def make_augmentation(config: DataConfig, train: Images) -> CropFlip | None:
    """What happens to a batch of training images on the device.

    Images that are not cut at a random place when they are prepared are padded by an eighth and cut here: 4 of 32.
    """
    if not config.augment:
        return None
    if not isinstance(train, PreparedImages):
        return CropFlip(padding=4, rotation=config.rotation)
    whole = isinstance(train.source, ImageSet) and train.resize == train.image_size  # nothing is left to cut off
    padding = 0 if train.random_crop and not whole else train.image_size // 8
    return CropFlip(padding=padding, rotation=config.rotation)


def loader_workers(config: DataConfig, splits: Splits, processes: int) -> int:
    """Processes that decode pictures beside this one."""
    if config.workers is not None:
        return config.workers
    if isinstance(splits.train, ImageSet):
        return 0  # nothing to decode
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return max(1, min(8, cores // on_this_machine))


def build_backbone(config: RunConfig, num_classes: int, *, weights: bool = True) -> Normalized:
    """The backbone of a run, the same each time: random parts are drawn from the run's seed.

    ``weights=False`` builds a named architecture without weights that would be overwritten anyway.
    """
    checkpoint = config.backbone.checkpoint
    if not weights and split_name(config.backbone.name) is None:
        checkpoint = "random"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return load_backbone(
            config.backbone.name,
            num_classes=num_classes,
            checkpoint=checkpoint,
            mean=config.backbone.mean,
            std=config.backbone.std,
            image_size=config.backbone.image_size,
            **{k: getattr(config.backbone, k) for k in ("bn", "width") if getattr(config.backbone, k) is not None},
        )


def initialise_head(
    backbone: nn.Module,
    config: RunConfig,
    splits: Splits,
    augment: CropFlip | None,
    workers: int,
    progress: bool,
    *,
    output: Path | None = None,
    time_limit: float | None = None,
) -> FitResult | None:
    """A random head, or one trained before on the frozen backbone (Hua et al. 2024, RoLI, arXiv:2312.05716).

    The training keeps its state in ``output`` and goes on with it. Its result; None where nothing was trained.
    """
    chosen = config.adapter
    if chosen.head_init == "keep":
        return None
    name = find_head(backbone)
    new_head(backbone.get_submodule(name), config.seed)
    if chosen.head_init == "random":
        return None
    # The probe trains on a copy, so that nothing of peft's wrapping stays in the backbone.
    probe = attach(copy.deepcopy(backbone), "linear")
    robust = chosen.head_init == "robust-linear-probe"
    trainer = Trainer(
        probe,
        attack=make_training_attack(config),
        surgery=surgeries.Vanilla(lam=1.0 if robust else 0.0),
        measure_conflict=False,
        optim=OptimConfig(lr=chosen.head_lr, weight_decay=0.0, epochs=chosen.head_epochs),
        augment=augment,
        precision=config.precision,
        seed=config.seed,
        output=output,
        progress=progress,
    )
    result = trainer.fit(
        train_loader(splits.train, config.data.batch_size, seed=config.seed, workers=workers),
        resume=output is not None and (output / STATE_FILE).is_file(),
        time_limit=time_limit,
    )
    trained = dict(trainer.trainable)
    with torch.no_grad():
        for key, parameter in backbone.get_submodule(name).named_parameters():
            (found,) = [value for full, value in trained.items() if full.endswith(f".{key}")]
            parameter.copy_(found)
    return result


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
