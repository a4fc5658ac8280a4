"""Flags beside a preset: where one names another method, what the preset says for its own method goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from robust_peft.cli.flags import flag_value
from robust_peft.config import (
    BACKBONE_PARAMETERS,
    METHOD_PARAMETERS,
    AttackConfig,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
)


def with_methods(preset: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """The preset as the flags' defaults: where a flag names another method, the preset's parameters of its own go.

    Otherwise ``--surgery.name vanilla`` would be refused because of a gamma that the user never set.
    """
    for part, name, table in METHOD_PARAMETERS:
        given = flag_value(arguments, f"--{part}.{name}")
        config = getattr(preset, part)
        if given in table and given != getattr(config, name):
            own = {parameter: None for parameter in table[getattr(config, name)]}
            changed = dataclasses.replace(config, **{name: given}, **own)
            preset = dataclasses.replace(preset, **{part: changed})
    given = {flag: flag_value(arguments, f"--{flag}") for flag in PRESET_DEPENDENT}
    return dataclasses.replace(
        preset,
        backbone=_for_backbone(preset.backbone, given["backbone.name"]),
        data=_for_data(preset.data, given),
        attack=_for_budget(preset, given),
        optim=_for_epochs(preset.optim, given["optim.epochs"]),
    )


# Flags that make other values of a preset meaningless.
PRESET_DEPENDENT = ("backbone.name", "data.name", "data.root", "data.train", "data.test", "threat.norm", "threat.eps")
PRESET_DEPENDENT += ("attack.steps", "optim.epochs")


def _for_backbone(backbone: BackboneConfig, name: str | None) -> BackboneConfig:
    if name is None or name == backbone.name:
        return backbone
    foreign = {field: None for field, takers in BACKBONE_PARAMETERS.items() if name not in takers}
    return dataclasses.replace(backbone, name=name, **foreign)


def _for_data(data: DataConfig, given: dict[str, str | None]) -> DataConfig:
    """Paths of one dataset are nothing to another."""
    name = given["data.name"]
    if name is None or name == data.name:
        return data
    paths = {part: given[f"data.{part}"] for part in ("root", "train", "test")}
    return dataclasses.replace(data, name=name, **paths)


def _for_budget(preset: RunConfig, given: dict[str, str | None]) -> AttackConfig:
    """A step size goes with norm, budget and number of steps: where one changes, the default takes its place."""
    now = {"threat.norm": preset.threat.norm, "threat.eps": preset.threat.eps, "attack.steps": str(preset.attack.steps)}
    if all(given[flag] in (None, value) for flag, value in now.items()):
        return preset.attack
    return dataclasses.replace(preset.attack, step_size=None)


def _for_epochs(optim: OptimConfig, epochs: str | None) -> OptimConfig:
    """The warm-up stays the same part of the run."""
    if epochs is None or not epochs.isdecimal():
        return optim
    return dataclasses.replace(
        optim, epochs=int(epochs), warmup_epochs=optim.warmup_epochs * int(epochs) / optim.epochs
    )
