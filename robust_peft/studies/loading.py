"""A study from a file or by its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from robust_peft.studies.study import Study


def load_study(source: str | Path, scale: str | None = None) -> Study:
    """The study that a Python file or a built-in name stands for. The file is executed.

    Args:
        source: A file that ends with ``study = Study(...)`` or ``def study(scale) -> Study``, or the name of a study
            that comes with the package (`built_in_studies`).
        scale: What the function is called with; None: its default.

    Raises:
        FileNotFoundError: If there is no such file or name; lists the names.
        ValueError: If the file fails, holds no study, or the scale does not go with it.
    """
    name = str(source)
    if name in built_in_studies():
        module = importlib.import_module(f"robust_peft.studies.{name.replace('/', '.')}")
    else:
        module = _execute(Path(source))
    if not hasattr(module, "study"):
        raise ValueError(f"{name} should end with study = Study(...), or a function study(scale). Found neither.")
    found: Any = module.study
    if callable(found):
        found = _call(found, name, scale)
    elif scale is not None:
        raise ValueError(f"{name} holds one study and takes no scale. Found scale = {scale!r}.")
    if not isinstance(found, Study):
        raise ValueError(f"study in {name} should be a Study. Found {type(found).__name__}.")
    return found


def built_in_studies() -> list[str]:
    """Names of the studies that come with the package, e.g. "paper/fig4"."""
    here = Path(__file__).parent
    found = [
        path.relative_to(here).with_suffix("").as_posix()
        for path in here.glob("*/*.py")
        if re.search(r"^def study\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        known = ", ".join(built_in_studies()) or "(none)"
        raise FileNotFoundError(
            f"{path} does not exist. A study is a Python file, or one that comes with the package: {known}."
        )
    if path.suffix != ".py":
        raise ValueError(f"A study should be a Python file. Found {path}.")
    module = ModuleType(f"robust_peft_study_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # for what looks a class up by the name of its module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # what lies beside the file can be imported, as if Python ran it
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"{path}{_line_of(error, path)}: {_said(error)}") from error
    return module


def _call(function: Any, name: str, scale: str | None) -> Any:
    parameters = list(inspect.signature(function).parameters.values())
    if scale is None and any(parameter.default is parameter.empty for parameter in parameters):
        raise ValueError(f"{name} comes in several scales; name one as --scale.")
    if scale is not None and not parameters:
        raise ValueError(f"study() in {name} takes no scale. Found scale = {scale!r}.")
    try:
        return function() if scale is None else function(scale)
    except Exception as error:
        if name in built_in_studies():
            raise
        raise ValueError(f"{name}{_line_of(error, Path(name))}: {_said(error)}") from error


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}" if error.filename == str(path) else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    return str(error) if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: {error}"
