"""Makes the builders importable, and keeps the tiny models on one thread, where threads only cost."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass
