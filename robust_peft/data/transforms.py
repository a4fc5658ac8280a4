"""Augmentation on the device, batched, with randomness that belongs to the sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robust_peft import keyed_random


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, random horizontal flip (the usual augmentation of CIFAR), random rotation.

    Args:
        padding: Pixels added on each side before the crop; 0 for no crop.
        flip: Whether to flip half of the images.
        rotation: Degrees: images are turned around their centre by an angle that is uniform between minus and plus this
            number, bilinear, with zeros where nothing is (torchvision's RandomRotation). Pixels should then be uint8 or
            in [0, 1].
    """

    padding: int = 4
    flip: bool = True
    rotation: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding should be a non-negative integer. Found padding = {self.padding!r}.")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation should be in [0, 180] degrees. Found rotation = {self.rotation!r}.")

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images of shape `[B, C, H, W]` and the samples' keys of shape `[B]`, to images of the same shape."""
        count, _, height, width = images.shape
        draws = keyed_random.uniform(keys, (4,))
        rows = torch.arange(height, device=images.device).expand(count, -1)
        columns = torch.arange(width, device=images.device).expand(count, -1)
        if self.flip:
            columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
        if self.padding:
            images = functional.pad(images, [self.padding] * 4)
            offsets = (draws[:, :2] * (2 * self.padding + 1)).long()
            rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
        batch = torch.arange(count, device=images.device)
        # Advanced indices around the channel dimension put it last.
        cut = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        return rotate(cut, (2 * draws[:, 3] - 1) * self.rotation) if self.rotation else cut


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned counter-clockwise around their centres, bilinear, with zeros where nothing is.

    Args:
        images: Of shape `[B, C, H, W]`, uint8 or floating point in [0, 1].
        degrees: Of shape `[B]`.

    Returns:
        Tensor of the same shape and dtype; floats are in [0, 1].
    """
    height, width = images.shape[2:]
    angles = torch.deg2rad(degrees.float())
    # Where each pixel comes from, in pixels from the centre. Elementwise, so that a row depends on its own angle only.
    x = (torch.arange(width, device=images.device) - (width - 1) / 2)[None, None, :]
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[None, :, None]
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    # grid_sample's coordinates: -1 and 1 are the outer edges of the image.
    grid = torch.stack([(cos * x - sin * y) * (2 / width), (sin * x + cos * y) * (2 / height)], dim=3)
    turned = functional.grid_sample(images.float(), grid, "bilinear", "zeros", align_corners=False)
    if images.dtype == torch.uint8:
        return turned.round().clamp(0, 255).to(torch.uint8)
    return turned.clamp(0, 1).to(images.dtype)  # rounding may pass 1 by a hair
