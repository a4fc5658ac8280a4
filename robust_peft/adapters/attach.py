from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from .bottleneck import BottleneckConfig
from .bottleneck.model import list_names
from .selected import SelectedConfig

METHODS = ("bottleneck", "lora", "layernorm", "bias", "linear", "full")

# Where classifier heads sit when a model does not say: the first that is a Linear is taken. `head.fc` is timm's
# ClassifierHead, `heads.head` torchvision's ViT.
_HEAD_NAMES = ("head", "head.fc", "fc", "classifier", "heads.head")

# One fused projection (timm), or query and value as in the LoRA paper (two generations of transformers).
_LORA_TARGETS = ("qkv", "query", "value", "q_proj", "v_proj")


def attach(model: nn.Module, method: str | PeftConfig = "bottleneck", *, head: str | None = None) -> nn.Module:
    """Makes a small part of a model trainable, freezes the rest, and gives back a model with `.save_pretrained`.

    `model` itself is changed (peft replaces modules in it) and must not be used for anything else afterwards.

    Args:
        model: a classifier: timm, transformers, or your own; also inside a wrapper module.
        method: what trains, always together with the classifier head:
            "bottleneck": an adapter after each block's MLP, `BottleneckConfig()`.
            "lora": LoRA with r = 16 and alpha = 16 on the attention's qkv projection (query and value, where they are
            separate).
            "layernorm": weights and biases of all normalisation layers, LayerNorm or another.
            "bias": all biases (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199).
            "linear": the head alone.
            "full": everything.
            Any peft config is taken as it is, except that the head is put into its `modules_to_save` when that is
            None. The config is copied, not changed. Write `modules_to_save=[]` for a frozen head.
        head: dotted name of the classifier head in `model`; None: `find_head`. Any module with parameters will do.

    Returns:
        A `peft.PeftModel`, or a `FullModel` for "full", with the inputs and outputs of `model`; for these names it
        equals `model` at the start. Exactly the adapter's parameters and the head require gradients. New modules are
        in the mode (train or eval) of `model`.

    Raises:
        ValueError: unknown method; the model already carries an adapter; no head, block, attention, normalisation layer
            or bias found, or more than one possible head; a name that peft would also match elsewhere.
        TypeError: `method` is neither a string nor a peft config.
    """
    for name, module in model.named_modules():
        if isinstance(module, (peft.PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"attach expects a model without adapters. Found {type(module).__name__} at {name or 'the top'!r}. "
                "Start from the base model (model.unload() gives it back), or call model.add_adapter(name, config) to "
                "put a second adapter on this one."
            )

    config: Any
    if isinstance(method, PeftConfig):
        config = copy.deepcopy(method)
        if config.is_prompt_learning or not hasattr(config, "modules_to_save"):
            raise ValueError(
                f"attach expects a peft config for image models that trains the head too (modules_to_save). Found "
                f"{type(method).__name__}, which does not. Use LoraConfig, BottleneckConfig or another adapter."
            )
    elif not isinstance(method, str):
        raise TypeError(f"method should be one of {', '.join(METHODS)} or a peft config. Found {method!r}.")
    elif method == "full":
        if head is not None:
            _check_head(model, head)
        return FullModel(model)
    elif method == "bottleneck":
        config = BottleneckConfig()
    elif method == "linear":
        config = BottleneckConfig(blocks=[])
    elif method == "lora":
        config = lora_config(model)
    elif method in ("layernorm", "bias"):
        config = SelectedConfig(select=method)
    else:
        raise ValueError(f"method should be one of {', '.join(METHODS)} or a peft config. Found {method!r}.")

    if config.modules_to_save is None:
        head = find_head(model) if head is None else head
        _check_head(model, head)
        _check_saved_name(model, head)
        config.modules_to_save = [head]
    else:
        if head is not None and head not in config.modules_to_save:
            raise ValueError(
                f"head={head!r} and modules_to_save={config.modules_to_save!r} of the config should agree. Leave one "
                "of them out."
            )
        for name in config.modules_to_save:
            _check_saved_name(model, name, several=True)

    own = set(map(id, model.modules()))
    adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if id(module) not in own:
            # New modules start in training mode; a model in eval mode would else have an adapter with dropout in it.
            module.training = model.training
    return adapted


def lora_config(model: nn.Module, *, rank: int = 16, alpha: int = 16) -> peft.LoraConfig:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on the attention projections that `find_attention` finds in `model`.

    Args:
        model: the model that the config is for.
        rank: rank of the two factors, at least 1.
        alpha: their product is scaled by alpha / rank.

    Raises:
        ValueError: no attention found.
    """
    # An expression, not a list: peft makes a list a set, and then equal runs save different files.
    targets = "|".join(re.escape(name) for name in find_attention(model))
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)


class FullModel(nn.Module):
    """A model of which everything trains, with the `save_pretrained` that a peft model has.

    Args:
        model: the model; all its floating-point parameters are set to require gradients.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The model inside, as a peft model's method of that name gives it."""
        return self.model

    def save_pretrained(self, folder: str | os.PathLike, *, is_main_process: bool = True) -> None:
        """Writes all parameters and buffers, under the names they have in the model inside, to `model.safetensors`.

        Load them with `model.load_state_dict(safetensors.torch.load_file(...))`. The file appears whole or not at all.

        Args:
            folder: made if it does not exist.
            is_main_process: False writes nothing: for all processes but one.

        Raises:
            ValueError: `folder` is a file.
        """
        if not is_main_process:
            return
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"save_pretrained expects a folder. Found the file {folder}. Give another path.")
        folder.mkdir(parents=True, exist_ok=True)
        state, seen = {}, set()
        for name, tensor in self.model.state_dict().items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            if storage in seen:
                tensor = tensor.clone()  # tied weights: safetensors refuses tensors that share memory
            seen.add(storage)
            state[name] = tensor
        unfinished = folder / f".model.safetensors.{os.getpid()}"
        try:
            save_file(state, unfinished, metadata={"format": "pt"})
            os.replace(unfinished, folder / "model.safetensors")
        finally:
            unfinished.unlink(missing_ok=True)


