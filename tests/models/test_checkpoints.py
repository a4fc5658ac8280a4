"""Weights from files: what fits is copied whole, what does not is named, and nothing is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_peft.models.checkpoints import load_weights, read_tensors, rows_of
from robust_peft.models.layouts import Loaded


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


def refusal(path: Path, target: nn.Module | None = None) -> str:
    """The one line with which a file is refused; the model is as it was."""
    target = network(seed=1) if target is None else target
    before = copy_of(target)
    with pytest.raises(ValueError) as error:
        load_weights(target, path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert_unchanged(target, before)
    return message


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def torch_saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# What a name promises and the file does not hold


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    assert "is empty (0 bytes)" in refusal(written(tmp_path / f"weights{suffix}", b""))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("start", [b"<!DOCTYPE html>\n", b"\xef\xbb\xbf \n<html>", b"<?xml version='1.0'?>"])
def test_web_page(tmp_path: Path, suffix: str, start: bytes) -> None:
    page = start + b"<head><title>Google Drive -\n Virus scan warning</title></head><body>Confirm</body></html>"
    message = refusal(written(tmp_path / f"weights{suffix}", page))
    assert f'an HTML page titled "Google Drive - Virus scan warning" of {len(page)} bytes, not weights' in message


def test_pointer_of_git_lfs(tmp_path: Path) -> None:
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    assert "is a pointer of Git LFS" in refusal(written(tmp_path / "weights.pth", content))


@pytest.mark.parametrize("content", [b"junk", b"\xff" * 100, b"\x1f\x8b\x08" + bytes(50)])
def test_junk(tmp_path: Path, content: bytes) -> None:
    assert "is neither a safetensors file nor one that torch.save wrote" in refusal(
        written(tmp_path / "w.pth", content)
    )
    assert "is no readable safetensors file" in refusal(written(tmp_path / "w.safetensors", content))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save(network(), path)
    else:
        torch_saved(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    message = refusal(written(path, whole[: max(int(len(whole) * share), 12)]))
    assert "truncated" in message or "damaged" in message


def test_other_zip_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "truncated, damaged or not written by torch.save" in refusal(tmp_path / "weights.pth")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch", "torch, old format"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, writer: str, suffix: str) -> None:
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "executed"
    content = {**network().state_dict(), "bomb": Bomb(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"bomb": Bomb(trace)}))
    else:
        torch_saved(content, path, _use_new_zipfile_serialization=writer == "torch")
    message = refusal(path)
    assert "posix.mkdir" in message and "refused, nothing of it was executed" in message
    assert not trace.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have gone off


@pytest.mark.parametrize("new_format", [True, False])
def test_whole_pickled_model(tmp_path: Path, new_format: bool) -> None:
    path = torch_saved(nn.Linear(2, 2), tmp_path / "model.pth", _use_new_zipfile_serialization=new_format)
    message = refusal(path)
    assert "is a whole pickled model (torch.nn.modules.linear.Linear)" in message
    assert "torch.save(model.state_dict(), PATH)" in message


def test_optimizer_alone(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    path = torch_saved(optimizer.state_dict(), tmp_path / "a.pth")
    assert "holds no weights; its entries are state, param_groups" in refusal(path)
    path = torch_saved({"optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "b.pth")
    assert "holds no weights; its entries are optimizer, epoch" in refusal(path)


@pytest.mark.parametrize(("content", "kind"), [([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), (3, "int")])
def test_something_else(tmp_path: Path, content: Any, kind: str) -> None:
    assert f"holds a {kind}, where names and tensors should be" in refusal(torch_saved(content, tmp_path / "w.pth"))


# Foreign layouts


def test_safetensors_that_begins_like_a_pickle(tmp_path: Path) -> None:
    """Its first byte is the lowest of its header's length, which a long enough name brings to 0x80."""
    for length in range(400):
        path = tmp_path / "w.pth"  # under any name
        save_file({"x" * (length + 1): torch.ones(2)}, path)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert [tensor.tolist() for tensor in read_tensors(path).values()] == [[1, 1]]


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_files_of_torch(tmp_path: Path, suffix: str, new_format: bool) -> None:
    source, target = network(), network(seed=1)
    path = torch_saved(source.state_dict(), tmp_path / f"w{suffix}", _use_new_zipfile_serialization=new_format)
    loaded = load_weights(target, path)
    assert_unchanged(target, copy_of(source))
    assert loaded == Loaded() and loaded.notice() is None


def test_plain_values_beside_the_weights(tmp_path: Path) -> None:
    """What training scripts keep: arguments, numpy's numbers, the epoch."""
    source, target = network(), network(seed=1)
    content = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "epoch": 3,
        "model": source.state_dict(),
        "optimizer": torch.optim.SGD(source.parameters(), lr=0.1).state_dict(),
    }
    loaded = load_weights(target, torch_saved(content, tmp_path / "w.pth"))
    assert_unchanged(target, copy_of(source))
    assert loaded.wrapper == ("model",) and loaded.notice() is None


@pytest.mark.parametrize("names", [("state_dict",), ("model",), ("model", "state_dict"), ("net",)])
def test_wrapped(tmp_path: Path, names: tuple[str, ...]) -> None:
    source, target = network(), network(seed=1)
    content: Any = source.state_dict()
    for name in reversed(names):
        content = {"epoch": 1, name: content}
    assert load_weights(target, torch_saved(content, tmp_path / "w.pth")).wrapper == names
    assert_unchanged(target, copy_of(source))


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_averaged_weights_come_first_and_that_is_said(tmp_path: Path, average: str, caplog: Any) -> None:
    source, raw, target = network(), network(seed=2), network(seed=1)
    content = {"state_dict": raw.state_dict(), average: source.state_dict()}
    path = torch_saved(content, tmp_path / "w.pth")
    loaded = load_weights(target, path)
    assert_unchanged(target, copy_of(source))
    assert loaded.wrapper == (average,) and loaded.passed_over == ("state_dict",)
    assert caplog.messages == [f"{path}: the weights are its {average}, not state_dict."]
    torch_saved({"state_dict": raw.state_dict(), average: None}, path)
    assert load_weights(target, path).wrapper == ("state_dict",)
    assert_unchanged(target, copy_of(raw))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "1.", "_orig_mod.", "module.model.", "_orig_mod.module.1."]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixed(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    source, target = network(), network(seed=1)
    content: Any = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    loaded = load_weights(target, torch_saved({"state_dict": content} if wrapped else content, tmp_path / "w.pth"))
    assert_unchanged(target, copy_of(source))
    assert loaded.prefix == prefix


def test_prefix_of_the_models_own_stays(tmp_path: Path) -> None:
    source, target = nn.ModuleDict({"model": network()}), nn.ModuleDict({"model": network(seed=1)})
    assert load_weights(target, save(source, tmp_path / "w.safetensors")).prefix == ""
    assert_unchanged(target, copy_of(source))
    content = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    assert load_weights(target, torch_saved(content, tmp_path / "w.pth")).prefix == "module."


def test_misfit_names_keys_as_the_file_has_them(tmp_path: Path) -> None:
    content = {f"module.other{i}.weight": torch.zeros(2) for i in range(4)}
    message = refusal(torch_saved(content, tmp_path / "w.pth"))
    assert "4 unexpected (module.other0.weight, module.other1.weight, module.other2.weight, ...)" in message


def test_bookkeeping(tmp_path: Path) -> None:
    source, target = network(), network(seed=1)
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    state |= {"n_averaged": torch.tensor(3), "module.extra.num_batches_tracked": torch.tensor(7)}
    del state["module.norm.num_batches_tracked"]  # files of old versions have none
    loaded = load_weights(target, torch_saved(state, tmp_path / "w.pth"))
    assert loaded.dropped == ("n_averaged", "module.extra.num_batches_tracked")
    assert_unchanged(target, copy_of(source))  # no batch was seen by either


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.mark.parametrize(
    ("mean", "std", "prefix"),
    [
        ("normalize.mean", "normalize.std", "model."),
        ("0.mean", "0.std", "1."),
        ("module.0.mean", "module.0.std", "module.1."),
        ("mu", "sigma", "model."),
        ("mean", "std", ""),
        ("module.normalizer.new_mean", "module.normalizer.new_std", "module.model."),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1)])
