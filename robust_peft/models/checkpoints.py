"""Weights from files into models: safetensors alone, so nothing of a file is ever executed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn


def rows_of(path: str | Path, key: str) -> int | None:
    """How many rows a safetensors file's tensor of that name has: a head's class count. None where it is absent."""
    if not Path(path).is_file():
        return None  # load_weights says so
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(key).get_shape()[0] if key in file.keys() else None
    except SafetensorError:
        return None  # likewise


def fingerprint_of_all(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every parameter and buffer, also of those that are not saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module, *, leave_out: str) -> str:
    """SHA-256 over names and bytes of a model's weights, without the submodule of that name (a head to be trained)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(f"{leave_out}."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy a safetensors file's weights into a model of the same architecture.

    A classifier head of another class count keeps its random weights; everything else has to fit.

    Args:
        model: Where to; weights are cast to its dtype.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or keys or shapes differ: they are counted, the first few named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}).") from error
    own = model.state_dict()
    # Two tensors of the right name and the wrong number of rows are a head for other classes.
    other_head = {
        key
        for key, tensor in found.items()
        if key in own and ("head" in key or "classifier" in key or key.startswith("fc"))
        if tensor.shape != own[key].shape and tensor.shape[1:] == own[key].shape[1:]
    }
    missing = sorted(set(own) - set(found))
    unexpected = sorted(set(found) - set(own))
    misfit = sorted(k for k in set(own) & set(found) - other_head if own[k].shape != found[k].shape)
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misfit))
        if keys
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: of its {len(own)} tensors {'; '.join(problems)}."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            if key not in other_head:
                tensor.copy_(found[key])
