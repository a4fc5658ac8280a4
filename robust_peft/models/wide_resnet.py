"""Wide ResNets for images of 32 x 32 pixels (CIFAR).

Zagoruyko and Komodakis 2016, arXiv:1605.07146: few layers, many channels, BatchNorm and ReLU before each convolution.
Neither timm nor torchvision has them; their `wide_resnet50_2` is another network. No dropout, as usual in adversarial
training.

With ``bn="batch"`` no BatchNorm has running statistics, as in the paper and the official code of CA-AT alike.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from robust_peft.models.resnet import batch_norm, check_sizes, initialise_convolutions


class PreactivationBlock(nn.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``; where the shape changes, the sum is with a 1 x 1 convolution instead.

    That convolution sees the normalised and activated input, as in the authors' code.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bn1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x), inplace=True)
        residual = self.conv1(active)
        residual = self.conv2(functional.relu(self.bn2(residual), inplace=True))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Images of shape `[B, 3, H, W]` to logits of shape `[B, num_classes]`.

    Args:
        blocks: Number of blocks in each of the three stages.
        widen_factor: The stages have 16, 32 and 64 times so many channels.
        num_classes: Number of logits.
        norm: Makes a normalisation layer for a number of channels.
    """

    def __init__(self, blocks: int, widen_factor: int, num_classes: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        width = 16 * widen_factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(blocks, 16, width, 1, norm)
        self.layer2 = _stage(blocks, width, 2 * width, 2, norm)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, norm)
        self.bn = norm(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        features = functional.relu(self.bn(features), inplace=True)
        return self.fc(features.mean(dim=(2, 3)))


def wide_resnet(depth: int = 28, widen_factor: int = 10, num_classes: int = 10, *, bn: str = "running") -> WideResNet:
    """WRN-depth-widen_factor, randomly initialised; the default WRN-28-10 has 36.5 M parameters.

    Args:
        depth: Number of convolutions and linear layers on the way, 6 n + 4 for n blocks in each stage: 10, 16, 22, 28.
        widen_factor: Multiple of the channels of a plain ResNet; 1 is a narrow one for trials.
        num_classes: Number of logits.
        bn: "running", or "batch" for statistics of the batch in train and eval mode alike
            (`robust_peft.models.resnet.batch_norm`).

    Raises:
        ValueError: For a depth that is no 6 n + 4, another ``bn``, or a number below 1.
    """
    check_sizes(depth=depth, widen_factor=widen_factor, num_classes=num_classes)
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth should be 10, 16, 22, 28, 34 or another 6 n + 4. Found depth = {depth!r}.")
    return WideResNet((depth - 4) // 6, widen_factor, num_classes, batch_norm(bn))


def _stage(
    blocks: int, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    rest = [PreactivationBlock(channels, channels, 1, norm) for _ in range(blocks - 1)]
    return nn.Sequential(PreactivationBlock(channels_in, channels, stride, norm), *rest)
