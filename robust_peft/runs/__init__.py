"""Runs: from a config to a finished run, its folder, and the trained model back from it."""

from robust_peft.runs.execution import run
from robust_peft.runs.folder import is_run, load_run_config, run_classes, run_image_size
from robust_peft.runs.loading import load_model, load_run, run_images
from robust_peft.runs.parts import describe_surgery, load_data, make_threat, make_training_attack
from robust_peft.runs.result import RunResult

__all__ = [
    "RunResult",
    "describe_surgery",
    "is_run",
    "load_data",
    "load_model",
    "load_run",
    "load_run_config",
    "make_threat",
    "make_training_attack",
    "run",
    "run_classes",
    "run_image_size",
    "run_images",
]
