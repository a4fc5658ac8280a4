"""Training some of a network's own parameters, as a peft tuner. Importing this registers it in peft."""

from robust_peft.adapters.bottleneck.register import register

from .config import PEFT_TYPE, SelectedConfig
from .layer import SelectedParameter
from .model import SelectedModel, find_selected

__all__ = ["SelectedConfig", "SelectedModel", "SelectedParameter", "find_selected"]

register(PEFT_TYPE, SelectedConfig, SelectedModel)
