"""For every test: nothing is asked of a network. And what tests of several rooms share."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

# Before any library of the Hub is imported, which read them then.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def layouts() -> ModuleType:
    """The builders of tests/data/official_layouts.py."""
    path = Path(__file__).parent / "data" / "official_layouts.py"
    spec = importlib.util.spec_from_file_location("official_layouts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """Tiny models are so small that more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
