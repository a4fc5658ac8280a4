"""The image size that a model says it expects."""

import pytest
import timm
import torchvision
import transformers
from torch import nn

from robust_peft.models.image_size import expected_image_size
from robust_peft.models.micro_swin import micro_swin
from robust_peft.models.normalize import Normalized


def wrapped(model):
    return Normalized(model, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: micro_swin(10), (32, True)),
        (lambda: micro_swin(10, image_size=48), (48, True)),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), (224, True)),
        (lambda: timm.create_model("test_vit", img_size=48), (48, False)),  # made with dynamic_img_size
        (lambda: timm.create_model("test_resnet"), (160, False)),
        (
            lambda: torchvision.models.VisionTransformer(
                image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=2
            ),
            (64, True),
        ),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    image_size=48, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
                )
            ),
            (48, True),
        ),
        (lambda: nn.Conv2d(3, 2, 1), (None, False)),
    ],
)
def test_size_and_whether_it_is_the_only_one(build, expected):
    assert expected_image_size(build()) == expected
    assert expected_image_size(wrapped(build())) == expected
