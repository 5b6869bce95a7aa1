"""The server's end of a Ray cluster: jobs go to the agent, and what becomes of them comes back."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spa.errors import SpaError, UsageError
from spa.jobs import to_json
from spa.version import __version__
from spa_server.cluster.node import INPUTS
from spa_server.execution.executor import Report
from spa_server.execution.folders import Folders
from spa_server.execution.process import Ending, Limits
from spa_server.held import Held

__all__ = ["Cluster", "Needs"]

_log = logging.getLogger("spa_server.cluster")
_LINE = 1 << 20
_PAUSES = (1.0, 2.0, 5.0, 15.0)
"""Seconds between two tries to reach a cluster that went away."""
_STDERR = 64 << 10
_OWN = ("SPA_", "AWS_", "PG")
"""Of the server's environment: settings, and keys to its store and database."""
_CONNECT, _BEGIN = 40.0, 120.0
"""Seconds that a cluster has to answer, and one to be started; Ray itself would try for minutes."""
_CLOSE = 15.0
"""Seconds that the agent has to end."""


@dataclass(frozen=True)
class Needs:
    """What a job takes of a node's resources while it runs, as Ray counts them."""

    cpus: float
    gpus: float
    memory: int
    """Bytes."""


class Cluster:
    """An executor whose work is done by the nodes of a Ray cluster."""

    def __init__(self, address: str, limits: Limits, needs: Needs, folder: str, keep: float) -> None:
        """
        Args:
            address: `ray` (the cluster of this machine, or RAY_ADDRESS), `ray://local` (one that is started for this
                server), `ray://HOST:PORT`.
            limits: of a worker.
            needs: of a worker.
            folder: of the nodes, for files of jobs; a relative one is below the folder for temporary files.
            keep: seconds for which nodes keep what nobody used; 0 for ever.

        Raises:
            UsageError: Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:
            raise UsageError(f"executor: {address} needs Ray; install spa-prune[ray], or say `executor: process`")
        threads = limits.threads or max(1, int(needs.cpus))
        self._address, self._needs, self._folder, self._keep = address, needs, folder, keep
        self._limits = {**asdict(limits), "threads": threads}
        self._works: dict[str, _Work] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the cluster is connected."""
        return self._ready

    async def start(self) -> None:
        """Connect. Raises: SpaError if there is no such cluster."""
        problem = await self._connect()
        if problem:
            raise SpaError(
                f"executor: {self._address}: no connection to a Ray cluster ({problem}); start one with "
                "`ray start --head`, or say ray://local"
            )
        self._keeper = asyncio.create_task(self._keep_connected())

    def work(self, job: Held, report: Report) -> _Work:
        """One job, which begins when it is run."""
        return _Work(job, report, self)

    async def close(self) -> None:
        """Disconnect; a cluster that was started for this server ends."""
        self._closing.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _CLOSE if self._ready else 0)
            _end(self._process)
        if self._keeper is not None:
            await self._keeper

    async def do(self, key: str, work: _Work, folders: Folders, files: Mapping[str, Path]) -> Ending:
        """Hand a job over, and wait for its end."""
        job, inputs = work.job, folders.attempt / INPUTS
        order = {
            "job": {"id": job.id, "owner": job.owner, "attempt": job.attempt, "spec": to_json(job.spec)},
            "version": __version__,
            "folder": self._folder,
            "limits": self._limits,
            "files": {reference: path.relative_to(inputs).as_posix() for reference, path in files.items()},
            "keep": self._keep,
        }
        if not self._ready:
            return _LOST
        self._works[key] = work
        try:
            paths = {"inputs": str(inputs), "output": str(folders.output)}
            self.say({"start": key, "order": order, "needs": asdict(self._needs), **paths})
            return await work.ended
        finally:
            del self._works[key]

    def say(self, body: Mapping[str, Any]) -> None:
        """Tell the agent something."""
        pipe = None if self._process is None else self._process.stdin
        if pipe is not None and not pipe.is_closing():
            pipe.write((json.dumps(body) + "\n").encode())

    async def _connect(self) -> str:
        """Start an agent; why it cannot reach the cluster, or nothing."""
        # Secrets of the server stay here: the agent may start a cluster, whose processes have its environment.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "spa_server.cluster.agent", self._address,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environment, start_new_session=True, limit=_LINE,
        )  # fmt: skip
        self._stderr = asyncio.create_task(_tail(process))
        assert process.stdout is not None
        patience = _BEGIN if self._address == "ray://local" else _CONNECT
        try:
            line = await asyncio.wait_for(process.stdout.readline(), patience)
        except TimeoutError:
            _end(process)
            return f"no answer within {patience:.0f} seconds"
        said = json.loads(line) if line else {"error": _last(await self._stderr) or "the agent ended"}
        self._ready = "ready" in said
        return str(said.get("error", ""))

    async def _keep_connected(self) -> None:
        while True:
            await self._listen()
            self._ready = False
            for work in list(self._works.values()):
                work.end(_LOST)
            if self._closing.is_set():
                return
            _log.error(
                "the connection to the cluster is lost (%s); trying again", _last(await self._stderr) or "killed"
            )
            tries = 0
            while not self._closing.is_set() and (problem := await self._connect()):
                _log.error("no connection to the cluster (%s); trying again", problem)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), _PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1

    async def _listen(self) -> None:
        """Until the agent ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            body = json.loads(line)
            work = self._works.get(body["job"])
            if work is None:
                continue
            if "said" in body:
                work.hear(body["said"])
            else:
                work.end(Ending(**body["ended"]))
        await self._process.wait()
        _end(self._process)


class _Work:
    """One job at work in the cluster."""

    def __init__(self, job: Held, report: Report, cluster: Cluster) -> None:
        self.job, self._report, self._cluster = job, report, cluster
        self._key = f"{job.id}/{job.attempt}"
        self._stopped = False
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """Ask it to stop; it is killed if it does not."""
        if not self._stopped:
            self._stopped = True
            self._cluster.say({"stop": self._key})

    def kill(self, ending: Ending) -> None:
        """End it now, for this reason."""
        self._cluster.say({"kill": self._key})
        self.end(ending)

    async def run(self, folders: Folders, files: Mapping[str, Path]) -> Ending:
        """Do the job."""
        if self._stopped:
            return Ending("cancelled")
        if self.ended.done():  # killed before it began
            return self.ended.result()
        self._report({"stage": {"stage": "cluster", "done": 0, "total": 1}})
        return await self._cluster.do(self._key, self, folders, files)

    def hear(self, said: Mapping[str, Any]) -> None:
        """The worker said something."""
        self._report(said)

    def end(self, ending: Ending) -> None:
        """It has ended."""
        if self.ended.done():
            return
        # Where a node was killed because it did not stop in time, it could not say that it was asked to.
        self.ended.set_result(Ending("cancelled") if self._stopped and ending.kind == "died" else ending)


_LOST = Ending("died", "cluster", "the connection to the cluster was lost")


def _end(agent: asyncio.subprocess.Process) -> None:
    """It, and what a cluster that it had started leaves behind when it is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)


async def _tail(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    kept = b""
    while piece := await process.stderr.read(4096):
        kept = (kept + piece)[-_STDERR:]
    return kept.decode(errors="replace")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
