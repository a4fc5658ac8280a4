from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import BottleneckConfig
from .layer import CANNOT_MERGE, BottleneckLayer, output_width


class BottleneckModel(BaseTuner):
    """peft's view of the method: which modules get a `BottleneckLayer`, and what can be done with them.

    Made by `peft.get_peft_model(model, BottleneckConfig(...))`; use that or `robust_peft.adapters.attach`.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    # peft's methods are typed for any config; here it is always a BottleneckConfig.
    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        names = resolve_targets(self.model, peft_config)
        # A copy, so that what is saved is what the user wrote: `blocks` would mean something else on a list that is
        # already cut down to the chosen blocks. An expression rather than a list, because peft matches lists by ending.
        # The dummy name is peft's own way to say "no adapter, only modules_to_save".
        resolved = copy.copy(peft_config)
        resolved.target_modules = "|".join(re.escape(name) for name in names) or DUMMY_TARGET_MODULES
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
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, BottleneckLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: peft would copy `weight` from the wrapped module, and an MLP has none to copy.
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)


def find_blocks(model: nn.Module) -> list[str]:
    """The modules whose output a bottleneck adapter takes, one for each transformer block, in forward order.

    A block is a module that holds an attention (a child with "attn" or "attention" in its name) and an MLP: either a
    child `mlp` (timm and torchvision ViT and Swin, transformers >= 5), or the pair `intermediate` and `output` of older
    transformers layouts, where `output` may add the residual itself, so that its Linear `output.dense` is taken.
    Attention projections and Swin's patch merging are never in the list. Where the network sits in `model` does not
    matter.

    Args:
        model: any module, with or without adapters.

    Returns:
        Dotted names in `model`, possibly none.
    """
    names = []
    for prefix, block in model.named_modules():
        children = dict(block.named_children())
        if not any("attn" in name or "attention" in name for name in children):
            continue
        if "mlp" in children and any(isinstance(child, nn.Linear) for child in children["mlp"].modules()):
            target = "mlp"
        elif "intermediate" in children and isinstance(
            _unwrap(getattr(children.get("output"), "dense", None)), nn.Linear
        ):
            target = "output.dense"
        else:
            continue
        names.append(f"{prefix}.{target}" if prefix else target)
    return names


def resolve_targets(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """The dotted names of the modules that `config` puts an adapter on, in forward order; none for `blocks=[]`.

    `exclude_modules` is not applied here: peft does that.

    Raises:
        ValueError: if nothing matches, an index in `blocks` does not exist, or a target cannot take an adapter.
    """
    if config.blocks is not None and not config.blocks:
        return []
    if config.target_modules is None:
        names = find_blocks(model)
        if not names:
            raise ValueError(
                f"Expected transformer blocks with an attention and an MLP. Found none in {type(model).__name__}. "
                "Other adapters need none (linear, bias, full), or BottleneckConfig(target_modules=[...]) says where; "
                f"its modules with a Linear inside: {list_names(_candidates(model))}."
            )
    else:
        names = [name for name, _ in own_modules(model) if name and _matches(config.target_modules, name)]
        if not names:
            raise ValueError(
                f"target_modules={config.target_modules!r} should name modules of {type(model).__name__}. Found none "
                f"with such a name; its modules with a Linear inside: {list_names(_candidates(model))}."
            )
        for outer in names:
            for inner in names:
                if inner.startswith(outer + "."):
                    raise ValueError(
                        f"target_modules={config.target_modules!r} should name modules that do not contain each other. "
                        f"Found {outer!r} and {inner!r}. Name one of them."
                    )
    for name in names:
        try:
            output_width(_unwrap(model.get_submodule(name)))
        except ValueError as error:
            raise ValueError(f"Target {name!r}: {error}") from None
    if config.blocks is None:
        return names
    count = len(names)
    bad = [index for index in config.blocks if not -count <= index < count]
    if bad:
        raise ValueError(
            f"blocks should hold indices from {-count} to {count - 1}: the network has {count} blocks, counted in "
            f"forward order. Found {bad}."
        )
    chosen = {index % count for index in config.blocks}
    return [name for index, name in enumerate(names) if index in chosen]


def own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) for all modules of the network itself: nothing that lies inside an adapter's wrapper."""
    modules: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        modules.append((name, module))
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
    return modules


def list_names(names: Iterable[str], limit: int = 16) -> str:
    """Names for an error message: the first `limit`, and how many more there are."""
    names = list(names)
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _candidates(model: nn.Module) -> list[str]:
    """What could be meant by target_modules: MLP-like modules first, then Linears."""
    mlps, linears = [], []
    for name, module in own_modules(model):
        last = name.rpartition(".")[2].lower()
        if isinstance(_unwrap(module), nn.Linear):
            linears.append(name)
        elif any(part in last for part in ("mlp", "ffn", "feed_forward", "feedforward")):
            mlps.append(name)
    return mlps + linears


def _matches(target_modules: Iterable[str] | str, name: str) -> bool:
    """peft's rule: a string is an expression for the whole name, a list holds names or endings of names."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def _unwrap(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
