"""Which precision the hardware is good at, and the autocast that goes with it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (emulated, it would be slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16"; "auto" asks ``accelerate launch`` first and the hardware second."""
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in DTYPES:
            return launched
        return "bf16" if multiplies_bf16(device) else "fp32"
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision should be one of auto, fp32, bf16, fp16. Found precision = {precision!r}.")
    return precision


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of "bf16" or "fp16"."""
    return torch.autocast(device.type, DTYPES[precision])
