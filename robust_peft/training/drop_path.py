"""Stochastic depth whose draws belong to the sample.

timm's and transformers' drop path draw from torch's generator, so what a sample loses would depend on the batch and
the process that it sits in. Here the same modules take their draw from the samples' keys. Ordinary dropout stays with
torch's generator: it is the same after a resume, but not over numbers of processes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from robust_peft import keyed_random


def key_drop_paths(model: nn.Module) -> Callable[[Tensor], None]:
    """Make the model's active drop paths draw by key. Calling it again is harmless.

    Returns:
        A function to be called with the samples' keys of shape `[B]` before each train-mode pass.
    """
    found = [m for m in model.modules() if type(m).__name__.endswith("DropPath") and getattr(m, "drop_prob", 0)]
    current: list[Tensor] = []

    def set_keys(keys: Tensor) -> None:
        current[:] = [keys]

    for place, module in enumerate(found):
        module.forward = _keyed_forward(module, place, current)  # type: ignore[method-assign]
    return set_keys


def _keyed_forward(module: nn.Module, place: int, current: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        if not module.training:
            return hidden
        drop_prob = float(module.drop_prob)  # type: ignore[arg-type]
        keep = 1 - drop_prob
        draws = keyed_random.uniform(keyed_random.derive(current[0], place), (1,)).squeeze(1)
        kept = (draws < keep).to(hidden.dtype).reshape(-1, *[1] * (hidden.dim() - 1))
        scaled = keep > 0 and getattr(module, "scale_by_keep", True)
        return hidden * (kept / keep if scaled else kept)

    return forward


def has_dropout(model: nn.Module) -> bool:
    """Whether an ordinary dropout is active, whose draws differ between numbers of processes."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