def test_normalisation_inside(tmp_path: Path, mean: str, std: str, prefix: str, shape: tuple[int, ...]) -> None:
    source, target = network(), network(seed=1)
    state = {mean: torch.tensor(MEAN).reshape(shape), std: torch.tensor(STD).reshape(shape)}
    state |= {prefix + name: tensor for name, tensor in source.state_dict().items()}
    path = torch_saved(state, tmp_path / "w.pth")
    loaded = load_weights(target, path, mean=MEAN, std=[value + 1e-4 for value in STD])  # as if rounded
    assert_unchanged(target, copy_of(source))
    assert loaded.dropped == (mean, std) and loaded.prefix == prefix
    assert loaded.normalisation is not None and loaded.normalisation[0] == pytest.approx(MEAN)
    assert load_weights(target, path).normalisation == loaded.normalisation  # nothing to compare with

    before = copy_of(target)
    for wrong in (dict(mean=(0.5, 0.4, 0.31), std=STD), dict(mean=(0.0,), std=(1.0,))):
        with pytest.raises(ValueError) as error:
            load_weights(target, path, **wrong)
        message = str(error.value)
        assert "normalises by mean = (0.5, 0.4, 0.3), std = (0.2, 0.25, 0.3) itself" in message
        assert f"the backbone would by mean = ({', '.join(f'{v:.4g}' for v in wrong['mean'])})" in message
        assert "Give the file's as mean= and std=" in message and "\n" not in message
    assert_unchanged(target, before)


def test_normalisation_that_the_model_has_itself_is_weights(tmp_path: Path) -> None:
    def build(value: float) -> nn.Module:
        model = network()
        model.register_buffer("mean", torch.full((3,), value))
        model.register_buffer("std", torch.full((3,), value + 1))
        return model

    target = build(0.0)
    loaded = load_weights(target, save(build(0.5), tmp_path / "w.safetensors"), mean=(0, 0, 0), std=(1, 1, 1))
    assert loaded.normalisation is None and target.mean.tolist() == [0.5] * 3


def test_head_of_another_class_count_is_said(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(network(4), tmp_path / "weights.safetensors")
    loaded = load_weights(network(9, seed=1), path)
    assert loaded.new_head == ("head.bias", "head.weight") and loaded.classes == (4, 9)
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    line = f"{path}: its head for 4 classes is left out and one for 9 is random."
    assert said == [("robust_peft", "WARNING", line)]
    monkeypatch.setenv("RANK", "1")  # one of several processes; the first one has said it
    load_weights(network(9, seed=1), path)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("keys", "wanted", "expected"),
    [
        (["head.weight"], "head.weight", 4),
        (["module.model.head.weight"], "head.weight", 4),
        (["head.weight"], "head.fc.weight", 4),  # timm before 0.9
        (["head.fc.weight"], "head.fc.weight", 4),
        (["layer.0.fc.weight", "x.fc.weight"], "fc.weight", 4),
        (["overhead.weight"], "head.weight", None),
        (["classifier.weight"], "head.weight", None),
    ],
)
def test_class_count_of_a_file(tmp_path: Path, keys: list[str], wanted: str, expected: int | None) -> None:
    sizes = [9] * (len(keys) - 1) + [4]
    state = {key: torch.zeros(size, 2) for key, size in zip(keys, sizes, strict=True)}
    assert rows_of(torch_saved({"state_dict": state}, tmp_path / "w.pth"), wanted) == expected
    save_file(state, tmp_path / "w.safetensors")
    assert rows_of(tmp_path / "w.safetensors", wanted) == expected


def test_class_count_of_what_cannot_be_read(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "absent.pth", "head.weight") is None
    assert rows_of(written(tmp_path / "junk.pth", b"junk"), "head.weight") is None
