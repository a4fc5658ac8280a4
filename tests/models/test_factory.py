"""Backbones from a user's own Python file: what is called with what, and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from robust_peft.models import Normalized, load_backbone
from robust_peft.models.factory import SHAPE, split_name

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=5, channels=3):
        super().__init__()
        self.fc = nn.Linear(channels * 16, num_classes)

    def forward(self, images):
        return self.fc(images.flatten(1))
"""


def write(folder: Path, text: str, name: str = "module.py") -> str:
    """A file with the class Net and this text; its path as a string."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(NET + text, encoding="utf-8")
    return str(folder / name)


def images_of(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))


def refusal(*arguments: object, **options: object) -> ValueError:
    with pytest.raises(ValueError) as caught:
        load_backbone(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


# Names


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.py:build", "net.py"),
        ("models/net.py:build", "models/net.py"),
        (r"C:\models\net.py:build", r"C:\models\net.py"),
        ("C:/a:b/NET.PY:build", "C:/a:b/NET.PY"),
        ("timm/net.py:build", "timm/net.py"),
    ],
)
def test_the_last_colon_parts_file_and_factory(name: str, path: str) -> None:
    assert split_name(name) == (Path(path), "build")


@pytest.mark.parametrize("name", ["micro_swin", "timm/resnet18", "hf/a/b", "", ":", "net.pyc:build", r"C:\runs\one"])
def test_other_names_are_left_to_others(name: str) -> None:
    assert split_name(name) is None


@pytest.mark.parametrize("name", ["net.py", "net.py:", r"C:\models\net.py"])
def test_a_file_without_a_factory(name: str) -> None:
    assert SHAPE in str(refusal(name))


# What is built


def test_pixels_reach_the_model_as_they_are(tmp_path: Path) -> None:
    model = load_backbone(write(tmp_path, "def build(): return Net()") + ":build")
    assert isinstance(model, Normalized)
    assert torch.equal(model(images_of()), model.backbone(images_of())) and model(images_of()).shape == (2, 5)


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    model = load_backbone(write(tmp_path, "def build(): return Net(channels=1)") + ":build")
    assert torch.equal(model(images_of(1)), model.backbone(images_of(1)))


def test_a_class_is_a_factory_too(tmp_path: Path) -> None:
    assert load_backbone(write(tmp_path, "") + ":Net", num_classes=7)(images_of()).shape == (2, 7)


def test_mean_and_std_can_be_given(tmp_path: Path) -> None:
    name = write(tmp_path, "def build(): return Net()") + ":build"
    model = load_backbone(name, mean=(0.1, 0.2, 0.3))
    assert torch.equal(model(images_of()), model.backbone(images_of() - model.mean))
    assert load_backbone(name, std=(2, 2, 2)).mean.flatten().tolist() == [0, 0, 0]


def test_a_bare_timm_model_brings_its_statistics(tmp_path: Path) -> None:
    text = "import timm\ndef build(): return timm.create_model('test_vit', pretrained=False, img_size=32)"
    config = timm.get_pretrained_cfg("test_vit")
    assert config is not None
    found = load_backbone(write(tmp_path, text) + ":build").mean.flatten().tolist()
    assert found == pytest.approx(list(config.mean))


@pytest.mark.parametrize(
    ("signature", "options", "seen"),
    [
        ("", {}, "{}"),
        ("num_classes", {}, "{'num_classes': None}"),
        ("num_classes=3", {}, "{'num_classes': 3}"),
        ("num_classes=3, other=1", {"num_classes": 8}, "{'num_classes': 8, 'other': 1}"),
        ("*, checkpoint=None", {"checkpoint": "some/weights.pt"}, "{'checkpoint': 'some/weights.pt'}"),
        ("checkpoint=None", {"checkpoint": "random"}, "{'checkpoint': 'random'}"),
        ("checkpoint=None", {"checkpoint": Path("some.pt")}, "{'checkpoint': 'some.pt'}"),
        ("image_size=8", {"image_size": 4}, "{'image_size': 4}"),
    ],
)
def test_a_factory_is_handed_what_its_signature_names(
    tmp_path: Path, signature: str, options: dict[str, object], seen: str
) -> None:
    body = "seen = dict(locals()); net = Net(); net.seen = seen; return net"
    path = write(tmp_path, f"def build({signature}): {body}")
    assert str(load_backbone(f"{path}:build", **options).backbone.seen) == seen


def test_a_checkpoint_that_the_factory_does_not_take_is_loaded_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "def build(num_classes): return Net(num_classes)")
    weights = {"fc.weight": torch.rand(4, 48), "fc.bias": torch.rand(4)}
    save_file(weights, tmp_path / "weights.safetensors")
    model = load_backbone(f"{path}:build", num_classes=4, checkpoint=tmp_path / "weights.safetensors")
    assert torch.equal(model.backbone.get_parameter("fc.weight"), weights["fc.weight"])
    save_file({"conv.weight": torch.rand(2)}, tmp_path / "other.safetensors")
    assert "does not fit Net" in str(refusal(f"{path}:Net", checkpoint=tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 5}, "takes no num_classes"),
        ({"num_classes": 5, "image_size": 4}, "takes no num_classes and no image_size"),
        ({"checkpoint": "random"}, "takes no checkpoint"),
    ],
)
def test_nothing_that_is_asked_for_is_dropped(tmp_path: Path, options: dict[str, object], said: str) -> None:
    assert said in str(refusal(write(tmp_path, "def build(): return Net()") + ":build", **options))


# How the file is executed


def test_the_file_is_read_anew_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path_before = list(sys.path)
    name = write(tmp_path, "def build(): return Net(3)") + ":build"
    assert load_backbone(name)(images_of()).shape == (2, 3)
    write(tmp_path, "def build(): return Net(4)")  # of the same length, in the same second
    assert load_backbone(name)(images_of()).shape == (2, 4)
    assert sys.path == path_before and os.listdir(tmp_path) == ["module.py"]


def test_dataclasses_and_neighbours_work(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_the_factory.py").write_text("CLASSES = 6\n")
    text = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Settings:
    classes: int = 5

def build() -> nn.Module:
    from neighbour_of_the_factory import CLASSES  # also while the factory runs
    return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES + Settings().classes))
"""
    (tmp_path / "module.py").write_text(text)
    assert load_backbone(f"{tmp_path / 'module.py'}:build")(images_of()).shape == (2, 11)


