"""From the names and shapes that a foreign file gives its tensors to those of a model.

Published checkpoints differ in how they are wrapped, in prefixes that wrappers of the model left, in normalisation
layers inside, and in the layout that the library had when they were written. timm's own filters do the last; the rest
is here. Tensors are passed on as they are, never copied.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Averaged weights come first: where a training script keeps both, they are what its paper reports.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
HEADS = {"head", "heads", "head_dist", "classifier", "fc", "linear"}
BOOKKEEPING = {"n_averaged"}  # of torch's AveragedModel
MEANS, STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")
NEAR = 1e-3  # means and standard deviations are published with three digits or more


@dataclass(frozen=True)
class Loaded:
    """What was done to a file's tensors on their way into a model; nothing where all is empty."""

    wrapper: tuple[str, ...] = ()
    """Entries of the file that hold the weights, from the outermost, e.g. ``("state_dict_ema",)``."""
    passed_over: tuple[str, ...] = ()
    """Entries that hold weights too and were not taken."""
    prefix: str = ""
    """What was cut off at the start of every name."""
    renamed: tuple[str, ...] = ()
    """Names of the model that the file had otherwise."""
    resampled: tuple[str, ...] = ()
    """Tensors that timm brought to another size: position embeddings and the like."""
    dropped: tuple[str, ...] = ()
    """Names in the file that no weight belongs to: normalisation, masks, counters."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of a normalisation layer in the file."""
    new_head: tuple[str, ...] = ()
    """Names that keep the model's own, random weights, since the file's are for other classes."""
    classes: tuple[int, int] | None = None
    """Classes of the file's head and of the model's, where they differ."""

    def notice(self) -> str | None:
        """What people have to know, in one line; None where there is nothing."""
        parts = []
        if self.classes is not None:
            parts.append(f"its head for {self.classes[0]} classes is left out and one for {self.classes[1]} is random")
        if self.passed_over:
            parts.append(f"the weights are its {'.'.join(self.wrapper)}, not {', '.join(self.passed_over)}")
        if self.resampled:
            parts.append(f"{_counted(self.resampled)} resampled to another image size")
        return "; ".join(parts) or None


