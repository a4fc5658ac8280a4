"""The bottleneck adapter as a peft tuner. Importing this registers it in peft."""

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel, find_blocks
from .register import register

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel", "find_blocks"]

register()
