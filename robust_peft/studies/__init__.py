"""Many runs at once: studies, the paper's experiments, and figures over run folders."""

from robust_peft.studies.collect import collect
from robust_peft.studies.engines import LocalEngine
from robust_peft.studies.loading import load_study
from robust_peft.studies.runner import run_study
from robust_peft.studies.study import Measurement, Method, Study, grid

__all__ = ["LocalEngine", "Measurement", "Method", "Study", "collect", "grid", "load_study", "run_study"]
