"""Weights from files into models: safetensors or torch's format, and nothing of a file is ever executed."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from robust_peft.models.layouts import Loaded, arrange, copy_into, rows_named, unwrap

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # of files with weights

LONGEST_HEADER = 100_000_000  # bytes; safetensors allows no more

# Plain values that training scripts save beside the weights; none of them does anything when it is built.
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),  # as numpy 1 called it
]

# What every state dict in the old format names.
_OF_TENSORS = re.compile(r"torch\._utils\._rebuild_|torch\.\w*Storage$|collections\.OrderedDict$")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights that a file holds, by the names that it gives them, on the CPU.

    Of several sets of weights, the averaged one (EMA) is taken: it is what papers report.

    Args:
        path: safetensors, or what torch.save wrote; told apart by what is in it, not by its name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights (an HTML page, a truncated file, an optimizer's state), or anything but
            tensors and plain values: such a file is refused, nothing of it executed.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    refuse_foreign(path)
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, which may have a pickle's first byte in it.
    headed = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER
    if not headed and start.startswith((b"PK\x03\x04", b"\x80")):
        content = _from_torch(path, zipped=start.startswith(b"PK"))
    elif headed or path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no readable safetensors file: truncated, damaged or something else ({error})."
            ) from error
    else:
        raise ValueError(
            f"{path} is neither a safetensors file nor one that torch.save wrote. It begins with {start!r}."
        )
    try:
        return unwrap(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from error


def refuse_foreign(path: Path) -> None:
    """ValueError for what is often found under a name that promises weights: nothing at all, or a web page."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); the download was cut off.")
    with path.open("rb") as file:
        start = file.read(4096)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        title = re.search(r"<title[^>]*>\s*([^<]*?)\s*<", start.decode("utf-8", "replace"), re.IGNORECASE)
        named = f' titled "{" ".join(title.group(1).split())}"' if title and title.group(1) else ""
        raise ValueError(
            f"{path} is an HTML page{named} of {size} bytes, not weights: sites that share files answer so when they "
            "want a confirmation, or the file is gone. Fetch it in a browser."
        )
    if start.startswith(b"version https://git-lfs.github.com"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")


def _from_torch(path: Path, *, zipped: bool) -> Any:
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is truncated or damaged: a zip archive without its end ({path.stat().st_size} bytes)."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            if path.suffix == ".safetensors":  # misnamed; torch would believe the name
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            # Mapped, not read: a head is looked up and weights are copied without a second copy in memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except UnpicklingError as error:
        raise ValueError(f"{path} {_refused(path, zipped)}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated, damaged or not written by torch.save ({first_line}).") from error


def _refused(path: Path, zipped: bool) -> str:
    """Why a pickle is not read, from what it names; it is taken apart, not executed."""
    if zipped:
        with torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    else:
        names = [name for name in _named_in_pickles(path) if not _OF_TENSORS.match(name)]
    modules = [name for name in names if name.startswith(("torch.nn.modules.", "timm.models.", "torchvision.models."))]
    shown = modules or names
    listed = f"{', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''}"
    if modules:
        return (
            f"is a whole pickled model ({listed}), which could only be read by executing it: refused. Save its weights "
            "where it came from: torch.save(model.state_dict(), PATH)."
        )
    if not names:
        return "is no pickle of plain tensors, or damaged: refused, nothing of it was executed."
    return (
        f"holds more than tensors and plain values ({listed}), which could execute code when read: refused, nothing of "
        "it was executed. Save the state_dict alone where it came from."
    )


def _named_in_pickles(path: Path) -> list[str]:
    """Functions and classes that the pickles at the start of a file name, by reading its operations."""
    names: dict[str, None] = {}
    with path.open("rb") as file:
        try:
            while True:
                strings: list[str] = []
                for operation, argument, _ in pickletools.genops(file):
                    if operation.name == "GLOBAL":
                        names[str(argument).replace(" ", ".")] = None
                    elif operation.name == "STACK_GLOBAL":
                        names[".".join(strings[-2:])] = None
                    elif isinstance(argument, str):
                        strings.append(argument)
        except Exception:  # the end of the pickles: what follows are tensors, or the file is damaged
            return list(names)


def rows_of(path: str | Path, key: str) -> int | None:
    """How many rows a file's tensor of that name has, prefixes aside: a head's class count.

    None where it is absent, or the file cannot be read: load_weights says so.
    """
    try:
        return rows_named(read_tensors(path), key)
    except (ValueError, FileNotFoundError):
        return None


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


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Loaded:
    """Copy a file's weights into a model of the same architecture.

    Wrappers (``state_dict``, ``model``, ...; averaged weights first), prefixes (``module.``, ``model.``, ``1.``, ...),
    normalisation layers, masks and counters are taken off; timm's own filter renames and resamples what older versions
    of timm wrote, or what belongs to another image size. A classifier head of another class count keeps the model's
    own weights, which is logged as a warning. Everything else has to fit.

    Args:
        model: Where to; weights are cast to its dtype. It is changed as a whole or not at all.
        path: safetensors, or a state dict by torch.save (.pth, .pt, .bin); see `read_tensors`.
        mean: Mean of the normalisation in front of the model, compared with one in the file. None: not compared.
        std: Its standard deviation, likewise.

    Returns:
        What was taken off, renamed or left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights, or keys or shapes differ (they are counted, the first few named), or its
            own normalisation is another one.
    """
    path = Path(path)
    tensors, wrapper, passed_over = _read(path)
    try:
        fitting, loaded = arrange(tensors, model, mean=mean, std=std)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from error
    copy_into(model, fitting)
    loaded = replace(loaded, wrapper=wrapper, passed_over=passed_over)
    _tell(path, loaded)
    return loaded


def _tell(path: Path, loaded: Loaded) -> None:
    """Log what people have to know, once where several processes load the same."""
    notice = loaded.notice()
    if notice is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger("robust_peft").warning("%s: %s.", path, notice)
