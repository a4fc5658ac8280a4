"""ResNets for images of 32 x 32 pixels (CIFAR).

He et al. 2016, arXiv:1512.03385, in the form that the adversarial training literature calls ResNet-18 and ResNet-34 on
CIFAR: the ImageNet networks with a stem for small images, a 3 x 3 convolution with stride 1 and no max-pooling. The
blocks are torchvision's. Its network, like timm's, has a stem of 7 x 7 and of a fixed width, so the rest is here.

What differs from the official code of CA-AT: with ``bn="batch"`` no BatchNorm has running statistics, as the paper
says; in that code the stem's still has. Convolutions start as torchvision's do, from normal weights (He et al. 2015),
not from PyTorch's default. The head is named ``fc``, and pooling takes the whole map, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class CifarResNet(nn.Module):
    """Images of shape `[B, 3, H, W]` to logits of shape `[B, num_classes]`.

    Args:
        blocks: Number of blocks in each of the four stages.
        num_classes: Number of logits.
        norm: Makes a normalisation layer for a number of channels.
        width: Channels of the stem and of the first stage; each further stage has twice as many at half the resolution.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int, norm: Callable[[int], nn.Module], width: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.layer1 = _stage(blocks[0], width, width, 1, norm)
        self.layer2 = _stage(blocks[1], width, 2 * width, 2, norm)
        self.layer3 = _stage(blocks[2], 2 * width, 4 * width, 2, norm)
        self.layer4 = _stage(blocks[3], 4 * width, 8 * width, 2, norm)
        self.fc = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.fc(features.mean(dim=(2, 3)))


def cifar_resnet(depth: int, num_classes: int = 10, *, bn: str = "running", width: int = 64) -> CifarResNet:
    """ResNet-18 (11.2 M parameters) or ResNet-34 (21.3 M) with the stem for small images, randomly initialised.

    Args:
        depth: 18 or 34.
        num_classes: Number of logits.
        bn: "running", or "batch" for statistics of the batch in train and eval mode alike (`batch_norm`).
        width: Channels of the stem; 64 is the published network, less a narrow one for trials.

    Raises:
        ValueError: For another depth or ``bn``, or a number below 1.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth should be one of {', '.join(map(str, BLOCKS))}. Found depth = {depth!r}.")
    check_sizes(num_classes=num_classes, width=width)
    return CifarResNet(BLOCKS[depth], num_classes, batch_norm(bn), width)


def batch_norm(bn: str) -> Callable[[int], nn.BatchNorm2d]:
    """Maker of BatchNorm layers for a number of channels.

    "running" keeps running statistics and uses them in eval mode, as usual. "batch" keeps none (CA-AT, section 5.1): a
    prediction then depends on who else is in the batch, in eval mode and under attack too.
    """
    if bn not in ("running", "batch"):
        raise ValueError(f"bn should be running or batch. Found bn = {bn!r}.")
    return partial(nn.BatchNorm2d, track_running_stats=bn == "running")


def check_sizes(**sizes: int) -> None:
    """ValueError that names the first of them that is no integer of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")


def initialise_convolutions(model: nn.Module) -> None:
    """Normal weights whose variance keeps the size of gradients through ReLUs (He et al. 2015, arXiv:1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(
    blocks: int, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    shortcut = None
    if stride != 1 or channels_in != channels:
        shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))
    first = BasicBlock(channels_in, channels, stride, shortcut, norm_layer=norm)
    return nn.Sequential(first, *[BasicBlock(channels, channels, norm_layer=norm) for _ in range(blocks - 1)])
