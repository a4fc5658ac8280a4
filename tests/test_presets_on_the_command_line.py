"""Flags over a preset: what a flag makes meaningless in the preset does not stay, and is not held against the user."""

import pytest

from robust_peft import cli
from robust_peft.presets import PRESETS, VARIANTS, get_preset


def parsed(preset, *flags):
    default = cli.Train(output="x", config=cli.with_methods(get_preset(preset), flags))
    return cli.parse(cli.Train, flags, default=default).config


def test_another_backbone():
    config = parsed("cifar_resnet", "--backbone.name", "timm/resnet18")
    assert config.backbone.bn is None and config.backbone.checkpoint == "random"
    assert parsed("cifar_resnet", "--backbone.name", "wrn28_10").backbone.bn == "running"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data.name", "cub200"), (None, None, None)),
        (("--data.name", "cub200", "--data.root", "birds.tgz"), ("birds.tgz", None, None)),
        (("--data.name", "parquet", "--data.train", "a", "--data.test=b"), (None, "a", "b")),
        (("--data.root", "photos"), ("photos", None, None)),
    ],
)
def test_another_dataset(flags, expected):
    data = parsed("finetune", *flags).data
    assert (data.root, data.train, data.test) == expected


def test_a_dataset_that_needs_a_path_still_does():
    with pytest.raises(ValueError, match="needs data.train"):
        parsed("finetune", "--data.name", "parquet")


@pytest.mark.parametrize(
    ("flags", "step_size"),
    [
        ((), "2/255"),
        (("--threat.norm", "l2", "--threat.eps", "0.5"), None),
        (("--threat.eps", "4/255"), None),
        (("--attack.steps", "2"), None),
        (("--attack.steps", "10"), "2/255"),
        (("--attack.steps", "2", "--attack.step-size", "5/255"), "5/255"),
    ],
)
def test_another_budget_or_number_of_steps(flags, step_size):
    assert parsed("cub_swin", *flags).attack.step_size == step_size


def test_fewer_epochs_shorten_the_warm_up():
    assert parsed("cub_swin", "--optim.epochs", "10").optim.warmup_epochs == pytest.approx(0.5)
    assert parsed("cub_swin", "--optim.epochs", "10", "--optim.warmup-epochs", "3").optim.warmup_epochs == 3


def test_variants_are_configs_of_their_recipes():
    assert {name for name in VARIANTS} <= set(PRESETS)
    for name, variants in VARIANTS.items():
        for variant in variants:
            assert get_preset(name, variant).data.name == get_preset(name).data.name
    assert get_preset("dogs_swin", "roli").optim.lr == 1e-4  # with a head from a robust linear probe
