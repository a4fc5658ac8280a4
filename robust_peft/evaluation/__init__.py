"""How accurate and how robust a model is, and whether the figure can be believed."""

from robust_peft.evaluation.audit import Audit, audit
from robust_peft.evaluation.checks import Check
from robust_peft.evaluation.evaluator import evaluate
from robust_peft.evaluation.report import AttackResult, Report

__all__ = ["AttackResult", "Audit", "Check", "Report", "audit", "evaluate"]
