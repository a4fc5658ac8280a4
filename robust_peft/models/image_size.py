"""The image size that a model expects, as far as it says so."""

from __future__ import annotations

from typing import Any

from torch import nn


def expected_image_size(model: nn.Module) -> tuple[int | None, bool]:
    """Pixels on each side that a model was made for, and whether it takes no others.

    Read from patch embeddings (timm), ``image_size`` (torchvision, transformers) and timm's ``pretrained_cfg``; models
    inside wrappers are found too. ``(None, False)`` where nothing says it.
    """
    for module in model.modules():
        size = _side(getattr(module, "img_size", None))
        if size is not None:
            # timm's patch embeddings say whether they take other sizes too.
            return size, getattr(module, "strict_img_size", True) and not getattr(module, "dynamic_img_pad", False)
    for module in model.modules():
        size = _side(getattr(module, "image_size", None)) or _side(_of_config(module, "image_size"))
        if size is not None:
            return size, True
    for module in model.modules():
        size = _side(_of_config(module, "input_size"))
        if size is not None:
            return size, False
    return None, False


def _of_config(module: nn.Module, key: str) -> Any:
    config = getattr(module, "pretrained_cfg" if key == "input_size" else "config", None)
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _side(size: Any) -> int | None:
    """The side of a square, from a number, `(H, W)` or `(C, H, W)`; None for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, (tuple, list)) and len(size) >= 2 and size[-1] == size[-2] and isinstance(size[-1], int):
        return size[-1]
    return None
