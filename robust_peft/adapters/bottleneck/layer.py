from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import ACTIVATIONS, BottleneckConfig

CANNOT_MERGE = (
    "A bottleneck adapter cannot be merged into the base model: it adds a layer with an activation, which no change of "
    "the base weights can express. Keep it as it is (it is small), use .unload() to get the base model back, or use "
    'method="lora", which can be merged.'
)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Wraps one module (a block's MLP) and adds the active adapters to its output.

    With `h = base_layer(x)` of shape [..., dim], the output is `h + up(act(down(h)))`, of h's shape and dtype. Several
    active adapters all read `h`, and what they give is summed.
    """

    # peft finds parameters, moves, casts, switches and deletes them by these names.
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.dim = output_width(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation: dict[str, Any] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds the adapter `adapter_name`; which adapter is active stays as it is."""
        hidden = max(1, self.dim // config.reduction_factor)
        down = nn.Linear(self.dim, hidden)
        up = nn.Linear(hidden, self.dim)
        with torch.no_grad():
            if config.init == "kaiming":
                nn.init.kaiming_normal_(down.weight, nonlinearity="relu")
            else:
                nn.init.normal_(down.weight, std=0.02)
            # Only `up` is zero: with both at zero neither weight would ever get a gradient.
            for tensor in (down.bias, up.weight, up.bias):
                tensor.zero_()
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_activation[adapter_name] = ACTIVATIONS[config.activation]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # peft asks `base_layer.weight`, which an MLP does not have.
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return hidden
        if not isinstance(hidden, torch.Tensor) or hidden.shape[-1] != self.dim:
            found = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise ValueError(
                f"A bottleneck adapter expects its target to return a tensor of shape [..., {self.dim}] (the width of "
                f"the target's last Linear). Found {found} from {type(self.base_layer).__name__}. Choose another "
                "target_modules."
            )
        output = hidden
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue  # that adapter leaves this block alone
            down: Any = self.bottleneck_down[name]
            up = self.bottleneck_up[name]
            inner = hidden
            if not torch.is_autocast_enabled(hidden.device.type):
                # A half-precision base with float32 adapters. Under autocast the Linears cast for themselves, and a
                # cast here would only be undone.
                inner = hidden.to(down.weight.dtype)
            output = output + up(self.bottleneck_activation[name](down(inner)))
        return output.to(hidden.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


def output_width(module: nn.Module) -> int:
    """The width of a module's output, taken from its last Linear (in the order of definition).

    Raises:
        ValueError: if the module has no Linear or cannot be called.
    """
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if not linears or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            "A bottleneck adapter expects a target that ends in a Linear, such as an MLP or a Linear itself. "
            f"Found {type(module).__name__}. Choose another target_modules."
        )
    return linears[-1].out_features
