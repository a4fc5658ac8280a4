"""Configs: what is refused, what is kept, and that parameters agree with the methods behind the names."""

import dataclasses

import pytest

from robust_peft import config as configs
from robust_peft.adapters.attach import METHODS
from robust_peft.attacks import SOLVERS
from robust_peft.config import (
    AttackConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SurgeryConfig,
    ThreatConfig,
    ValidationConfig,
    differences,
    from_dict,
    to_dict,
)
from robust_peft.data.catalog import SETTINGS
from robust_peft.losses import LOSSES
from robust_peft.presets import PRESETS, get_preset
from robust_peft.surgery import SURGERIES


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    preset = get_preset(name)
    assert from_dict(RunConfig, to_dict(preset)) == preset


def test_unknown_preset_and_unknown_field():
    with pytest.raises(ValueError, match="preset should be one of"):
        get_preset("cub")
    with pytest.raises(ValueError, match="RunConfig has no field gama"):
        from_dict(RunConfig, {"gama": 1})


def test_surgery_parameters_are_those_of_the_methods():
    assert set(configs.SURGERY_PARAMETERS) == set(SURGERIES)
    for name, method in SURGERIES.items():
        assert set(configs.SURGERY_PARAMETERS[name]) == {field.name for field in dataclasses.fields(method)}


def test_adapters_by_name_are_those_of_attach():
    assert set(configs.ADAPTER_PARAMETERS) == set(METHODS)


def test_parameters_are_those_of_the_losses_and_solvers():
    assert set(configs.LOSS_PARAMETERS) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert set(configs.LOSS_PARAMETERS[name]) == {field.name for field in dataclasses.fields(loss)}
    assert configs.ATTACK_PARAMETERS == SOLVERS
    assert configs.DATA_PARAMETERS == SETTINGS


@pytest.mark.parametrize("part", ["surgery", "adapter", "attack", "optim", "loss"])
def test_every_foreign_parameter_is_refused(part):
    (_, field, table) = next(row for row in configs.METHOD_PARAMETERS if row[0] == part)
    kind = type(getattr(RunConfig(), part))
    values = {
        "rescale": "none",
        "activation": "relu",
        "blocks": (0,),
        "nesterov": True,
        "pairing": "logits",
        "objective": "ce",
        "random_start": True,
        "step_size": "1/255",
    }
    refused = 0
    for method, own in table.items():
        for parameter in sorted({p for names in table.values() for p in names} - set(own)):
            with pytest.raises(ValueError, match=f"{part}.{parameter} is no parameter of '{method}'"):
                RunConfig(**{part: kind(**{field: method, parameter: values.get(parameter, 1)})})
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surgery": SurgeryConfig(gamma=-0.1)}, "gamma should be in"),
        ({"surgery": SurgeryConfig(gamma=float("nan"))}, "gamma should be in"),
        ({"surgery": SurgeryConfig(scope="tensor", conflict_params="adapters")}, "has no meaning"),
        (
            {"attack": AttackConfig(step_size="2/255"), "threat": ThreatConfig(norm="l2", eps="0.5")},
            "times 10 step.s. is 0.0784, less than the budget",
        ),
        ({"attack": AttackConfig(steps=0)}, "steps should be finite and at least 1"),
        ({"attack": AttackConfig(step_size="0")}, "step_size should be a positive number"),
        ({"attack": AttackConfig(objective="kl", random_start=False)}, "kl.*needs a random start"),
        ({"attack": AttackConfig(name="fgsm"), "loss": LossConfig(name="trades")}, "trades.*needs a random start"),
        ({"attack": AttackConfig(restarts=2, random_start=False)}, "restarts without random_start"),
        ({"measure_conflict": False}, "'ca-at' needs measure_conflict"),
        ({"validation": ValidationConfig(keep="best", every=0)}, "needs validations"),
        ({"optim": OptimConfig(match_change="adversarial")}, "match_change should be one of vanilla. Found"),
        (
            {
                "optim": OptimConfig(match_change="vanilla"),
                "surgery": SurgeryConfig(name="vanilla"),
                "measure_conflict": False,
            },
            "optim.match_change needs both gradients, that is measure_conflict",
        ),
    ],
)
def test_combinations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**options)


def test_differences_name_the_fields():
    one = RunConfig()
    other = dataclasses.replace(one, seed=1, surgery=SurgeryConfig(gamma=0.9))
    assert differences(one, one) == []
    assert differences(one, other) == ["seed: 0 -> 1", "surgery.gamma: None -> 0.9"]
