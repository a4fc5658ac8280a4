"""robust_peft: adversarial fine-tuning of pretrained vision transformers by small adapters.

The names below are handed on from the modules that hold them, when they are first used: ``import robust_peft`` loads
nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robust_peft import adapters, attacks, data, evaluation, losses, models, objectives, results, surgery, training
    from robust_peft.adapters import BottleneckConfig, attach
    from robust_peft.config import OptimConfig, RunConfig, ValidationConfig
    from robust_peft.evaluation import Audit, Report, audit, evaluate
    from robust_peft.models import Normalized, load_backbone
    from robust_peft.presets import get_preset
    from robust_peft.runs import load_run, run
    from robust_peft.threat import ThreatModel
    from robust_peft.training import Trainer

_HOMES = {
    "BottleneckConfig": "adapters",
    "attach": "adapters",
    "OptimConfig": "config",
    "RunConfig": "config",
    "ValidationConfig": "config",
    "Audit": "evaluation",
    "Report": "evaluation",
    "audit": "evaluation",
    "evaluate": "evaluation",
    "Normalized": "models",
    "load_backbone": "models",
    "get_preset": "presets",
    "load_run": "runs",
    "run": "runs",
    "ThreatModel": "threat",
    "Trainer": "training",
}
_MODULES = (
    "adapters",
    "attacks",
    "data",
    "evaluation",
    "losses",
    "models",
    "objectives",
    "results",
    "surgery",
    "training",
)

__all__ = [
    "Audit",
    "BottleneckConfig",
    "Normalized",
    "OptimConfig",
    "Report",
    "RunConfig",
    "ThreatModel",
    "Trainer",
    "ValidationConfig",
    "adapters",
    "attach",
    "attacks",
    "audit",
    "data",
    "evaluate",
    "evaluation",
    "get_preset",
    "load_backbone",
    "load_run",
    "losses",
    "models",
    "objectives",
    "results",
    "run",
    "surgery",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"robust_peft.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"robust_peft.{name}")
    raise AttributeError(f"module 'robust_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
