"""Budgets and step sizes in the units of the pixels, as people write them: 0.03, "0.03" or "8/255"."""

from __future__ import annotations

import math
from fractions import Fraction

NORMS = ("linf", "l2")


def as_number(value: str | float) -> float | None:
    """The value of a number or fraction; None where it is neither (or divides by zero)."""
    if isinstance(value, bool):
        return None
    try:
        return float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        return None


def eps_problem(norm: str, eps: str | float, box: tuple[float, float] | None = (0.0, 1.0)) -> str | None:
    """What is wrong with a budget, in one sentence; None where it is sound."""
    value = as_number(eps)
    if value is None:
        return f'eps should be a number or a fraction like "8/255". Found eps = {eps!r}.'
    if not 0 <= value < math.inf:
        return f"eps should be non-negative and finite. Found eps = {eps!r}."
    if norm == "linf" and box is not None and value > box[1] - box[0]:
        return (
            f"eps is in the units of the pixels, which lie in [{box[0]:g}, {box[1]:g}], so an L-inf eps is at most "
            f'{box[1] - box[0]:g}. Found eps = {eps!r}; did you mean "{value:g}/255"?'
        )
    return None


def step_size_problem(step_size: str | float) -> str | None:
    """What is wrong with a step size, in one sentence; None where it is sound."""
    value = as_number(step_size)
    if value is None or not 0 < value < math.inf:
        return f'step_size should be a positive number or fraction like "2/255". Found step_size = {step_size!r}.'
    return None
