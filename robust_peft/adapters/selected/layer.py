from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class SelectedParameter(nn.Module, BaseTunerLayer):
    """Stands in for one parameter of a module: gives the active adapter's trained copy, or the parameter itself.

    It is a parametrization (`torch.nn.utils.parametrize`), not a wrapper of the module: attentions read the biases of
    their projections without calling them, and some keep biases of their own.

    Args:
        original: the frozen parameter; not kept.
        adapter_name: the first adapter.
    """

    # peft finds parameters, switches and deletes them by this name.
    adapter_layer_names = ("selected_copies",)

    def __init__(self, original: torch.Tensor, adapter_name: str):
        super().__init__()
        self.selected_copies = nn.ParameterDict()
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(original, adapter_name)

    def update_layer(self, original: torch.Tensor, adapter_name: str, inference_mode: bool = False) -> None:
        """Adds the adapter `adapter_name`, equal to the original; which adapter is active stays as it is."""
        self.selected_copies[adapter_name] = nn.Parameter(original.detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.selected_copies]
        if self.disable_adapters or not names:
            return original
        if len(names) > 1:
            raise ValueError(f"One adapter of selected parameters should be active at a time. Found {names}.")
        return self.selected_copies[names[0]].to(original.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("Selected parameters are merged by .merge_and_unload() alone.")

    def unmerge(self) -> None:
        raise ValueError("Selected parameters are merged by .merge_and_unload() alone.")
