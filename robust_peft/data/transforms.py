"""Augmentation on the device, batched, with randomness that belongs to the sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robust_peft import keyed_random


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and random horizontal flip (the usual augmentation of CIFAR).

    Args:
        padding: Pixels added on each side before the crop; 0 for no crop.
        flip: Whether to flip half of the images.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding should be a non-negative integer. Found padding = {self.padding!r}.")

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images of shape `[B, C, H, W]` and the samples' keys of shape `[B]`, to images of the same shape."""
        count, _, height, width = images.shape
        draws = keyed_random.uniform(keys, (3,))
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
        return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