@pytest.mark.parametrize("package", [False, True], ids=["file", "package"])
def test_neighbours_of_one_name_in_two_folders_are_not_mixed_up(tmp_path: Path, package: bool) -> None:
    """The second model of a transfer may come from another project with the same layout."""
    for classes in (2, 3):
        folder = tmp_path / str(classes)
        folder.mkdir()
        neighbour = folder / "network_of_a_project"
        if package:
            neighbour.mkdir()
            (neighbour / "size.py").write_text(f"CLASSES = {classes}\n")
            text = "from network_of_a_project.size import CLASSES\n"
        else:
            neighbour.with_suffix(".py").write_text(f"CLASSES = {classes}\n")
            text = "from network_of_a_project import CLASSES\n"
        write(folder, text + "def build(): return Net(CLASSES)")
    for classes in (2, 3, 2):
        assert load_backbone(f"{tmp_path / str(classes) / 'module.py'}:build")(images_of()).shape == (2, classes)


def test_installed_packages_stay_when_another_file_is_loaded(tmp_path: Path) -> None:
    first = write(tmp_path / "one", "import colorsys\ndef build(): return Net()")  # a library nobody else has loaded
    sys.modules.pop("colorsys", None)
    load_backbone(f"{first}:build")
    loaded = sys.modules["colorsys"]
    load_backbone(write(tmp_path / "two", "def build(): return Net()") + ":build")
    assert sys.modules["colorsys"] is loaded


# What is refused


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.py does not exist"):
        load_backbone(f"{tmp_path / 'absent.py'}:build")


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    message = str(refusal(write(tmp_path, "def make(): return Net()") + ":build"))
    assert "module.py has no 'build'. It defines Net, make." in message
    (tmp_path / "empty.py").write_text("")
    assert "no function and no class" in str(refusal(f"{tmp_path / 'empty.py'}:build"))


@pytest.mark.parametrize(("value", "kind"), [("3", "int"), ("Net()", "Net"), ("'Net'", "str")])
def test_a_name_that_is_no_factory(tmp_path: Path, value: str, kind: str) -> None:
    message = str(refusal(write(tmp_path, f"build = {value}") + ":build"))
    assert f"should be a function that builds and returns the model. Found {kind}." in message


@pytest.mark.parametrize(
    ("value", "kind"), [("None", "NoneType"), ("Net", "type"), ("Net().state_dict()", "OrderedDict")]
)
def test_a_factory_that_returns_no_module(tmp_path: Path, value: str, kind: str) -> None:
    message = str(refusal(write(tmp_path, f"def build(): return {value}") + ":build"))
    assert f"module.py:build should return an nn.Module. Found {kind}." in message


@pytest.mark.parametrize(
    ("body", "cause", "said"),
    [
        ("raise KeyError('weights')", KeyError, "KeyError: 'weights'"),
        ("raise RuntimeError('first\\nsecond')", RuntimeError, "RuntimeError: first."),
        ("raise SystemExit(2)", SystemExit, "SystemExit: 2"),
        ("assert False", AssertionError, "AssertionError."),
    ],
)
def test_a_factory_that_fails_is_named_with_its_error(
    tmp_path: Path, body: str, cause: type[BaseException], said: str
) -> None:
    error = refusal(write(tmp_path, f"def build(): {body}") + ":build")
    assert "module.py:build failed: " in str(error) and said in str(error) and type(error.__cause__) is cause


def test_a_factory_that_wants_more(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "def build(depth): return Net()") + ":build")
    assert "module.py:build failed: TypeError" in str(error) and "depth" in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def build(:", "SyntaxError"),
        ("import no_such_package_anywhere", "ModuleNotFoundError: No module named 'no_such_package_anywhere'"),
        ("raise SystemExit('usage: module.py FILE')", "SystemExit: usage: module.py FILE"),
    ],
)
def test_a_file_that_cannot_be_executed(tmp_path: Path, text: str, said: str) -> None:
    loaded = set(sys.modules)
    error = refusal(write(tmp_path, text) + ":build")
    assert "module.py cannot be executed: " in str(error) and said in str(error) and error.__cause__ is not None
    assert not {name for name in set(sys.modules) - loaded if name.startswith("_factory_")}


def test_interrupting_is_no_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_backbone(write(tmp_path, "def build(): raise KeyboardInterrupt") + ":build")
