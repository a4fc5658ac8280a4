"""Backbones by name: shapes, statistics, local checkpoints, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from robust_peft.models import ENTRIES, Normalized, load_backbone, new_head, zoo
from robust_peft.models.micro_swin import micro_swin
from robust_peft.models.registry import PUBLISHED, PublishedBackbone
from robust_peft.models.zoo import cached_file, weights_file

TINY = dict(num_classes=5, checkpoint="random")


@pytest.fixture(autouse=True)
def no_weights_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are offline already; what an earlier download left in the cache is out of sight too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def images_of(size: int = 32, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def save(model: nn.Module, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    return path


# The embedded one


@pytest.fixture(scope="module")
def swin_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A random micro_swin of five classes, and the file of its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = micro_swin(5)
    return model, save(model, tmp_path_factory.mktemp("swin") / "weights.safetensors")


def test_random_micro_swin() -> None:
    model = load_backbone("micro_swin", checkpoint="random")
    assert isinstance(model, Normalized)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(3.1e6, rel=0.03)
    logits = logits_of(model, images_of())
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert model.std.flatten().tolist() == pytest.approx([0.247, 0.243, 0.262])


@pytest.mark.parametrize(("num_classes", "image_size"), [(5, 32), (1, 32), (200, 64)])
def test_random_micro_swin_of_other_sizes(num_classes: int, image_size: int) -> None:
    model = load_backbone("micro_swin", num_classes=num_classes, checkpoint="random", image_size=image_size)
    assert logits_of(model, images_of(image_size, 1)).shape == (1, num_classes)


def test_micro_swin_from_a_file(swin_file: tuple[nn.Module, Path]) -> None:
    source, path = swin_file
    model = load_backbone("micro_swin", num_classes=5, checkpoint=path)
    normalised = (images_of() - model.mean) / model.std
    assert torch.equal(logits_of(model, images_of()), logits_of(source, normalised))


def test_micro_swin_of_another_class_count_keeps_everything_but_the_head(swin_file: tuple[nn.Module, Path]) -> None:
    source, path = swin_file
    model = load_backbone("micro_swin", num_classes=7, checkpoint=path)
    assert logits_of(model, images_of()).shape == (2, 7)
    found, kept = model.backbone.state_dict(), 0
    for key, tensor in source.state_dict().items():
        if key.startswith("head.fc"):
            assert len(found[key]) == 7
            continue
        assert torch.equal(found[key], tensor), key
        kept += 1
    assert kept == len(found) - 2


def test_class_count_is_the_weights_own_where_none_is_asked_for(swin_file: tuple[nn.Module, Path]) -> None:
    source, path = swin_file
    model = load_backbone("micro_swin", checkpoint=path)
    assert logits_of(model, images_of()).shape == (2, 5)
    normalised = (images_of() - model.mean) / model.std
    assert torch.equal(logits_of(model, images_of()), logits_of(source, normalised))


def test_embedded_weights() -> None:
    first, second = load_backbone("micro_swin"), load_backbone("micro_swin")
    logits = logits_of(first, images_of())
    assert logits.shape == (2, 10) and torch.equal(logits, logits_of(second, images_of()))
    other = load_backbone("micro_swin", num_classes=3)
    assert logits_of(other, images_of()).shape == (2, 3)
    features = first.backbone.forward_features(images_of())
    assert torch.equal(features, other.backbone.forward_features(images_of()))


def test_micro_swins_weights_are_for_one_size() -> None:
    with pytest.raises(ValueError, match="32 pixels. Found image_size = 64"):
        load_backbone("micro_swin", image_size=64)


# timm


def test_timm_random() -> None:
    model = load_backbone("timm/test_vit", **TINY, image_size=32)
    assert logits_of(model, images_of()).shape == (2, 5)
    config = timm.get_pretrained_cfg("test_vit")
    assert config is not None
    assert model.mean.flatten().tolist() == pytest.approx(list(config.mean))
    assert model.std.flatten().tolist() == pytest.approx(list(config.std))


def test_timm_keeps_its_own_class_count_and_size() -> None:
    model = load_backbone("timm/test_vit", checkpoint="random")
    assert logits_of(model, images_of(160, 1)).shape == (1, 1000)


def test_timm_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=5)
    path = save(source, tmp_path / "weights.safetensors")
    model = load_backbone("timm/test_vit", num_classes=5, checkpoint=path, image_size=32)
    normalised = (images_of() - model.mean) / model.std
    assert_close(logits_of(model, images_of()), logits_of(source, normalised), rtol=0, atol=0)
    other = load_backbone("timm/test_vit", num_classes=3, checkpoint=path, image_size=32)
    assert logits_of(other, images_of()).shape == (2, 3)
    kept = [key for key in source.state_dict() if not key.startswith("head")]
    assert len(kept) == len(source.state_dict()) - 2
    for key in kept:
        assert torch.equal(other.backbone.state_dict()[key], source.state_dict()[key]), key


def test_timm_class_count_is_the_files_own_where_none_is_asked_for(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=5)
    path = save(source, tmp_path / "weights.safetensors")
    model = load_backbone("timm/test_vit", checkpoint=path, image_size=32)
    assert logits_of(model, images_of()).shape == (2, 5)
    normalised = (images_of() - model.mean) / model.std
    assert_close(logits_of(model, images_of()), logits_of(source, normalised), rtol=0, atol=0)


def test_timm_of_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="timm has no model 'test_vot'. Names like it: test_"):
        load_backbone("timm/test_vot", checkpoint="random")
    with pytest.raises(ValueError, match="no model 'zzz'. Names like it: none"):
        load_backbone("timm/zzz", checkpoint="random")


def test_timm_without_a_network_says_what_to_do() -> None:
    with pytest.raises(OSError, match='weights of timm/test_vit could not be downloaded.*checkpoint="random"') as error:
        load_backbone("timm/test_vit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_smal_patch16_224", "swin_bas_patch4_window7_224"])
def test_timm_suggests_names(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"no model '{name}'. Names like it: .*{name.split('_')[0]}_(small|base)_patch"
    ):
        load_backbone(f"timm/{name}", checkpoint="random")


def test_timm_model_for_any_image_size() -> None:
    with pytest.raises(ValueError, match="timm/test_resnet is not built for one image size; leave image_size out"):
        load_backbone("timm/test_resnet", checkpoint="random", image_size=64)


@pytest.mark.parametrize("wrapped", [False, True])
def test_timm_from_a_file_of_torch(tmp_path: Path, wrapped: bool) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=5)
    state: Any = source.state_dict()
    if wrapped:
        state = {"model": {f"module.{key}": tensor for key, tensor in state.items()}}
    torch.save(state, tmp_path / "w.pth")
    model = load_backbone("timm/test_vit", checkpoint=tmp_path / "w.pth", image_size=32)  # the file's five classes
    assert torch.equal(logits_of(model, images_of()), logits_of(source, (images_of() - model.mean) / model.std))


# Published robust backbones


ENTRY = PUBLISHED[0]


@pytest.fixture
def tiny_zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> nn.Module:
    """The first published backbone becomes a tiny Swin, so that a file is written and read at once."""
    kwargs = dict(patch_size=4, window_size=4, embed_dim=8, depths=[2, 2, 2], num_heads=[1, 2, 2])
    monkeypatch.setattr(zoo, "published", lambda name: entry if name == entry.name else None)
    entry = dataclasses.replace(ENTRY, architecture="swin_of_the_test", image_size=64)
    create = timm.create_model

    def create_model(name: str, *, num_classes: int = 5, img_size: int = 64, **options: Any) -> nn.Module:
        if name != "swin_of_the_test":
            return create(name, num_classes=num_classes, img_size=img_size, **options)
        assert options.pop("pretrained") is False
        overlay = options.pop("pretrained_cfg_overlay")
        assert overlay["mean"] == entry.mean and not options
        return SwinTransformer(img_size=img_size, num_classes=num_classes, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SwinTransformer(img_size=64, num_classes=5, **kwargs)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_published_backbone_from_a_local_copy(tiny_zoo: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"copy{suffix}"
    save(tiny_zoo, path) if suffix == ".safetensors" else torch.save(tiny_zoo.state_dict(), path)
    model = load_backbone(ENTRY.name, checkpoint=path)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert torch.equal(logits_of(model, images_of(64)), logits_of(tiny_zoo, (images_of(64) - model.mean) / model.std))
    assert logits_of(load_backbone(ENTRY.name, checkpoint=path, num_classes=7), images_of(64)).shape == (2, 7)
    assert logits_of(load_backbone(ENTRY.name, checkpoint=path, image_size=96), images_of(96)).shape == (2, 5)
    assert weights_file(ENTRY.name, path) == path


def test_published_backbone_from_the_cache(tiny_zoo: nn.Module, tmp_path: Path) -> None:
    cached = cached_file(ENTRY)
    assert cached == tmp_path / "assets" / "robust_peft" / "ares" / ENTRY.file
    assert weights_file(ENTRY.name) is None and weights_file(ENTRY.name, "random") is None
    cached.parent.mkdir(parents=True)
    torch.save(tiny_zoo.state_dict(), cached)
    model = load_backbone(ENTRY.name)
    assert torch.equal(model.backbone.head.fc.weight, tiny_zoo.state_dict()["head.fc.weight"])
    assert weights_file(ENTRY.name) == cached


def test_published_backbone_is_downloaded_when_it_is_asked_for(
    tiny_zoo: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(url: str, target: Path, *, sha256: str | None) -> Path:
        asked.append((url, target, sha256))
        target.parent.mkdir(parents=True)
        torch.save(tiny_zoo.state_dict(), target)
        return target

    monkeypatch.setattr(zoo, "download", download)
    load_backbone(ENTRY.name, checkpoint="random")
    assert asked == []
    load_backbone(ENTRY.name)
    load_backbone(ENTRY.name)
    assert asked == [(ENTRY.url, cached_file(ENTRY), ENTRY.sha256)]


@pytest.mark.parametrize("entry", [ENTRY, PUBLISHED[-1]], ids=lambda entry: entry.name)
def test_published_backbone_that_is_not_at_hand(entry: PublishedBackbone) -> None:
    with pytest.raises(OSError) as error:
        load_backbone(entry.name)
    message = str(error.value)
    assert "\n" not in message and f"The weights of {entry.name} are not at hand" in message
    assert ("HF_HUB_OFFLINE is set" if entry.url else "its page serves it to browsers alone") in message
    for part in (
        entry.file,
        entry.page,
        str(cached_file(entry)),
        "checkpoint=",
        "--backbone.checkpoint PATH",
        '"random"',
    ):
        assert part in message


def test_local_copy_with_another_hash(tiny_zoo: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dataclasses.replace(ENTRY, sha256="0" * 64)
    monkeypatch.setattr(zoo, "published", lambda name: known)
    torch.save(tiny_zoo.state_dict(), tmp_path / ENTRY.file)
    with pytest.raises(ValueError, match=f"{ENTRY.file} should have the SHA-256 {'0' * 64}. Found "):
        load_backbone(ENTRY.name, checkpoint=tmp_path / ENTRY.file)


@pytest.mark.parametrize(("name", "step"), [("ares/swin_small", 32), ("ares/vit_base", 16)])
def test_image_size_that_does_not_fit(name: str, step: int) -> None:
    with pytest.raises(ValueError, match=f"{name} should be a multiple of {step}, .* own 224. Found image_size = 230"):
        load_backbone(name, checkpoint="random", image_size=230)


def test_random_vit_of_the_zoo() -> None:
    model = load_backbone("ares/vit_small", checkpoint="random", num_classes=3, image_size=32)
    assert logits_of(model, images_of()).shape == (2, 3)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # timm's own would be 0.5
    assert model.backbone.pretrained_cfg["mean"] == ENTRY.mean and model.backbone.pretrained_cfg["crop_pct"] == 0.875


def test_there_is_no_robust_swin_tiny() -> None:
    with pytest.raises(ValueError, match="no robust Swin-T in public.*ares/swin_small.*swin_tiny_patch4_window7_224"):
        load_backbone("ares/swin_tiny")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("ares/swin_smal", "ares/swin_small"),
        ("mikro_swin", "micro_swin"),
        ("robustbench/mo2022-swin", "mo2022-swin-base"),
    ],
)
def test_mistyped_name(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"Found backbone = '{name}'. Did you mean .*{close}"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["weights.pth", "here/model.safetensors", "a.PT"])
def test_weights_need_an_architecture(name: str) -> None:
    with pytest.raises(ValueError) as error:
        load_backbone(name)
    assert str(error.value).startswith(f"{name} is a file with weights, which need an architecture: name=")
    assert f'checkpoint="{name}"' in str(error.value)


def test_what_the_zoo_says() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) > 10
    for entry in ENTRIES:
        lines = entry.describe().splitlines()
        assert lines[0] == entry.name and len(lines) > 3 and all(line.startswith("  ") for line in lines[1:])
        assert entry.architecture in lines[1] and entry.weights in lines[2] and entry.preprocessing in "".join(lines)
    text = PUBLISHED[0].describe()
    assert "76.6 % clean, 58.4 % under PGD-100, 55.6 % under AutoAttack, L-inf 4/255 (1000 images)" in text
    assert "resize 256, centre crop 224, bicubic" in text and "SHA-256: unknown" in text
    for entry in PUBLISHED:
        assert timm.is_model(entry.architecture) and entry.name.partition("/")[0] in ("ares", "robustbench")
        assert all(0 < accuracy < entry.clean_accuracy for _, accuracy in entry.robust_accuracy)
        assert entry.url is None or entry.url.endswith(f"/{entry.file}")


# transformers


def save_tiny_vit(folder: Path) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return model


def test_hub_model_from_a_folder(tmp_path: Path) -> None:
    source = save_tiny_vit(tmp_path)
    model = load_backbone(f"hf/{tmp_path}")
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    with torch.no_grad():
        expected = source.eval()((images_of() - model.mean) / model.std).logits
    # The same weights; transformers may choose another attention kernel for a model it loads.
    assert_close(logits_of(model, images_of()), expected, rtol=0, atol=1e-5)


def test_hub_model_of_another_class_count_keeps_everything_but_the_head(tmp_path: Path) -> None:
    source = save_tiny_vit(tmp_path)
    model = load_backbone(f"hf/{tmp_path}", num_classes=3)
    assert logits_of(model, images_of()).shape == (2, 3)
    kept = [key for key in source.state_dict() if not key.startswith("classifier")]
    assert len(kept) == len(source.state_dict()) - 2
    for key in kept:
        assert torch.equal(model.backbone.state_dict()[key], source.state_dict()[key]), key


def test_hub_model_random_and_from_a_file(tmp_path: Path) -> None:
    source = save_tiny_vit(tmp_path)
    assert logits_of(load_backbone(f"hf/{tmp_path}", **TINY), images_of()).shape == (2, 5)
    path = save(source, tmp_path / "other.safetensors")
    model = load_backbone(f"hf/{tmp_path}", checkpoint=path)
    with torch.no_grad():
        expected = source.eval()((images_of() - model.mean) / model.std).logits
    assert_close(logits_of(model, images_of()), expected, rtol=0, atol=1e-5)  # as above


def test_hub_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="hf/.*could not be downloaded") as error:
        load_backbone("hf/nobody/nothing")
    assert "\n" not in str(error.value)


# A module of one's own


def tiny_module() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


def test_module_of_ones_own() -> None:
    own = tiny_module()
    model = load_backbone(own)
    assert model.backbone is own
    assert torch.equal(logits_of(model, images_of(4)), logits_of(own, images_of(4)))  # mean 0 and std 1


def test_timm_module_of_ones_own_brings_its_statistics() -> None:
    own = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=5)
    assert load_backbone(own).mean.flatten().tolist() == pytest.approx(list(own.pretrained_cfg["mean"]))
    assert load_backbone(own).std.flatten().tolist() == pytest.approx(list(own.pretrained_cfg["std"]))


def test_module_of_ones_own_from_a_file(tmp_path: Path) -> None:
    source = tiny_module()
    model = load_backbone(tiny_module(), checkpoint=save(source, tmp_path / "weights.safetensors"))
    assert torch.equal(logits_of(model, images_of(4)), logits_of(source, images_of(4)))


@pytest.mark.parametrize("options", [dict(num_classes=5), dict(image_size=32)], ids=str)
def test_module_of_ones_own_is_not_rebuilt(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="build your module as you want it"):
        load_backbone(tiny_module(), **options)


# Whatever the kind


def build(kind: str, tmp_path: Path, **options: Any) -> Normalized:
    if kind == "module":
        return load_backbone(tiny_module(), **options)
    if kind == "hf":
        save_tiny_vit(tmp_path)
    name = {"hf": f"hf/{tmp_path}", "timm": "timm/test_vit", "micro_swin": "micro_swin"}[kind]
    return load_backbone(name, checkpoint="random", **options)


@pytest.mark.parametrize("kind", ["micro_swin", "timm", "hf", "module"])
def test_statistics_can_be_given(kind: str, tmp_path: Path) -> None:
    own = build(kind, tmp_path)
    both = build(kind, tmp_path, mean=(0.9, 0.8, 0.7), std=(3, 2, 1))
    assert both.mean.flatten().tolist() == pytest.approx([0.9, 0.8, 0.7]) and both.std.flatten().tolist() == [3, 2, 1]
    one = build(kind, tmp_path, mean=(0, 0, 0))
    assert one.mean.flatten().tolist() == [0, 0, 0] and torch.equal(one.std, own.std)
    with pytest.raises(ValueError, match="one entry for each channel"):
        build(kind, tmp_path, mean=(0.5,))


@pytest.mark.parametrize("name", ["", "micro-swin", "resnet50", "timm", "hf", "ares/swin"])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ValueError) as error:
        load_backbone(name)
    message = str(error.value)
    assert f"Found backbone = {name!r}" in message and "\n" not in message
    assert ENTRIES and all(entry.name in message for entry in ENTRIES)


@pytest.mark.parametrize("kind", ["micro_swin", "timm", "hf"])
def test_checkpoint_of_another_architecture(kind: str, tmp_path: Path) -> None:
    save_tiny_vit(tmp_path)
    path = save(nn.ModuleDict({f"other{i}": nn.Linear(2, 2) for i in range(4)}), tmp_path / "wrong.safetensors")
    name = {"hf": f"hf/{tmp_path}", "timm": "timm/test_vit", "micro_swin": "micro_swin"}[kind]
    with pytest.raises(ValueError) as error:
        load_backbone(name, num_classes=5, checkpoint=path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert "8 unexpected (other0.bias, other0.weight, other1.bias, ...)" in message
    assert re.search(r"\d+ missing \(\S+, \S+, \S+, \.\.\.\)", message)
    with pytest.raises(FileNotFoundError, match="absent.safetensors does not exist"):
        load_backbone(name, num_classes=5, checkpoint=tmp_path / "absent.safetensors")


# The new head


def test_new_head_depends_on_its_seed_alone() -> None:
    heads = [nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 50)) for _ in range(3)]
    linear = [head[1] for head in heads]
    state = torch.get_rng_state()
    for head, seed in zip(linear, (1, 1, 2), strict=True):
        new_head(head, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(linear[0].weight, linear[1].weight) and not torch.equal(linear[0].weight, linear[2].weight)
    # 2,000 draws: five standard errors of mean and standard deviation.
    assert abs(linear[0].weight.mean().item()) < 5 * 0.02 / 2000**0.5
    assert linear[0].weight.std().item() == pytest.approx(0.02, rel=5 / 4000**0.5)
    assert linear[0].bias.abs().max() == 0
    assert linear[0].weight.requires_grad and linear[0].weight.grad is None
