from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.config import PeftConfig
from torch import nn

PEFT_TYPE = "ROBUST_PEFT_BOTTLENECK"
"""The name under which peft knows the adapter. Namespaced, so that a later method of peft's own cannot take it."""


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": _identity,  # a named function, not a lambda, so that the model can be pickled
}
INITS = ("kaiming", "normal")


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of the bottleneck adapter `h + up(act(down(h)))`, put after a block's MLP, before the residual add.

    Source: Pfeiffer et al. 2020, "AdapterHub" (arXiv:2007.07779). RoLI (CVPR 2024) puts the same adapter into robust
    vision transformers but starts with both projections at zero, so that only `up.bias` ever receives a gradient; here
    only `up` starts at zero: the model still equals its base at the start, and every tensor trains.

    Args:
        reduction_factor: the hidden width is `dim // reduction_factor`, at least 1, where `dim` is the MLP's output
            width (in a Swin it differs from stage to stage). An integer >= 1.
        activation: "gelu", "relu", "silu", "tanh" or "identity".
        blocks: which blocks get an adapter: None for all, else indices counted over the whole network in forward
            order, from 0; negative ones count from the end. An empty list gives no adapter at all, so that only
            `modules_to_save` trains (a linear probe).
        init: how `down.weight` starts: "kaiming" (normal, standard deviation `sqrt(2 / dim)`) or "normal" (standard
            deviation 0.02). Biases and `up` start at zero.
        target_modules: modules whose output the adapter takes, as in peft: a list of names or name endings, or one
            regular expression for the whole name. None finds the MLPs of the network's transformer blocks.
        exclude_modules: modules to leave alone, in the same notation. They still count in `blocks`.
        modules_to_save: modules that are trained and saved as a whole, usually the classifier head
            (`robust_peft.adapters.attach` fills it in).

    Raises:
        ValueError: naming every field that has a bad value.
    """

    reduction_factor: int = 8
    activation: str = "gelu"
    blocks: list[int] | None = None
    init: str = "kaiming"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        problems = []
        if not _is_int(self.reduction_factor) or self.reduction_factor < 1:
            problems.append(
                f"reduction_factor should be an integer >= 1. Found {self.reduction_factor!r}. "
                "8 gives a hidden width of an eighth of the block's; 1 gives the block's own width"
            )
        if self.activation not in ACTIVATIONS:
            problems.append(f"activation should be one of {', '.join(ACTIVATIONS)}. Found {self.activation!r}")
        if self.init not in INITS:
            problems.append(f"init should be one of {', '.join(INITS)}. Found {self.init!r}")
        if self.blocks is not None:
            if isinstance(self.blocks, (list, tuple, range)) and all(_is_int(index) for index in self.blocks):
                self.blocks = list(self.blocks)  # what JSON gives back
            else:
                problems.append(
                    f"blocks should be None (all), a list of integers, or [] (no adapter). Found {self.blocks!r}"
                )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not _is_names(value):
                problems.append(
                    f"{name} should be a list of module names, a regular expression or None. Found {value!r}"
                )
        if self.modules_to_save is not None and not _is_names(self.modules_to_save):
            # A bare string is the likely slip, and peft would read it letter by letter.
            problems.append(
                f"modules_to_save should be a list of module names or None. Found {self.modules_to_save!r}. "
                "Put a single name into a list"
            )
        if problems:
            raise ValueError("BottleneckConfig: " + "; ".join(problems) + ".")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)
