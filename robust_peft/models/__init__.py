"""Backbones: pixels in [0, 1] to logits."""

from robust_peft.models.normalize import Normalized
from robust_peft.models.zoo import ENTRIES, load_backbone, new_head

__all__ = ["ENTRIES", "Normalized", "load_backbone", "new_head"]
