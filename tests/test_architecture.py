"""Who may import whom inside `robust_peft`, read from the source without running it.

The rule: a room (a file or a folder right under the package) imports from lower levels only; rooms on one level do not
import each other; the files of one room may, without circles. Imports in functions and under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robust_peft"

LEVELS = {
    # Below level 0, so that rooms of level 0 can share them:
    "keyed_random": -1,  # random numbers keyed by sample: for random starts (threat) and augmentation (data) alike
    "pixel_units": -1,  # what "8/255" means: config checks it without torch, threat computes with it
    "config": 0,
    "files": 0,
    "threat": 0,
    "objectives": 0,
    "surgery": 0,
    "results": 0,
    "processes": 0,  # in no list of the design: which process this is and what it computes on, decided in one place
    "losses": 1,
    "attacks": 1,
    "adapters": 1,
    "models": 1,
    "data": 1,
    "plots": 1,
    "evaluation": 2,
    "training": 3,
    "presets": 4,
    "runs": 4,
    "studies": 5,
    "cli": 6,
}
FREE_OF_CONFIG = 1  # rooms up to this level take plain arguments
# `robust-peft --help` loads these, so they load nothing heavy; "" is the root, robust_peft/__init__.py.
LIGHT = {"", "cli", "config", "presets", "pixel_units", "files", "results"}
LIGHT_PACKAGES = {"tyro"}  # what they may load beside the standard library
HEAVY = {"torch", "torchvision", "timm", "peft", "transformers", "accelerate", "numpy", "matplotlib", "datasets"}
OUTSIDE = {"recipes", "benchmarks", "tests", "docs"}
SHAPELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One import statement's target, e.g. "torch.nn", "robust_peft.attacks.pgd"; a module as far as it is one."""

    target: str
    line: int
    loads: bool  # executed when the module is imported


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name below the package ("" for the root, "attacks", "attacks.pgd") -> file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def nodes_of(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is imported."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, True)]
    while waiting:
        node, loads = waiting.pop()
        yield node, loads
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += [(child, False) for child in node.body]
            waiting += [(child, loads) for child in node.orelse]
            continue
        inside = loads and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        waiting += [(child, inside) for child in ast.iter_child_nodes(node)]


def imports_of(module: str, path: Path, package: str, modules: dict[str, Path]) -> Iterator[Import]:
    """All imports of one file, relative ones made absolute."""
    here = [package, *filter(None, module.split("."))]
    if path.name != "__init__.py":
        here = here[:-1]
    for node, loads in nodes_of(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, loads)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for name in node.names:
                whole = f"{source}.{name.name}"
                inner = whole.removeprefix(f"{package}.")
                submodule = source == package or inner in modules
                yield Import(whole if submodule else source, node.lineno, loads)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, loads)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, its first one repeated at the end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if circle := visit(other, [*trail, name]):
                return circle
        done.add(name)
        return []

    for start in sorted(graph):
        if circle := visit(start, []):
            return circle
    return []


def violations(package: Path) -> list[str]:
    """One sentence for each breach of the rules in the package at that path."""
    modules = modules_of(package)
    found = []
    graphs: dict[str, dict[str, set[str]]] = {}  # room -> module -> modules of the same room that it imports

    for module, path in modules.items():
        room = module.split(".")[0]
        where = path.relative_to(package).as_posix()
        for part in path.relative_to(package).with_suffix("").parts:
            if part.strip("_").lower() in SHAPELESS:
                found.append(f"{where}: {part} says nothing about what is in it; name it after that.")
        if room and room not in LEVELS:
            found.append(f"{where}: the room {room} is not listed; give it a level.")
            continue
        graph = graphs.setdefault(room, {})
        graph.setdefault(module, set())

        for wanted in imports_of(module, path, package.name, modules):
            at = f"{where}:{wanted.line}"
            top, _, inner = wanted.target.partition(".")
            if top != package.name:
                if top == "matplotlib" and room != "plots":
                    found.append(f"{at}: matplotlib is imported in plots only.")
                if top in OUTSIDE:
                    found.append(f"{at}: the package imports nothing from {top}.")
                light = top in sys.stdlib_module_names or top in LIGHT_PACKAGES
                if room in LIGHT and wanted.loads and not light:
                    found.append(f"{at}: {top} is loaded by `robust-peft --help`; import it where it is used.")
                continue

            other = inner.split(".")[0]
            if room in LIGHT and wanted.loads and other not in LIGHT:
                found.append(f"{at}: {other} is loaded by `robust-peft --help`; import it where it is used.")
            if room == "" or wanted.target == f"{package.name}.__version__":
                continue  # the root hands every room on; its version is its own
            if other not in LEVELS:
                found.append(f"{at}: {wanted.target} is taken from the root; import it from the room that holds it.")
            elif other == room:
                graph[module].add(inner)
            elif LEVELS[other] == LEVELS[room]:
                found.append(f"{at}: {room} and {other} are on one level and do not import each other.")
            elif LEVELS[other] > LEVELS[room]:
                found.append(f"{at}: {room} (level {LEVELS[room]}) imports {other} (level {LEVELS[other]}) above it.")
            elif other == "config" and LEVELS[room] <= FREE_OF_CONFIG:
                found.append(f"{at}: {room} takes plain arguments, never a config.")

    for room, graph in graphs.items():
        if circle := find_circle(graph):
            found.append(f"{room}: a circle of imports: {' -> '.join(circle)}.")
    return found


