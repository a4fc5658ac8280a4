"""Named run configs, which recipes and the command line share."""

from __future__ import annotations

from robust_peft.config import (
    AdapterConfig,
    AttackConfig,
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    RunConfig,
    SurgeryConfig,
    ThreatConfig,
    ValidationConfig,
)

PRESETS: dict[str, RunConfig] = {
    # The demo's run: adapters in the embedded backbone, on 5,000 MNIST digits. Budget, learning rate and epochs come
    # from the scan on validation digits that docs/results/quickstart.md describes.
    "quickstart": RunConfig(
        adapter=AdapterConfig(name="bottleneck", reduction_factor=8),
        threat=ThreatConfig(norm="linf", eps="0.2"),
        attack=AttackConfig(name="pgd", steps=3),
        surgery=SurgeryConfig(name="ca-at", gamma=0.8),
        data=DataConfig(name="digits", batch_size=50, augment=False),
        optim=OptimConfig(lr=3e-2, weight_decay=0.01, epochs=1, warmup_epochs=0.1),
        validation=ValidationConfig(every=0),
        evaluation=EvaluationConfig(attacks=("clean", "pgd-10"), limit=400, batch_size=250),
    ),
    # The embedded backbone: every parameter, from random weights, on all of CIFAR-10.
    "pretrain_micro_swin": RunConfig(
        backbone=BackboneConfig(name="micro_swin", checkpoint="random"),
        adapter=AdapterConfig(name="full", head_init="keep"),
        threat=ThreatConfig(norm="linf", eps="8/255"),
        attack=AttackConfig(name="pgd", steps=2, step_size="5/255"),
        surgery=SurgeryConfig(name="vanilla", lam=1.0),
        data=DataConfig(
            name="parquet",
            train="train.parquet",
            test="test.parquet",
            batch_size=128,
            validation_share=0.02,
            augment=True,
        ),
        optim=OptimConfig(
            lr=1.5e-3, weight_decay=0.05, schedule="onecycle", warmup_epochs=3.2, epochs=16, ema_decay=0.998
        ),
        validation=ValidationConfig(every=2),
        evaluation=EvaluationConfig(attacks=("clean",), batch_size=250),
        measure_conflict=False,
        compile=True,
        save_every_steps=200,
    ),
}


def get_preset(name: str) -> RunConfig:
    """The preset of that name. ValueError that lists the names where there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset should be one of {', '.join(PRESETS)}. Found preset = {name!r}.")
    return PRESETS[name]
