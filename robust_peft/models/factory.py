"""Backbones that a user's own Python file builds: ``path/to/module.py:factory``.

The file is executed, because its owner names it for just that; nothing here is used for files that were downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

SHAPE = "path/to/module.py:factory"

# What factory files imported from their own folders: name -> folder and module.
_neighbours: dict[str, tuple[Path, ModuleType]] = {}


def split_name(name: str) -> tuple[Path, str] | None:
    """The file and the name of the factory in it; None where ``name`` is no Python file.

    The last colon parts them, since there may be one behind a drive letter.

    Raises:
        ValueError: For a Python file without the name of a factory.
    """
    path, _, factory = name.rpartition(":")
    if path.lower().endswith(".py") and factory:
        return Path(path), factory
    if name.lower().endswith((".py", ".py:")):
        raise ValueError(f"Name the function that builds the model too, as {SHAPE}. Found {name!r}.")
    return None


def build_module(path: Path, factory: str, options: dict[str, Any]) -> nn.Module:
    """Execute a Python file and call its factory.

    While the file and the factory run, imports find the file's neighbours first, as for ``python FILE``.

    Args:
        path: The file.
        factory: Name of a function in it, or of a subclass of nn.Module.
        options: Keyword arguments. Those that the factory's signature has are taken out of it and handed on; one that
            is None only where the signature has no default for it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or the factory fails (the error is its cause), there is no such name, it cannot be
            called, or what it returns is no nn.Module.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist.")
    shown = f"{path}:{factory}"
    with _neighbours_first(path.resolve().parent):
        module = _execute(path)
        found = getattr(module, factory, None)
        if found is None:
            names = [name for name, value in vars(module).items() if _is_own_callable(value, module)]
            there = f"It defines {', '.join(names)}." if names else "It defines no function and no class."
            raise ValueError(f"{path} has no {factory!r}. {there}")
        if isinstance(found, nn.Module) or not callable(found):
            raise ValueError(
                f"{shown} should be a function that builds and returns the model. Found {type(found).__name__}."
            )
        arguments = _taken(found, options)
        try:
            built = found(**arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{shown} failed: {_described(error)}.") from error
    if not isinstance(built, nn.Module):
        raise ValueError(f"{shown} should return an nn.Module. Found {type(built).__name__}.")
    return built


def _execute(path: Path) -> ModuleType:
    """The file as a module, executed anew at each call and without leaving compiled files beside it."""
    # A name of its own, since dataclasses and torch.compile look up the module of what they work on.
    module = ModuleType(f"_factory_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a script without a main guard may end in sys.exit()
        del sys.modules[module.__name__]
        raise ValueError(f"{path} cannot be executed: {_described(error)}.") from error
    return module


@contextmanager
def _neighbours_first(folder: Path) -> Iterator[None]:
    """Imports look into the folder first; the caller's search path is restored.

    Two folders may each have a ``network.py``: what an earlier factory file imported from another folder makes way.
    """
    for name, (home, module) in list(_neighbours.items()):
        if home != folder:
            del _neighbours[name]
            if sys.modules.get(name) is module:
                del sys.modules[name]
    modules_before, path_before = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # a neighbour may be younger than the folder's listing
    try:
        yield
    finally:
        sys.path[:] = path_before
        for name in set(sys.modules) - modules_before:
            top = name.partition(".")[0]
            if top not in modules_before and _lies_in(sys.modules.get(top), folder):
                _neighbours[name] = folder, sys.modules[name]


def _lies_in(module: ModuleType | None, folder: Path) -> bool:
    """Whether a module is a file right in the folder, or a package's folder is."""
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return any(place is not None and Path(place).parent == folder for place in places)


def _taken(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables written in C do not tell
        return {}
    taken = {}
    for name in [name for name in options if name in parameters]:
        value = options.pop(name)
        if value is not None or parameters[name].default is inspect.Parameter.empty:
            taken[name] = value
    return taken


def _is_own_callable(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _described(error: BaseException) -> str:
    """Kind and first line of an error, without a full stop."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}".rstrip(".")
