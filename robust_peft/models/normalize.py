"""From pixels in [0, 1] to logits, whatever the backbone wants to see and returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """A backbone behind its own normalisation, so that attacks and their box see pixels in [0, 1].

    Args:
        backbone: Normalised images of shape `[B, C, H, W]` to logits of shape `[B, K]`, as a tensor or as the output
            object of transformers (its ``logits``).
        mean: Mean of each channel in [0, 1] units.
        std: Standard deviation of each channel, positive.

    Raises:
        ValueError: If mean and std differ in length or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std should have one entry for each channel, std positive. Found {mean}, {std}.")
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`."""
        output = self.backbone((images - self.mean) / self.std)
        return output if isinstance(output, Tensor) else output.logits
