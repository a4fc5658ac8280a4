"""What several files of this folder measure."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def trained_mnist_convnet() -> nn.Module:
    """The network of benchmarks/mnist_convnet.py with its weights, read once; copy it before changing it."""
    spec = importlib.util.spec_from_file_location("mnist_convnet", ROOT / "benchmarks" / "mnist_convnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MnistConvNet()
    model.load_state_dict(load_file(ROOT / "tests" / "fixtures" / "mnist_convnet.safetensors"))
    return model.eval()


@pytest.fixture
def mnist_convnet(trained_mnist_convnet: nn.Module) -> nn.Module:
    """A small network trained adversarially on MNIST digits (L-inf 0.3), float32, in eval mode; the test's own copy.

    Pixels of shape `[B, 3, 32, 32]` in [0, 1] to logits of shape `[B, 10]`. On the 1,000 test digits of
    `robust_peft.data.digits` it is right on 97.3 %, and on 89.1 % under PGD-50 at 0.3.
    """
    return copy.deepcopy(trained_mnist_convnet)
