"""A job on a node of a Ray cluster: its files come in, its worker is started and watched, its results go out.

The worker is the process that a server without a cluster starts, with the same limits. What is here runs in a process
of Ray around it, takes its place among the node's resources, and reads no model.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spa.jobs import read
from spa.version import __version__
from spa_server.execution.folders import Folders, prepare, written
from spa_server.execution.process import Ending, Limits, Process
from spa_server.held import Held

__all__ = ["INPUTS", "Node"]

INPUTS = "in"
"""Folder of an attempt that holds the job's files."""
_LISTEN = 1.0
"""Seconds for which a question what there is to say waits for an answer."""


class Node:
    """One attempt at a job. Its methods are called from several threads at the same time."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        """
        Args:
            order: `job` (id, owner, attempt, spec), `version` of the server, `folder`, `limits`, `files` (reference ->
                path below the folder of inputs), `keep` (seconds for which what was left here is kept; 0: for ever).
        """
        self._order = order
        self._folders: Folders | None = None
        self._process: Process | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said: list[Mapping[str, Any]] = []
        self._news = threading.Condition()
        self._stopped = self._over = False

    def begin(self) -> str:
        """Make the folders; what is in the way of the job, or nothing. Raises: OSError."""
        if self._order["version"] != __version__:
            return f"a node of the cluster has spa {__version__}, the server {self._order['version']}; install the same"
        root = Path(tempfile.gettempdir(), self._order["folder"])
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._order["keep"]:
            _clean(root, time.time() - self._order["keep"])
        job = self._order["job"]
        held = Held(job["id"], job["owner"], read(job["spec"]), job["attempt"], "", {})
        self._folders = prepare(root, held)
        self._process = Process(held, Limits(**self._order["limits"]), self._hear)
        return ""

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Put a piece of an input in place. Raises: OSError."""
        assert self._folders is not None
        path = self._folders.attempt / INPUTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            while data:
                done = os.pwrite(handle, data, offset)
                data, offset = data[done:], offset + done
        finally:
            os.close(handle)

    def run(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Do the job: how it ended, and the sizes of the files that it left. Raises: OSError."""
        assert self._folders is not None
        assert self._process is not None
        inputs = self._folders.attempt / INPUTS
        files = {name: inputs / path for name, path in self._order["files"].items()}
        try:
            ending = asyncio.run(_watched(self._process, self._folders, files, self._runs_in))
        finally:
            with self._news:
                self._over, self._loop = True, None
                self._news.notify_all()
        paths = written(self._folders, self._process.job.spec) if ending.kind == "done" else []
        output = self._folders.output
        return asdict(ending), {path.relative_to(output).as_posix(): path.stat().st_size for path in paths}

    def said(self) -> tuple[list[Mapping[str, Any]], bool]:
        """What the worker said since the last time, soon; and whether there is more to come."""
        assert self._folders is not None
        os.utime(self._folders.attempt.parent)  # in use: see `_clean`
        with self._news:
            if not self._said and not self._over:
                self._news.wait(_LISTEN)
            said, self._said = self._said, []
            return said, not self._over

    def stop(self) -> None:
        """Ask the worker to stop; it is killed if it does not."""
        with self._news:
            self._stopped = True
            if self._loop is not None and self._process is not None:
                self._loop.call_soon_threadsafe(self._process.stop)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A piece of a result. Raises: OSError."""
        assert self._folders is not None
        with open(self._folders.output / name, "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def end(self, *, work: bool) -> None:
        """Remove what is not needed any more; with `work` also what another attempt would go on with."""
        if self._folders is not None:
            self._folders.remove(work=work)

    def _runs_in(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._news:
            self._loop = loop
            if self._stopped and self._process is not None:
                self._process.stop()

    def _hear(self, said: Mapping[str, Any]) -> None:
        with self._news:
            if "stage" in said and self._said and "stage" in self._said[-1]:
                self._said.pop()
            self._said.append(said)
            self._news.notify_all()


async def _watched(
    process: Process,
    folders: Folders,
    files: Mapping[str, Path],
    begun: Callable[[asyncio.AbstractEventLoop], None],
) -> Ending:
    """No method: Ray would give a class with a coroutine an event loop of its own, and call all methods there."""
    begun(asyncio.get_running_loop())
    return await process.run(folders, files)


def _clean(root: Path, before: float) -> None:
    """Remove what jobs left here that ended elsewhere, and measurements that nobody used for long."""
    for path in (*root.glob("jobs/*"), *root.glob("cache/*/*")):
        try:
            if max(path.stat().st_mtime, path.stat().st_atime if path.is_file() else 0.0) < before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:  # another job is doing the same
            continue
