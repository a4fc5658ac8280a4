"""The tasks of a study in processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from robust_peft.studies.task import BUSY, DONE, FAILED, STOPPED, Task

PATIENCE_SECONDS = 10.0  # for a process that was asked to end

EXIT_CODES = {DONE: 0, FAILED: 10, STOPPED: 11, BUSY: 12}


class LocalEngine:
    """Processes on this machine, one for each task, each with its share of the cores and, where there are, one GPU.

    A process of its own keeps a crash from the others and gives memory back. On Linux it is forked from a process that
    has loaded the libraries; elsewhere it loads them itself.

    Args:
        jobs: How many tasks are done side by side.
    """

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs should be at least 1. Found jobs = {jobs}.")
        self.jobs = jobs
        self._running: dict[int, tuple[Task, Any]] = {}
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self._context.set_forkserver_preload(["robust_peft.studies.work"])

    @property
    def free(self) -> bool:
        return len(self._running) < self.jobs

    def submit(self, task: Task) -> None:
        slot = min(set(range(self.jobs)) - set(self._running))
        process = self._context.Process(target=work_in_process, args=(task, slot, self.jobs))
        with _interrupts_kept_back():
            process.start()
            self._running[slot] = (task, process)  # or an interruption would leave it without anybody to end it

    def ended(self, timeout: float) -> list[tuple[Task, str]]:
        if not self._running:
            time.sleep(timeout)
            return []
        wait([process.sentinel for _, process in self._running.values()], timeout)
        found = []
        for slot, (task, process) in list(self._running.items()):
            if process.exitcode is not None:
                process.join()
                del self._running[slot]
                found.append((task, _outcome(process.exitcode, task.files.notes / "output.txt")))
        return found

    def close(self) -> None:
        for _, process in self._running.values():
            process.terminate()
        for _, process in self._running.values():
            process.join(PATIENCE_SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._running.clear()


@contextmanager
def _interrupts_kept_back() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; only the one that started the others answers it, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it lets signals through again when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started now inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outcome(code: int, output: Path) -> str:
    for outcome, known in EXIT_CODES.items():
        if code == known:
            return outcome
    if code < 0:
        more = " (the machine's memory was full?)" if code == -9 else ""
        return f"The process was ended by signal {-code}{more}."
    printed = output.read_text(errors="replace").strip().splitlines() if output.is_file() else []
    return f"The process ended with status {code}{': ' + printed[-1] if printed else '.'}"


def work_in_process(task: Task, slot: int, jobs: int) -> None:
    """Do a task in this process, which is there for it alone, and end with a status that says how it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # to leave nothing of the system's behind
    write_output_to(task.files.notes / "output.txt")
    share_machine(slot, jobs)
    from robust_peft.studies.work import perform

    sys.exit(EXIT_CODES[perform(task)])


def _end_with(parent: Any) -> None:
    """Nobody waits for the work of a process whose parent was killed; what is done is on disk."""
    parent.join()
    os._exit(1)


def write_output_to(path: Path) -> None:
    """Let what this process prints go into a file, behind what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def share_machine(slot: int, jobs: int) -> None:
    """Take one process's share of the cores, and a GPU of its own where there are several."""
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    os.environ["LOCAL_WORLD_SIZE"] = str(jobs)  # by which a run divides the processes that decode pictures
    import torch

    with suppress(ValueError):
        torch.set_num_threads(int(threads))  # a library that is loaded already does not look at the environment
    # Counting does not start CUDA, which reads the variable only then.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(torch.cuda.device_count())] if given is None else given.split(",")
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)].strip()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
