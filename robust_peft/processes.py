"""This process among those of the run, and the device that it computes on."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether to compute on the CPU: without an accelerator, and on Apple's, which has no float64 for the surgery."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is None or accelerator.type == "mps"


def process_state() -> PartialState:
    """Accelerate's state of this process.

    Made in one place, because the first call decides: without ``cpu=True``, processes that torchrun starts on a machine
    without an accelerator would each believe to be alone.
    """
    return PartialState(cpu=on_cpu())


def gather(items: list[T]) -> list[T]:
    """The lists of all processes as one, in the order of the ranks."""
    return gather_object(items) if process_state().num_processes > 1 else items


def leave() -> None:
    """Part from the other processes once all are done; without, a process that ends first may abort in its threads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state = process_state()
        state.wait_for_everyone()
        state.destroy_process_group()


def on_main_or_raise(action: Any) -> None:
    """Run ``action`` on the main process; what it raises is raised on every process, so that none waits for ever."""
    error: Exception | None = None
    if process_state().is_main_process:
        try:
            action()
        except Exception as caught:
            error = caught
    found = [e for e in gather([error]) if e is not None]
    if found:
        raise found[0]
