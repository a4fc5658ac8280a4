"""The tasks of a study by Ray: on a cluster, or on this machine."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from robust_peft.studies.local_engine import write_output_to
from robust_peft.studies.task import Task


class RayEngine:
    """Ray's processes, one for each task, with one GPU each where the cluster has any, else with their share of cores.

    ``ray.init()`` joins the cluster that ``RAY_ADDRESS`` or ``ray start`` names, or starts one on this machine. The
    study's folder, its images and this package have to be seen by every machine under the same paths.

    Args:
        jobs: How many tasks are done side by side; None: one for each GPU, without GPUs for each core.

    Raises:
        ImportError: Where Ray is missing; names the extra that brings it.
    """

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs should be at least 1. Found jobs = {jobs}.")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError('The engine ray needs Ray: pip install "robust_peft[ray]".') from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(log_to_driver=False, include_dashboard=False)
        there = ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        self.jobs = jobs or gpus or cores
        # In a process of its own each, so that a crash stays there and memory is given back; a second try is ours to
        # decide on.
        share = {"num_cpus": max(1, cores // self.jobs), "num_gpus": 1 if gpus else 0}
        self._work = ray.remote(**share, max_retries=0, max_calls=1)(_work)
        self._running: dict[Any, Task] = {}

    @property
    def free(self) -> bool:
        return len(self._running) < self.jobs

    def submit(self, task: Task) -> None:
        self._running[self._work.remote(task, os.getcwd())] = task

    def ended(self, timeout: float) -> list[tuple[Task, str]]:
        if not self._running:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        found = []
        for reference in ready:
            task = self._running.pop(reference)
            try:
                found.append((task, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                said = str(error).strip().splitlines() or [""]
                # Of an exception the last line says which, of a process that is gone the first.
                raised = isinstance(error, self._ray.exceptions.RayTaskError)
                found.append((task, f"Ray lost the process: {said[-1 if raised else 0]}"))
        return found

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._started:
            self._ray.shutdown()


def _work(task: Task, folder: str) -> str:
    """Do a task in a process of Ray's, started in the folder that relative paths are meant from."""
    os.chdir(folder)
    write_output_to(task.files.notes / "output.txt")
    from robust_peft.studies.work import perform

    return perform(task)
