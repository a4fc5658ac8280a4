from __future__ import annotations

import copy
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.utils import parametrize

from robust_peft.adapters.bottleneck.model import own_modules

from .config import SelectedConfig
from .layer import SelectedParameter

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# A copy in the state dict of the model, "norm.parametrizations.weight.0.selected_copies.default", is saved under the
# name that the parameter has in the network: "norm.weight".
_COPY = re.compile(r"(?P<module>.*)\.parametrizations\.(?P<name>\w+)\.0\.selected_copies\.(?P<adapter>.+)")


class SelectedModel(BaseTuner):
    """peft's view of the method: which parameters are trained, and what can be done with them.

    Made by `peft.get_peft_model(model, SelectedConfig(...))`; use that or `robust_peft.adapters.attach`. A BatchNorm
    whose parameters train updates its running statistics in place: they are saved with the adapter, and are the one
    thing that disabling or unloading it does not undo.
    """

    prefix = "selected_"
    tuner_layer_cls = SelectedParameter
    target_module_mapping: dict[str, list[str]] = {}

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        others = {known.select for known in self.peft_config.values() if isinstance(known, SelectedConfig)}
        if len(others) > 1:
            # torch keeps the parametrized names in a class that a module shares with its deep copies.
            raise ValueError(f"All adapters of one model should select the same. Found {', '.join(sorted(others))}.")

    # peft's methods are typed for any config; here it is always a SelectedConfig.
    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        names = list(find_selected(self.model, peft_config))
        if not names:
            what = "normalisation layers with parameters" if peft_config.select == "layernorm" else "biases"
            raise ValueError(f"Expected {what} outside the head in {type(self.model).__name__}. Found none.")
        resolved = copy.copy(peft_config)  # a copy, so that what is saved is what the user wrote
        resolved.target_modules = "|".join(re.escape(name) for name in names)
        return resolved

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for name in _selected_names(target, peft_config.select):
            layer = _layer_of(target, name)
            if layer is not None:
                original: Any = target.parametrizations[name].original  # type: ignore[index]
                layer.update_layer(original, adapter_name, peft_config.inference_mode)
                continue
            layer = SelectedParameter(getattr(target, name), adapter_name)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            parametrize.register_parametrization(target, name, layer)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        copies = [match for match in map(_COPY.fullmatch, saved) if match is not None]
        for module in sorted({match["module"] for match in copies}):
            for name in _STATISTICS:
                if f"{module}.{name}" in state_dict:
                    saved[f"{module}.{name}"] = state_dict[f"{module}.{name}"]
        return saved

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        match = _COPY.fullmatch(key)
        if match is not None and match["adapter"] == adapter_name:
            return f"{match['module']}.{match['name']}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if adapter_names is not None:
            self.set_adapter(adapter_names)
        for module in list(self.model.modules()):
            names = _parametrized_names(module)
            values = {name: getattr(module, name) for name in names} if merge else {}
            if names:
                _restore(module, names, values)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def find_selected(model: nn.Module, config: SelectedConfig) -> dict[str, list[str]]:
    """The parameters that `config` selects, in the order of the network's modules.

    Args:
        model: any module, with or without adapters.
        config: what to select; modules in its `modules_to_save`, and all inside them, are left out.

    Returns:
        Dotted name of the module that owns them: names of its parameters.
    """
    found, left_out = {}, ()
    for name, module in own_modules(model):
        if any(name == saved or name.endswith("." + saved) for saved in config.modules_to_save or ()):
            left_out += (name + ".",)
        if name and not (name + ".").startswith(left_out):
            names = _selected_names(module, config.select)
            if names:
                found[name] = names
    return found


def _selected_names(module: nn.Module, select: str) -> list[str]:
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    own |= {name: getattr(module, name) for name in _parametrized_names(module)}  # another adapter's
    if select == "bias":
        return [name for name in own if (name == "bias" or name.endswith("_bias")) and own[name].dim() == 1]
    inside = [child for name, child in module.named_children() if name != "parametrizations"]
    leaf = not any(True for child in inside for _ in child.parameters())
    # By name, because timm and transformers have normalisation layers that are not made from torch's.
    norm = any("Norm" in kind.__name__ for kind in type(module).__mro__)
    return list(own) if leaf and norm else []


@torch.no_grad()
def _restore(module: nn.Module, names: list[str], values: dict[str, torch.Tensor]) -> None:
    """Make the named parameters of a module its own again, with these values where there are any.

    Not by torch's `remove_parametrizations`, which takes them out of the class that deep copies of the module share.
    """
    lists: Any = module.parametrizations
    if len(lists) > len(names):
        raise ValueError(f"{type(module).__name__} has other parametrizations too, so it cannot be unloaded.")
    originals = {name: lists[name].original for name in names}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, original in originals.items():
        if name in values:
            original.copy_(values[name])
        module.register_parameter(name, original)


def _parametrized_names(module: nn.Module) -> list[str]:
    """Parameters of a module that a `SelectedParameter` stands in for."""
    if not parametrize.is_parametrized(module):
        return []
    return [name for name in module.parametrizations if _layer_of(module, name) is not None]  # type: ignore[union-attr]


def _layer_of(module: nn.Module, name: str) -> SelectedParameter | None:
    if not parametrize.is_parametrized(module, name):
        return None
    layer = module.parametrizations[name][0]  # type: ignore[index]
    return layer if isinstance(layer, SelectedParameter) else None
