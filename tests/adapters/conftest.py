from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn


class Wrapped(nn.Module):
    """A network under another attribute's name, with the normalisation in front that robust models carry."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone((images - self.mean) / 0.5)


def timm_swin(num_classes: int = 5) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=num_classes,
    )


def timm_vit(num_classes: int = 5) -> nn.Module:
    return timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=num_classes)


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


SWIN_SIZE = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], num_labels=5)


def hf_swin() -> nn.Module:
    return transformers.SwinForImageClassification(transformers.SwinConfig(window_size=4, **SWIN_SIZE))


def hf_swinv2() -> nn.Module:
    # Still in the layout that ViT and Swin had in transformers 4: `intermediate` and `output.dense`, `query`, `value`.
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(window_size=4, **SWIN_SIZE))


def wrapped_swin() -> nn.Module:
    return Wrapped(timm_swin())


BUILDERS = {build.__name__: build for build in (timm_swin, timm_vit, hf_vit, hf_swin, hf_swinv2, wrapped_swin)}


@pytest.fixture(scope="session")
def build_model():
    """build_model(name, **arguments): a fresh tiny model in eval mode, the same weights at every call."""

    def build(name: str, **arguments) -> nn.Module:
        torch.manual_seed(0)
        return BUILDERS[name](**arguments).eval()

    return build


@pytest.fixture(scope="session")
def wrap():
    """wrap(model): the model inside another module, as `.backbone`."""
    return Wrapped


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
