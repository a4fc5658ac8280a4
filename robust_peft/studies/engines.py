"""Where the tasks of a study are done: in processes on this machine, or by Ray."""

from __future__ import annotations

from typing import Protocol

from robust_peft.studies.local_engine import LocalEngine
from robust_peft.studies.ray_engine import RayEngine
from robust_peft.studies.task import Task


class Engine(Protocol):
    """Does tasks, several at once."""

    @property
    def free(self) -> bool:
        """Whether it takes another task now."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task."""
        ...

    def ended(self, timeout: float) -> list[tuple[Task, str]]:
        """The tasks that ended since the last call, after at most ``timeout`` seconds.

        With each what `robust_peft.studies.work.perform` gave back, or one sentence about how the process ended.
        """
        ...

    def close(self) -> None:
        """Stop what is still going on."""
        ...


def make_engine(name: str = "local", jobs: int | None = None) -> Engine:
    """The engine of that name: "local" or "ray" (an ImportError names the extra, where Ray is missing)."""
    if name == "ray":
        return RayEngine(jobs)
    if name != "local":
        raise ValueError(f"engine should be local or ray. Found engine = {name!r}.")
    return LocalEngine(1 if jobs is None else jobs)
