"""Training: the pair of gradients, the step, the loop around it."""

from robust_peft.training.trainer import FitResult, Trainer

__all__ = ["FitResult", "Trainer"]
