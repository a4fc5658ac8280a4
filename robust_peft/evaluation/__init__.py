"""Evaluation: how accurate and how robust a model is."""

from robust_peft.evaluation.evaluator import AttackResult, Report, evaluate

__all__ = ["AttackResult", "Report", "evaluate"]
