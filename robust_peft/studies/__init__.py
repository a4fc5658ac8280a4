"""Many runs at once: studies, the paper's experiments, and figures over run folders."""

from robust_peft.studies.study import Measurement, Method, Study, grid

__all__ = ["Measurement", "Method", "Study", "grid"]
