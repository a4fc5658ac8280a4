"""Tiny models and data that the tests of the training room share."""

import torch
from accelerate.tracking import GeneralTracker

import robust_peft as rp
from robust_peft.config import OptimConfig
from robust_peft.data import ImageSet
from robust_peft.models.micro_swin import micro_swin

CLASSES = 3


def tiny_backbone(seed: int = 0, drop_path_rate: float = 0.0) -> rp.Normalized:
    """A Swin of two blocks for 16 x 16 pixels."""
    torch.manual_seed(seed)
    swin = micro_swin(
        CLASSES,
        image_size=16,
        width=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=2,
        drop_path_rate=drop_path_rate,
    )
    return rp.Normalized(swin, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def tiny_adapted(seed: int = 0, method: object = "bottleneck", **options: float) -> torch.nn.Module:
    """The tiny backbone with adapters, reduction 4, drawn from the seed too."""
    backbone = tiny_backbone(seed, **options)
    torch.manual_seed(seed + 1)
    return rp.attach(backbone, rp.BottleneckConfig(reduction_factor=4) if method == "bottleneck" else method)


def tiny_images(count: int = 24, seed: int = 0) -> ImageSet:
    """Noise with a class-dependent brightness, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 120, (count, 3, 16, 16), generator=generator)
    return ImageSet((noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels, ("a", "b", "c"), "tiny")


def tiny_optim(**options: object) -> OptimConfig:
    """Two epochs of AdamW without weight decay."""
    defaults: dict = {"lr": 1e-2, "weight_decay": 0.0, "epochs": 2, "schedule": "constant"}
    return OptimConfig(**(defaults | options))


def tiny_attack(**options: object) -> object:
    """PGD with two steps."""
    return rp.attacks.PGD(rp.ThreatModel("linf", "8/255"), **({"steps": 2} | options))


class ListTracker(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__(_blank=True)
        self.config, self.logged = None, []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))
