"""Small trainable parts for a frozen backbone. Importing this registers the bottleneck adapter in peft."""

from .attach import FullModel, attach, find_attention, find_head, lora_config
from .bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel, find_blocks

__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "FullModel",
    "attach",
    "find_attention",
    "find_blocks",
    "find_head",
    "lora_config",
]
