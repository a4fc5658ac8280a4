"""Many runs at once: studies, the paper's experiments, and figures over run folders."""

from robust_peft.studies.collect import collect
from robust_peft.studies.engines import make_engine
from robust_peft.studies.loading import built_in_studies, load_study
from robust_peft.studies.local_engine import LocalEngine
from robust_peft.studies.runner import run_study
from robust_peft.studies.study import Measurement, Method, Study, grid

__all__ = [
    "LocalEngine",
    "Measurement",
    "Method",
    "Study",
    "built_in_studies",
    "collect",
    "grid",
    "load_study",
    "make_engine",
    "run_study",
]
