"""Stochastic depth whose draws belong to the sample.

timm's and transformers' drop path draw from torch's generator, so what a sample loses would depend on the batch and
the process that it sits in. Here the same modules take their draw from the samples' keys. Ordinary dropout stays with
torch's generator: it is the same after a resume, but not over numbers of processes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from robust_peft import keyed_random


class KeyedDropPaths:
    """Inside this context, the model's active drop paths draw by key; outside, they are as they were.

    `set_keys` has to be called with the samples' keys of shape `[B]` before each train-mode pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = [
            m for m in model.modules() if type(m).__name__.endswith("DropPath") and getattr(m, "drop_prob", 0)
        ]
        self._keys: Tensor | None = None
        # Made once: to torch.compile another function in a module's place would be another model.
        self._forwards = [partial(self._forward, module, place) for place, module in enumerate(self._found)]

    def set_keys(self, keys: Tensor) -> None:
        """The keys of the samples of the next pass."""
        self._keys = keys

    def __enter__(self) -> KeyedDropPaths:
        for module, forward in zip(self._found, self._forwards, strict=True):
            module.forward = forward
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._found:
            del module.forward  # the class's own shows again

    def _forward(self, module: nn.Module, place: int, hidden: Tensor) -> Tensor:
        if not module.training:
            return hidden
        assert self._keys is not None
        keep = 1 - float(module.drop_prob)  # type: ignore[arg-type]
        draws = keyed_random.uniform(keyed_random.derive(self._keys, place), (1,)).squeeze(1)
        kept = (draws < keep).to(hidden.dtype).reshape(-1, *[1] * (hidden.dim() - 1))
        scaled = keep > 0 and getattr(module, "scale_by_keep", True)
        return hidden * (kept / keep if scaled else kept)


def has_dropout(model: nn.Module) -> bool:
    """Whether an ordinary dropout is active, whose draws differ between numbers of processes."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
