"""Weights from files: what fits is copied whole, what does not is named, and nothing is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_peft.models.checkpoints import load_weights


def network(classes: int = 4, *, width: int = 6, depth: int = 2, seed: int = 0, head: str = "head") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {f"block{i}": nn.Linear(width, width) for i in range(depth)}
        return nn.ModuleDict({**layers, "norm": nn.BatchNorm1d(width), head: nn.Linear(width, classes)})


def save(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert before
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("as_text", [False, True])
def test_what_fits_is_copied(tmp_path: Path, as_text: bool) -> None:
    source, target = network(), network(seed=1)
    source["norm"].running_mean.fill_(3)  # buffers as well
    path = save(source, tmp_path / "weights.safetensors")
    parameters = list(target.parameters())
    load_weights(target, str(path) if as_text else path)
    assert_unchanged(target, copy_of(source))
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))  # copied into, not replaced
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_weights_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    source, target = network().double(), network(seed=1)
    load_weights(target, save(source, tmp_path / "weights.safetensors"))
    assert target["head"].weight.dtype == torch.float32
    assert torch.equal(target["head"].weight, source["head"].weight.float())


@pytest.mark.parametrize("head", ["head", "classifier", "fc"])
@pytest.mark.parametrize("classes", [2, 9])
def test_head_of_another_class_count_keeps_its_own_weights(tmp_path: Path, head: str, classes: int) -> None:
    source, target = network(4, head=head), network(classes, seed=1, head=head)
    own = copy_of(target)
    load_weights(target, save(source, tmp_path / "weights.safetensors"))
    copied = 0
    for key, tensor in target.state_dict().items():
        expected = own[key] if key.startswith(head) else source.state_dict()[key]
        assert torch.equal(tensor, expected), key
        copied += not key.startswith(head)
    assert copied == 9  # two layers, and BatchNorm with its buffers


def test_head_of_another_width_is_a_misfit(tmp_path: Path) -> None:
    path = save(nn.ModuleDict({"head": nn.Linear(5, 4)}), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape \(head.weight\)"):
        load_weights(nn.ModuleDict({"head": nn.Linear(6, 4)}), path)


def test_missing_keys_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = save(network(depth=2), tmp_path / "weights.safetensors")
    target = network(depth=4, seed=1)
    before = copy_of(target)
    with pytest.raises(ValueError) as error:
        load_weights(target, path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert "4 missing (block2.bias, block2.weight, block3.bias, ...)" in message
    assert "unexpected" not in message and "another shape" not in message
    assert_unchanged(target, before)  # all or nothing


def test_unexpected_keys_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = save(network(depth=3), tmp_path / "weights.safetensors")
    target = network(depth=2, seed=1)
    before = copy_of(target)
    with pytest.raises(ValueError, match=r"2 unexpected \(block2.bias, block2.weight\)"):
        load_weights(target, path)
    assert_unchanged(target, before)


def test_misfits_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = save(network(width=8), tmp_path / "weights.safetensors")
    target = network(width=6, seed=1)
    before = copy_of(target)
    # Four of the layers, four of BatchNorm and the head's weight; the head's bias has one entry for each class.
    with pytest.raises(ValueError, match=r"9 of another shape \(block0.bias, block0.weight, block1.bias, \.\.\.\)"):
        load_weights(target, path)
    assert_unchanged(target, before)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = save(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError) as error:
        load_weights(nn.ModuleDict({"a": nn.Linear(3, 2), "c": nn.Linear(2, 2)}), path)
    message = str(error.value)
    for part in ("2 missing (c.bias, c.weight)", "2 unexpected (b.bias, b.weight)", "1 of another shape (a.weight)"):
        assert part in message
    assert "of its 4 tensors" in message


@pytest.mark.parametrize("as_folder", [False, True])
def test_missing_file(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path / "weights.safetensors"
    if as_folder:
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="weights.safetensors does not exist"):
        load_weights(network(), path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, "truncated"])
def test_file_that_is_no_safetensors(tmp_path: Path, content: bytes | str) -> None:
    path = save(network(), tmp_path / "weights.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    target = network(seed=1)
    before = copy_of(target)
    with pytest.raises(ValueError, match="is no readable safetensors file") as error:
        load_weights(target, path)
    assert str(path) in str(error.value)
    assert_unchanged(target, before)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickle_is_refused_and_not_executed(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "executed"
    content = {"weight": torch.zeros(2), "bomb": Bomb(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        load_weights(network(), path)
    assert not trace.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have gone off
