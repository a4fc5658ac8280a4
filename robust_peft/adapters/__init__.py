"""Small trainable parts for a frozen backbone. Importing this registers what is not peft's own in peft."""

from .attach import FullModel, attach, find_attention, find_head, lora_config
from .bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel, find_blocks
from .selected import SelectedConfig, SelectedModel, find_selected

__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "FullModel",
    "SelectedConfig",
    "SelectedModel",
    "attach",
    "find_attention",
    "find_blocks",
    "find_head",
    "find_selected",
    "lora_config",
]
