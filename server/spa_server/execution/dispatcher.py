"""Takes jobs from the queue and sees to it that each of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from spa_server.blobs import Blobs, digest_of
from spa_server.config import Config, seconds, size
from spa_server.database import Database, contents, queue
from spa_server.execution.executor import Executor, Work
from spa_server.execution.folders import Folders, placed, prepare, written
from spa_server.execution.process import Ending
from spa_server.held import Held, StoredFile

__all__ = ["Dispatcher"]

_log = logging.getLogger("spa_server.jobs")
_LOOK = 0.5
"""Seconds between two looks at the queue, and at what was cancelled through other servers."""
_TELL = 0.25
"""Seconds between two writes of a job's events at first; the longer a job runs, the fewer there are."""
_PATIENCE = 120.0
"""Seconds for which a result is tried to be written while database or store do not answer."""
T = TypeVar("T")


@dataclass
class _Running:
    work: Work
    told: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    stage: Mapping[str, Any] | None = None

    def take(self) -> list[Mapping[str, Any]]:
        """Events that were not written yet."""
        bodies = [*self.metrics, *([] if self.stage is None else [self.stage])]
        self.metrics, self.stage = [], None
        return bodies

    def hear(self, said: Mapping[str, Any]) -> None:
        if "metric" in said:
            self.metrics.append(said)
        else:
            self.stage = said
        self.told.set()