def test_package_keeps_the_rules() -> None:
    assert len(modules_of(PACKAGE)) > 20  # it looked at the real thing
    assert violations(PACKAGE) == []


def test_recipes_are_no_package() -> None:
    assert not list((ROOT / "recipes").rglob("__init__.py"))


def test_light_rooms_load_nothing_heavy() -> None:
    """The same as above by running it: also what comes by way of other packages."""
    names = [f"robust_peft.{room}".rstrip(".") for room in sorted(LIGHT)]
    present = [name for name in names if importlib.util.find_spec(name)]
    assert len(present) > 3
    code = f"import sys, {', '.join(present)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# The checker itself: each tree is a package with one fault, and the sentence that must name it.
FAULTS = {
    "upward": ({"threat.py": "from robust_peft.attacks import PGD"}, "imports attacks (level 1) above it"),
    "upward, from the root": ({"surgery.py": "from robust_peft import runs"}, "imports runs (level 4) above it"),
    "upward, whole name": ({"surgery.py": "import robust_peft.runs"}, "imports runs (level 4) above it"),
    "upward, relative": ({"models/zoo.py": "from ..training import Trainer"}, "imports training (level 3) above it"),
    "upward, in a function": ({"threat.py": "def f():\n    from robust_peft import cli"}, "imports cli (level 6)"),
    "upward, for types": (
        {"threat.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from robust_peft.runs import run"},
        "imports runs (level 4) above it",
    ),
    "upward, by name": (
        {"threat.py": "import importlib\nimportlib.import_module('robust_peft.runs')"},
        "imports runs (level 4) above it",
    ),
    "same level": ({"objectives.py": "from .threat import ThreatModel"}, "objectives and threat are on one level"),
    "same level, folders": ({"models/zoo.py": "from robust_peft import data"}, "models and data are on one level"),
    "presets and runs": ({"runs.py": "from robust_peft.presets import get_preset"}, "runs and presets are on one"),
    "root, lazy name": ({"training/step.py": "from robust_peft import Trainer"}, "is taken from the root"),
    "root, relative": ({"training/step.py": "from .. import Trainer"}, "is taken from the root"),
    "root, everything": ({"training/step.py": "from robust_peft import *"}, "is taken from the root"),
    "root, whole": ({"training/step.py": "import robust_peft as rp"}, "is taken from the root"),
    "unknown room": ({"magic.py": ""}, "the room magic is not listed"),
    "unknown folder": ({"magic/wand.py": ""}, "the room magic is not listed"),
    "matplotlib": ({"studies/fronts.py": "def f():\n    import matplotlib.pyplot as plt"}, "in plots only"),
    "config below": ({"attacks/pgd.py": "from robust_peft.config import AttackConfig"}, "never a config"),
    "outside": ({"studies/fronts.py": "import recipes.quickstart"}, "nothing from recipes"),
    "shapeless file": ({"data/utils.py": ""}, "says nothing"),
    "shapeless file, private": ({"data/_helpers.py": ""}, "says nothing"),
    "shapeless folder": ({"data/common/io.py": ""}, "says nothing"),
    "circle": (
        {"attacks/a.py": "from . import b", "attacks/b.py": "def f():\n    from robust_peft.attacks.a import x"},
        "a circle of imports: attacks.a -> attacks.b -> attacks.a",
    ),
    "circle by the folder": (
        {"attacks/__init__.py": "from .a import x", "attacks/a.py": "from robust_peft.attacks import y"},
        "a circle of imports: attacks -> attacks.a -> attacks",
    ),
    "heavy package": ({"cli.py": "import torch"}, "torch is loaded by `robust-peft --help`"),
    "heavy package, guarded": (
        {"results.py": "try:\n    import numpy\nexcept ImportError:\n    pass"},
        "numpy is loaded by",
    ),
    "heavy package, class body": ({"config.py": "class A:\n    import torch"}, "torch is loaded by"),
    "heavy room": ({"cli.py": "from robust_peft.runs import run"}, "runs is loaded by `robust-peft --help`"),
    "heavy root": ({"__init__.py": "from robust_peft.threat import ThreatModel"}, "threat is loaded by"),
}


def make_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "robust_peft"
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent != package and not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").touch()
    return package


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_finds(fault: str, tmp_path: Path) -> None:
    files, sentence = FAULTS[fault]
    found = violations(make_package(tmp_path, files))
    assert found and all(sentence in one for one in found), found


def test_checker_accepts_what_is_allowed(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from typing import TYPE_CHECKING\n__version__ = '1'\nif TYPE_CHECKING:\n"
        "    from robust_peft.threat import ThreatModel",
        "threat.py": "import torch\nfrom robust_peft import keyed_random\nfrom robust_peft.pixel_units import NORMS",
        "config.py": "import dataclasses\nfrom . import pixel_units",
        "attacks/__init__.py": "from .pgd import PGD\nfrom robust_peft.attacks.suite import make_attack",
        "attacks/suite.py": "from robust_peft.attacks.pgd import PGD\nfrom robust_peft import threat",
        "attacks/pgd.py": "import robust_peft.threat",
        "training/step.py": "from robust_peft.attacks import PGD\nfrom robust_peft.config import RunConfig",
        "plots.py": "import matplotlib",
        "runs.py": "from robust_peft import __version__, surgery as s\nfrom robust_peft.training import Trainer",
        "cli.py": "import tyro\nfrom robust_peft.presets import PRESETS\n"
        "def main():\n    import torch\n    from robust_peft.runs import run",
    }
    assert violations(make_package(tmp_path, files)) == []
