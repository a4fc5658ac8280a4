"""The key layouts of real published files, by today's timm: nothing missing, nothing left, the same logits."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.models import load_backbone
from robust_peft.models.layouts import arrange
from robust_peft.models.registry import PUBLISHED, PublishedBackbone

FIXTURES = Path(__file__).parents[1] / "fixtures"
# A larger file of the same kind, where a checkout of the project has it beside it.
SHARED = Path(__file__).parents[3] / "shared" / "fixtures"


@cache
def layouts() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes as timm 0.6.13 wrote them, by architecture."""
    return json.loads(gzip.decompress((FIXTURES / "timm06_layouts.json.gz").read_bytes()))


@cache
def on_meta(architecture: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, num_classes=1000)


def old_state(architecture: str, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in layouts()[architecture].items()}


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.name)
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_key_map_of_each_published_backbone(entry: PublishedBackbone, prefix: str) -> None:
    model = on_meta(entry.architecture)
    fitting, loaded = arrange(old_state(entry.architecture, prefix), model)
    own = model.state_dict()
    assert set(fitting) == set(own) and len(own) > 100
    assert all(fitting[name].shape == tensor.shape for name, tensor in own.items())
    assert loaded.prefix == prefix and loaded.resampled == () and loaded.new_head == ()
    if entry.architecture.startswith("swin"):
        moved = [name for name in loaded.renamed if "downsample" in name]
        assert len(moved) == 9 and set(loaded.renamed) - set(moved) == {"head.fc.weight", "head.fc.bias"}
        assert all(name.endswith(("attn_mask", "relative_position_index")) for name in loaded.dropped)
        assert len(loaded.dropped) == len(layouts()[entry.architecture]) - len(own)
    else:
        assert loaded.renamed == () and loaded.dropped == ()


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.name)
def test_todays_layout_goes_through_as_it_is(entry: PublishedBackbone) -> None:
    own = on_meta(entry.architecture).state_dict()
    fitting, loaded = arrange(own, on_meta(entry.architecture))
    assert all(fitting[name] is tensor for name, tensor in own.items())
    assert (loaded.renamed, loaded.dropped, loaded.resampled) == ((), (), ())


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
        ("swin_base_patch4_window7_224", "swin_small_patch4_window7_224"),
        ("vit_small_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch16_224", "swin_base_patch4_window7_224"),
        ("swin_base_patch4_window7_224", "vit_base_patch16_224"),
    ],
)
def test_another_published_architecture_is_refused(found: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=r"^does not fit \w+: of its \d+ tensors \d+ .*, \.\.\.\)") as error:
        arrange(old_state(found), on_meta(wanted))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def logits_here(file: Path, facts: dict[str, Any], images: Tensor) -> Tensor:
    model = SwinTransformer(**facts["kwargs"])
    with torch.no_grad():
        return load_backbone(model, checkpoint=file, mean=facts["mean"], std=facts["std"]).eval()(images)


def test_todays_timm_gives_the_logits_of_the_old_one() -> None:
    """The file and its logits were made by timm 0.6.13 itself; how, says its note."""
    facts = json.loads((FIXTURES / "swin_timm06_small.json").read_text())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(facts["images_seed"]))
    expected = torch.tensor(facts["logits"])
    assert expected.std() > 0.05  # images and classes differ
    assert_close(logits_here(FIXTURES / "swin_timm06_small.pth", facts, images), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not (SHARED / "swin_timm06.pth").is_file(), reason="the larger file is not beside this checkout")
def test_todays_timm_gives_the_logits_of_the_old_one_on_a_larger_file() -> None:
    facts = json.loads((SHARED / "swin_timm06.json").read_text())
    given = torch.load(SHARED / "swin_timm06_logits.pt", weights_only=True)
    logits = logits_here(SHARED / "swin_timm06.pth", facts, given["images"])
    assert_close(logits, given["logits"], rtol=0, atol=1e-5)


def test_old_swin_with_prefix_normalisation_and_a_head_for_other_classes(tmp_path: Path, caplog: Any) -> None:
    facts = json.loads((FIXTURES / "swin_timm06_small.json").read_text())
    state = torch.load(FIXTURES / "swin_timm06_small.pth", weights_only=True)
    wrapped = {f"module.model.{name}": tensor for name, tensor in state.items()}
    wrapped |= {f"module.normalize.{key}": torch.tensor(facts[key]).reshape(1, 3, 1, 1) for key in ("mean", "std")}
    torch.save({"state_dict": wrapped}, tmp_path / "w.pth")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(facts["images_seed"]))
    logits = logits_here(tmp_path / "w.pth", facts, images)
    assert_close(logits, torch.tensor(facts["logits"]), rtol=0, atol=1e-5)
    assert caplog.messages == []

    same, other = SwinTransformer(**facts["kwargs"]), SwinTransformer(**facts["kwargs"] | {"num_classes": 3})
    for model in (same, other):
        load_backbone(model, checkpoint=tmp_path / "w.pth", mean=facts["mean"], std=facts["std"])
    with torch.no_grad():
        assert torch.equal(same.eval().forward_features(images), other.eval().forward_features(images))
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "its head for 5 classes is left out and one for 3 is random."
    ]
    with pytest.raises(
        ValueError, match=r"normalises by mean = \(0.485, 0.456, 0.406\), .* the backbone would by mean"
    ):
        load_backbone(same, checkpoint=tmp_path / "w.pth")


def test_position_embeddings_of_another_image_size_are_resampled_and_that_is_said(tmp_path: Path, caplog: Any) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_backbone("timm/test_vit", checkpoint=tmp_path / "w.pth", image_size=64)
    assert model.backbone.pos_embed.shape[1] == 17 and source.pos_embed.shape[1] == 5
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    said = [record for record in caplog.messages if "resampled to another image size" in record]
    assert said == [f"{tmp_path / 'w.pth'}: 1 tensor (pos_embed) resampled to another image size."]