def unwrap(content: Any) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors of what a file holds, the entries that led to them, and those that would have done too.

    Raises:
        ValueError: If there are none; what was found is named.
    """
    wrapper: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    while isinstance(content, Mapping) and (inside := [name for name in WRAPPERS if _may_hold(content.get(name))]):
        # Two levels at most in practice; each is one less.
        wrapper += (inside[0],)
        passed_over += tuple(inside[1:])
        content = content[inside[0]]
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, where names and tensors should be")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"holds no weights; its entries are {_first([str(name) for name in content]) or 'none'}")
    return tensors, wrapper, passed_over


def _may_hold(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        any(isinstance(inner, Tensor) for inner in value.values()) or any(name in value for name in WRAPPERS)
    )


def arrange(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], Loaded]:
    """Give a file's tensors the names and sizes that the model has for them.

    Args:
        tensors: As in the file, without wrappers.
        model: Their destination; may live on the meta device.
        mean: Mean that stands before the model; compared with one in the file. None: not compared.
        std: Its standard deviation, likewise.

    Returns:
        One tensor for each of the model's (but those of a head for other classes), and what was done.

    Raises:
        ValueError: If they do not fit, as the end of a sentence that starts with the file's name.
    """
    own = model.state_dict()
    state = {name: tensor for name, tensor in tensors.items() if name not in BOOKKEEPING or name in own}
    dropped = [name for name in tensors if name not in state]

    state, layer, found = _without_normalisation(state, own)
    dropped += layer
    if found is not None and mean is not None and std is not None and not _near(found, (mean, std)):
        raise ValueError(
            f"normalises by mean = {_numbers(found[0])}, std = {_numbers(found[1])} itself; the backbone would by mean "
            f"= {_numbers(mean)}, std = {_numbers(std)}. Give the file's as mean= and std= (--backbone.mean, .std)"
        )
    state, prefix = _without_prefix(state, own)
    counters = [name for name in state if name.endswith("num_batches_tracked") and name not in own]
    dropped += [prefix + name for name in counters]
    state = {name: tensor for name, tensor in state.items() if name not in counters}

    renamed: list[str] = []
    resampled: list[str] = []
    if any(name not in state or state[name].shape != own[name].shape for name in own) or len(state) != len(own):
        filtered = _through_timm(state, model)
        if filtered is not None:
            came_from = {id(tensor): name for name, tensor in state.items()}
            resampled = sorted(name for name, tensor in filtered.items() if id(tensor) not in came_from)
            renamed = sorted(n for n, tensor in filtered.items() if came_from.get(id(tensor), n) != n)
            kept = {id(tensor) for tensor in filtered.values()}
            gone = [name for name, tensor in state.items() if id(tensor) not in kept and name not in resampled]
            dropped += [prefix + name for name in gone]
            state = filtered

    head, classes = _other_head(state, own)
    tracked = {name for name in own if name.endswith("num_batches_tracked")}  # absent in files of old versions
    missing = sorted(set(own) - set(state) - tracked)
    unexpected = sorted(set(state) - set(own))
    misfit = sorted(n for n in set(own) & set(state) - head if own[n].shape != state[n].shape)
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misfit))
        if names
    ]
    if problems:
        raise ValueError(f"does not fit {type(model).__name__}: of its {len(own)} tensors {'; '.join(problems)}")
    return (
        {name: tensor for name, tensor in state.items() if name not in head},
        Loaded(
            prefix=prefix,
            renamed=tuple(renamed),
            resampled=tuple(resampled),
            dropped=tuple(dropped),
            normalisation=found,
            new_head=tuple(sorted(head)),
            classes=classes,
        ),
    )


def _without_normalisation(
    state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """A pair of short vectors named as mean and standard deviation of one layer that the model does not have."""
    for name in state:
        parent, dot, last = name.rpartition(".")
        if last not in MEANS or name in own:
            continue
        other = next((parent + dot + std for std in STDS if parent + dot + std in state), None)
        if other is None or not 1 <= state[name].numel() == state[other].numel() <= 4:
            continue
        values = (tuple(state[name].flatten().tolist()), tuple(state[other].flatten().tolist()))
        return {key: tensor for key, tensor in state.items() if key not in (name, other)}, [name, other], values
    return state, [], None


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Cut off what all names start with and none of the model's does: ``module.``, ``model.``, ``1.``, also nested."""
    prefix, stripped = "", state
    while len({name.partition(".")[0] for name in stripped}) == 1 and all("." in name for name in stripped):
        first = next(iter(stripped)).partition(".")[0] + "."
        if any(name.startswith(first) for name in own):
            break
        prefix += first
        stripped = {name.removeprefix(first): tensor for name, tensor in stripped.items()}
    # Where nothing is met, the names in the file are what people can look for.
    return (stripped, prefix) if any(name in own for name in stripped) else (state, "")


def _through_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """What timm's own filter for this architecture makes of them; None where there is none, or it fails."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("timm.models."):
            filter_function = getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
            if filter_function is None:
                return None
            try:
                return filter_function(dict(state), model)
            except Exception:  # made for its own architecture; for another, the comparison of names says what is wrong
                return None
    return None


def _other_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[set[str], tuple[int, int] | None]:
    """Tensors named as a head that differ from the model's in the number of rows alone, all in the same way."""
    names = {
        name
        for name, tensor in state.items()
        if name in own and HEADS & set(name.split("."))
        if tensor.shape != own[name].shape and tensor.dim() and tensor.shape[1:] == own[name].shape[1:]
    }
    counts = {(state[name].shape[0], own[name].shape[0]) for name in names}
    return (names, counts.pop()) if len(counts) == 1 else (set(), None)


def _near(found: Sequence[Sequence[float]], used: Sequence[Sequence[float]]) -> bool:
    return all(
        len(a) == len(b) and all(abs(x - y) <= NEAR for x, y in zip(a, b, strict=True))
        for a, b in zip(found, used, strict=True)
    )


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{float(value):.4g}' for value in values)})"


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({_first(names)})"


def rows_named(tensors: Mapping[str, Tensor], key: str) -> int | None:
    """Rows of the tensor of that name, whatever stands before the name; None where there is none.

    timm's Swin called its ``head.fc`` plain ``head`` before version 0.9.
    """
    for wanted in (key, key.replace("head.fc.", "head.")):
        pattern = re.compile(rf"(^|\.){re.escape(wanted)}$")
        found = sorted((name for name in tensors if pattern.search(name)), key=len)
        if found and tensors[found[0]].dim() > 0:
            return tensors[found[0]].shape[0]
    return None


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's own of the same names, cast to their dtype."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
