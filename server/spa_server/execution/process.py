"""One worker process: started, fed, watched, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import spa
import spa_server
from spa.jobs import to_json
from spa_server.execution.folders import Folders
from spa_server.held import Held
from spa_server.memory import resident

__all__ = ["Ending", "Limits", "Process"]

_LINE = 1 << 20
_STDERR = 64 << 10
"""Bytes of what a worker printed that are kept for the log."""
_WATCH = 0.1
"""Seconds between two looks at memory."""
_POLITE = 1.2
"""Seconds that a worker has to stop by itself; callers are promised two in all."""
_RESERVED = 1 << 30
"""Bytes that libraries and threads ask for and never touch: the kernel counts them, the look at memory does not."""
_NO_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory", "memory allocation failed")
"""What is printed by those who end when they get no memory."""
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
"""Of the server's environment: nothing that could be a secret."""
_ROOTS = os.pathsep.join(dict.fromkeys(str(Path(str(p.__file__)).resolve().parents[1]) for p in (spa, spa_server)))
"""Where the code is, also where it runs from a checkout."""


@dataclass(frozen=True)
class Limits:
    """What a worker may take; 0 for no limit."""

    memory: int
    cpu_seconds: int
    seconds: float
    file_bytes: int
    threads: int


@dataclass(frozen=True)
class Ending:
    """How a worker ended."""

    kind: Literal["done", "failed", "cancelled", "died"]
    """`died`: for a reason that another attempt need not meet."""
    code: str = ""
    message: str = ""
    stderr: str = ""


class Process:
    """A worker for one job."""

    def __init__(self, job: Held, limits: Limits, report: Callable[[Mapping[str, Any]], None]) -> None:
        """
        Args:
            job: what to do.
            limits: what it may take.
            report: told what the worker says, but for its end.
        """
        self.job, self._limits, self._report = job, limits, report
        self._process: asyncio.subprocess.Process | None = None
        self._said: Mapping[str, Any] = {}
        self._killed: Ending | None = None
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ask it to stop; it is killed if it does not."""
        self._stop.set()

    def kill(self, ending: Ending) -> None:
        """End it now, for this reason."""
        if self._killed is None:
            self._killed = ending
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def run(self, folders: Folders, files: Mapping[str, Path]) -> Ending:
        """Do the job. Raises: OSError if there is no process to be had."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "spa_server.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            cwd=folders.temporary, env=self._environment(folders), start_new_session=True, limit=_LINE,
        )  # fmt: skip
        assert process.stdin is not None
        if self._killed is not None:
            self.kill(self._killed)
        stderr = asyncio.create_task(self._stderr())
        helpers = [asyncio.create_task(task) for task in (self._watch(), self._obey())]
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write((json.dumps(self._order(folders, files)) + "\n").encode())
                await process.stdin.drain()
            await self._listen()
            status = await process.wait()
        finally:
            for task in helpers:
                task.cancel()
            self.kill(self._killed or Ending("died", "lost", "the server stopped"))
        return self._ending(status, await stderr)

    def _order(self, folders: Folders, files: Mapping[str, Path]) -> dict[str, Any]:
        limits = self._limits
        return {
            "spec": to_json(self.job.spec),
            "files": {reference: str(path) for reference, path in files.items()},
            "output": str(folders.output),
            "work": str(folders.work),
            "cache": str(folders.cache),
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "file_bytes": limits.file_bytes,
                "data_bytes": 2 * limits.memory + _RESERVED if limits.memory else 0,
            },
        }

    def _environment(self, folders: Folders) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        threads = str(self._limits.threads)
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if self._limits.threads else ()
        home = str(folders.temporary)
        own = {"HOME": home, "TMPDIR": home, "PYTHONPATH": _ROOTS}
        return {**kept, **dict.fromkeys(names, threads), **own}

    async def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line without end
                self.kill(Ending("failed", "crash", "the worker said something that makes no sense"))
                return
            if not line:
                return
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if "stage" in said or "metric" in said:
                self._report(said)
            else:
                self._said = said

    async def _stderr(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        kept = b""
        while piece := await self._process.stderr.read(4096):
            kept = (kept + piece)[-_STDERR:]
        return kept.decode(errors="replace")

    async def _watch(self) -> None:
        """Memory and wall time."""
        assert self._process is not None
        limits, start = self._limits, time.monotonic()
        while True:
            if limits.memory and resident(self._process.pid) > limits.memory:
                message = f"the job took more than the {limits.memory / 1e6:.0f} MB of memory that workers have here"
                self.kill(Ending("failed", "memory", message))
            if limits.seconds and time.monotonic() - start > limits.seconds:
                self.kill(Ending("failed", "time", f"the job took longer than {limits.seconds:.0f} seconds"))
            await asyncio.sleep(_WATCH)

    async def _obey(self) -> None:
        await self._stop.wait()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(b"stop\n")
            await self._process.stdin.drain()
        await asyncio.sleep(_POLITE)
        self.kill(Ending("cancelled"))

    def _ending(self, status: int, stderr: str) -> Ending:
        said = self._said
        if self._killed is not None and self._killed.code != "lost":
            return Ending(self._killed.kind, self._killed.code, self._killed.message, stderr)
        if "done" in said:
            return Ending("done", stderr=stderr)
        if "cancelled" in said or self._stop.is_set():
            return Ending("cancelled", stderr=stderr)
        if "error" in said:
            kind: Literal["died", "failed"] = "died" if said["error"]["code"] == "busy" else "failed"
            return Ending(kind, said["error"]["code"], said["error"]["message"], stderr)
        if status == -signal.SIGXCPU:
            message = f"the job took more than {self._limits.cpu_seconds} seconds of processor time"
            return Ending("failed", "cpu-time", message, stderr)
        if status != 0 and any(sign in stderr for sign in _NO_MEMORY):
            message = (
                f"the job asked for more memory than the {self._limits.memory / 1e6:.0f} MB that workers have here"
            )
            return Ending("failed", "memory", message, stderr)
        if status < 0 and -status in _FAULTS:
            name = signal.Signals(-status).name
            return Ending("failed", "crash", f"the worker crashed ({name}); the model may be damaged", stderr)
        if status == -signal.SIGKILL:
            return Ending(
                "died", "crash", "the worker was killed, perhaps because the machine had no memory left", stderr
            )
        return Ending("died", "crash", f"the worker ended with status {status} and said nothing", stderr)