def find_head(model: nn.Module) -> str:
    """The dotted name of the classifier head's Linear.

    A model that says where its head is (timm's `pretrained_cfg` or `get_classifier`, transformers' `classifier`) is
    believed; else the usual names are tried: head, fc, classifier. A wrapper around such a model is looked through.

    Raises:
        ValueError: none found, or more than one; it names the candidates.
    """
    declared, named, named_depth = [], [], None
    # Shallow before deep, so that a wrapper's own head comes before what is inside it.
    for prefix, module in sorted(model.named_modules(), key=lambda item: _depth(item[0])):
        said = [f"{prefix}.{name}" if prefix else name for name in _declared_heads(module)]
        declared += [name for name in said if name not in declared]
        if not prefix and said:
            break
        if said or (named_depth is not None and _depth(prefix) > named_depth):
            continue
        for name in _HEAD_NAMES:
            if isinstance(_submodule(module, name), nn.Linear):
                named.append(f"{prefix}.{name}" if prefix else name)
                named_depth = _depth(prefix)
                break
    # A usual name is only a guess, and one further down than a declared head (an attention's `fc`) is a bad guess.
    shallowest = min(map(_depth, declared), default=None)
    named = [name for name in named if name not in declared and (shallowest is None or _depth(name) < shallowest)]
    heads = declared + named
    if len(heads) == 1:
        return heads[0]
    if heads:
        raise ValueError(
            f"Expected one classifier head in {type(model).__name__}. Found {len(heads)}: {list_names(heads)}. Say "
            "which with head=NAME."
        )
    linears = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    raise ValueError(
        f"Expected a classifier head (a Linear) in {type(model).__name__}. Found none; a model made with num_classes=0 "
        f"has none. Say where it is with head=NAME; its Linear modules, last first: {list_names(reversed(linears))}."
    )


def find_attention(model: nn.Module) -> list[str]:
    """The attention projections that "lora" adapts: `qkv`, or query and value where they are separate.

    Returns:
        Dotted names in `model`, in forward order, never empty.

    Raises:
        ValueError: none found; it names the Linear modules.
    """
    linears = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    names = []
    for name in linears:
        path, _, last = name.rpartition(".")
        if last in _LORA_TARGETS and re.search("attn|attention", path):
            names.append(name)
    if not names:
        raise ValueError(
            f"Expected attention projections (Linear modules named {', '.join(_LORA_TARGETS)} inside an attention) in "
            f"{type(model).__name__}. Found none. Pass peft.LoraConfig(target_modules=[...]); its Linear modules: "
            f"{list_names(linears)}."
        )
    return names


def _declared_heads(module: nn.Module) -> Iterator[str]:
    """Names, relative to `module`, of the Linears that `module` itself declares to be its classifier."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    classifier = config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())  # distilled models have two
    if not names and callable(getattr(module, "get_classifier", None)):
        found = module.get_classifier()  # type: ignore[operator]
        names = [name for name, child in module.named_modules() if child is found]
    if not names and hasattr(getattr(module, "config", None), "model_type"):
        names = ["classifier"]
    for name in names:
        if isinstance(_submodule(module, name), nn.Linear):
            yield name


def _check_head(model: nn.Module, head: str) -> None:
    module = _submodule(model, head) if head else None
    if module is None or next(module.parameters(), None) is None:
        found = "no such module" if module is None else f"{type(module).__name__}, which has no parameters"
        linears = [name for name, child in model.named_modules() if name and isinstance(child, nn.Linear)]
        raise ValueError(
            f"head={head!r} should name a module with parameters in {type(model).__name__}. Found {found}; its Linear "
            f"modules, last first: {list_names(reversed(linears))}."
        )


def _check_saved_name(model: nn.Module, name: str, several: bool = False) -> None:
    """peft trains every module whose dotted name ends in the letters of `name`: "head" also takes "aux_head"."""
    matches = [key for key, _ in model.named_modules(remove_duplicate=False) if key.endswith(name)]
    wanted = [key for key in matches if key == name or (several and key.endswith("." + name))]
    if not wanted:
        raise ValueError(
            f"modules_to_save should name modules of {type(model).__name__}. Found none called {name!r}. Give the "
            "dotted name of a module."
        )
    if len(wanted) != len(matches):
        others = [key for key in matches if key not in wanted]
        raise ValueError(
            f"Module name {name!r} should be the end of no other module's name, because peft trains all of them. Found "
            f"{list_names(others)}. Rename one of them, or put the model into a wrapper module (its attribute's name "
            "then begins the head's name)."
        )


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0