class Dispatcher:
    """Runs up to so many jobs at the same time. Belongs to one event loop."""

    def __init__(
        self,
        config: Config,
        database: Database,
        blobs: Blobs,
        executor: Executor,
        server: str,
        changed: Callable[[str], None],
    ) -> None:
        """
        Args:
            config: what was said.
            database: where jobs are.
            blobs: where files are.
            executor: begins them.
            server: name of this server; the same after it was started again.
            changed: told the id of a job to which something happened.
        """
        workers = config.workers
        self._database, self._blobs, self._data, self._changed = database, blobs, config.data, changed
        self._server, self._holder = server, f"{server}/{secrets.token_hex(4)}"
        self._count, self._attempts, self._lease = workers.count, workers.attempts, seconds(workers.lease)
        self._at_once, self._quota = config.quotas.running, size(config.quotas.bytes)
        self._executor = executor
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._poked = asyncio.Event()
        self._draining = False

    async def start(self) -> None:
        """Take back what this server had when it died, and begin. Raises: SpaError if the executor cannot."""
        if self._count:
            await self._executor.start()
        for id_ in await asyncio.to_thread(queue.expire, self._database, self._attempts, self._server):
            _log.warning("begun again: jobs/%s", id_)
        if self._count:
            self._loops = [asyncio.create_task(loop()) for loop in (self._take, self._beat)]

    def poke(self) -> None:
        """There may be something to do."""
        self._poked.set()

    def stop(self, id_: str) -> None:
        """The job was cancelled."""
        if id_ in self._running:
            self._running[id_].work.stop()

    @property
    def running(self) -> int:
        """Jobs at work here."""
        return len(self._running)

    async def drain(self, patience: float) -> None:
        """Take no more jobs, let those at work end, and give back those that do not in time."""
        self._draining = True
        self.poke()
        await asyncio.wait(self._loops[:1] or [asyncio.create_task(asyncio.sleep(0))], timeout=_PATIENCE)
        if self._tasks and patience > 0:
            await asyncio.wait(self._tasks, timeout=patience)
        for running in list(self._running.values()):
            running.work.kill(Ending("died", "drained", "the server was stopped"))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PATIENCE)
        for loop in self._loops:
            loop.cancel()
        await self._executor.close()

    async def _take(self) -> None:
        while not self._draining:
            try:
                expire = partial(queue.expire, self._database, self._attempts, alive=list(self._running))
                for id_ in await asyncio.to_thread(expire):
                    self._changed(id_)
                await self._fill()
            except Exception as error:  # a database that does not answer now may do so later
                _log.error("the queue cannot be read (%s); trying again", _first(error))
            self._poked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), _LOOK)

    async def _fill(self) -> None:
        while len(self._running) < self._count and self._executor.ready and not self._draining:
            job = await asyncio.to_thread(queue.claim, self._database, self._holder, self._lease, self._at_once)
            if job is None:
                return
            self._begin(job)

    def _begin(self, job: Held) -> None:
        running = _Running(work=self._executor.work(job, lambda said: running.hear(said)))
        self._running[job.id] = running
        self._changed(job.id)
        task = asyncio.create_task(self._see_through(job, running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _beat(self) -> None:
        """Signs of life, and orders that came through other servers."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK)
            held = {id_: running.work for id_, running in self._running.items()}
            if not held:
                continue
            try:
                if time.monotonic() - renewed > self._lease / 4:
                    jobs = [work.job for work in held.values()]
                    stop, lost = await asyncio.to_thread(queue.renew, self._database, jobs, self._lease)
                    renewed = time.monotonic()
                    for id_ in lost & set(self._running):
                        held[id_].kill(Ending("died", "taken", "another server has the job"))
                else:
                    stop = await asyncio.to_thread(queue.asked_to_stop, self._database, list(held))
            except Exception as error:  # a database that does not answer now may do so before the leases end
                _log.error("leases cannot be renewed (%s); trying again", _first(error))
                continue
            for id_ in stop:
                held[id_].stop()

    async def _see_through(self, job: Held, running: _Running) -> None:
        folders: Folders | None = None
        work = True
        try:
            _log.info("begun: jobs/%s (%s, attempt %d)", job.id, job.spec.kind, job.attempt)
            teller = asyncio.create_task(self._tell(job, running))
            try:
                folders = await asyncio.to_thread(prepare, self._data, job)
                files = await self._patiently(partial(placed, self._blobs, job, folders), FileNotFoundError)
                ending = await running.work.run(folders, files)
            except OSError as error:
                _log.error("jobs/%s: no files (%s)", job.id, error)
                what = error.strerror or type(error).__name__
                ending = Ending("died", "storage", f"the server could not give the job its files ({what})")
            finally:
                teller.cancel()
            work = await self._conclude(job, running, folders, ending)
        except Exception as error:  # its lease runs out, and it is begun again
            _log.exception("jobs/%s could not be ended (%s)", job.id, _first(error))
            work = False
        finally:
            if folders is not None:
                await asyncio.to_thread(partial(folders.remove, work=work))
            del self._running[job.id]
            self._changed(job.id)
            self.poke()

    async def _conclude(self, job: Held, running: _Running, folders: Folders | None, ending: Ending) -> bool:
        """Write how it ended; whether the job's own folder is not needed any more."""
        if bodies := running.take():
            await self._patiently(partial(queue.append, self._database, job, bodies))
        if ending.kind == "done" and folders is not None:
            ending = await self._publish(job, folders)
        _log.info("ended: jobs/%s %s %s %s", job.id, ending.kind, ending.code, ending.message)
        if ending.stderr and ending.kind in ("failed", "died"):
            _log.info("jobs/%s printed: %s", job.id, ending.stderr[-4000:])
        match ending.kind:
            case "failed":
                await self._patiently(partial(queue.fail, self._database, job, ending.code, ending.message))
            case "cancelled":
                await self._patiently(partial(queue.stop, self._database, job))
            case "died":
                again = partial(queue.give_back, self._database, job, ending.code, ending.message)
                await self._patiently(partial(again, counts=ending.code != "drained", attempts=self._attempts))
                return False
        return True

    async def _publish(self, job: Held, folders: Folders) -> Ending:
        try:
            files = await self._patiently(partial(self._store, job, folders))
        except OSError as error:
            return Ending("failed", "storage", f"the results could not be stored ({error.strerror or 'no answer'})")
        if isinstance(files, Ending):
            return files
        await self._patiently(partial(queue.finish, self._database, job, files))
        return Ending("done")

    def _store(self, job: Held, folders: Folders) -> list[StoredFile] | Ending:
        """Put results into the store. A second call goes on where the first failed."""
        paths = written(folders, job.spec)
        total = sum(path.stat().st_size for path in paths)
        if self._quota:
            with self._database.read() as connection:
                used = contents.used(connection, job.owner)
            if used + total > self._quota:
                return Ending("failed", "bytes", f"the results ({total} bytes) are above your quota of {self._quota}")
        files = []
        for path in paths:
            sha256, name, length = digest_of(path), path.relative_to(folders.output).as_posix(), path.stat().st_size
            if not contents.announce(self._database, sha256, length) or not self._blobs.has(sha256):
                copy = folders.temporary / f"publish-{sha256}"
                copy.unlink(missing_ok=True)
                os.link(path, copy)  # the store takes the file; this one stays for another try
                self._blobs.put(copy, sha256)
            contents.confirm(self._database, job.owner, sha256)
            files.append(StoredFile(name, sha256, length))
        return files

    async def _patiently(self, call: Callable[[], T], hopeless: type[Exception] | tuple[()] = ()) -> T:
        """Try for a while: what was worked out is not thrown away because a database is being restarted."""
        until, pause = time.monotonic() + _PATIENCE, 0.2
        while True:
            try:
                return await asyncio.to_thread(call)
            except Exception as error:  # raised again if it is hopeless, or takes too long
                if time.monotonic() > until or isinstance(error, hopeless):
                    raise
                _log.warning("cannot be written now (%s); trying again", _first(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _tell(self, job: Held, running: _Running) -> None:
        start = time.monotonic()
        while True:
            await running.told.wait()
            running.told.clear()
            bodies = running.take()
            try:
                await asyncio.to_thread(queue.append, self._database, job, bodies)
            except Exception as error:  # progress is not worth waiting for
                _log.warning("events of jobs/%s cannot be written now (%s)", job.id, _first(error))
                running.metrics[:0] = [body for body in bodies if "metric" in body]
            self._changed(job.id)
            await asyncio.sleep(max(_TELL, (time.monotonic() - start) / 200))


def _first(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
