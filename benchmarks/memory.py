"""Peak memory of this process, above what is in use at one moment."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The most bytes in use from now on, above what is in use now: allocated on a GPU, resident on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, or it would hide a peak (glibc)
            CLEAR.write_text("5")  # VmHWM starts anew
            self.before = _resident("VmRSS")

    def above(self) -> int:
        """Bytes at the peak so far, less those at the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _resident("VmHWM") - self.before


def _resident(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(found.split()[1]) * 1024
