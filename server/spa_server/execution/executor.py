"""Where jobs are done: by processes of this machine, or by the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from spa_server.config import Config, seconds, size
from spa_server.execution.folders import Folders
from spa_server.execution.process import Ending, Limits, Process
from spa_server.held import Held

__all__ = ["Executor", "Processes", "Report", "Work", "executor_of"]

Report = Callable[[Mapping[str, Any]], None]
"""Told what a worker says, but for its end."""


class Work(Protocol):
    """One job at work."""

    job: Held

    def stop(self) -> None:
        """Ask it to stop; it is killed if it does not."""

    def kill(self, ending: Ending) -> None:
        """End it now, for this reason."""

    async def run(self, folders: Folders, files: Mapping[str, Path]) -> Ending:
        """Do the job; results are in `folders.output` then. Raises: OSError if that cannot be begun."""


class Executor(Protocol):
    """Begins work. Belongs to one event loop."""

    @property
    def ready(self) -> bool:
        """Whether jobs can be begun now."""

    async def start(self) -> None:
        """Get ready. Raises: SpaError if what is needed is not there."""

    def work(self, job: Held, report: Report) -> Work:
        """One job, which begins when it is run."""

    async def close(self) -> None:
        """Let go of everything; all work has ended."""


class Processes:
    """Processes of this machine."""

    ready = True

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def start(self) -> None:
        """Nothing is needed."""

    def work(self, job: Held, report: Report) -> Work:
        """One job, which begins when it is run."""
        return Process(job, self._limits, report)

    async def close(self) -> None:
        """Nothing is held."""


def executor_of(config: Config, server: str) -> Executor:
    """What the configuration names.

    Args:
        config: what was said.
        server: name of this server; the same after it was started again.

    Raises:
        UsageError: what it needs is not installed.
    """
    workers = config.workers
    limits = Limits(
        size(workers.memory),
        int(seconds(workers.cpu_time)),
        seconds(workers.time),
        size(workers.file),
        workers.threads,
    )
    if config.executor == "process":
        return Processes(limits)
    from spa_server.cluster.cluster import Cluster, Needs

    needs = Needs(workers.cpus, workers.gpus, limits.memory)
    return Cluster(config.executor, limits, needs, workers.folder or f"spa-{server}", seconds(config.retention.cache))
