"""The most memory that a piece of work took."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from robust_peft.processes import process_state

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the block that it surrounds; ``peak`` in bytes is then known, or None.

    On a GPU the most that torch had allocated at once. On Linux without one, how much the process's resident memory
    rose over what it had before, at most: images, weights, activations, gradients and optimizer. It is measured as
    the kernel's high-water mark, which is set back first; where the system does not allow that, it is not known.
    Such a figure is comparable from a fresh process on, as what an earlier piece of work gave back may be used again.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self.of = "device memory allocated by torch"
        self._before: int | None = None
        self._device: Any = process_state().device

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.of = "rise of the process's resident memory"
            with suppress(OSError):
                _CLEAR.write_text("5")  # sets VmHWM back to what is resident now
                self._before = _high_water_mark()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        elif self._before is not None:
            self.peak = _high_water_mark() - self._before


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("VmHWM is missing.")
