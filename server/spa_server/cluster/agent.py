"""The process that talks to Ray for a server: `python -m spa_server.cluster.agent ADDRESS`, started by the server only.

Ray ends the process of its client when a cluster does not answer for long, which a server should survive. Orders come
as lines of JSON through the standard input, answers leave through what was the standard output:

    in   {"start": KEY, "order": ..., "inputs": DIR, "output": DIR, "needs": {...}}, {"stop": KEY}, {"kill": KEY}
    out  {"ready": true} or {"error": TEXT}, {"job": KEY, "said": ...}, {"job": KEY, "ended": ...}

The end of the input says that the server has died or is done: Ray then ends everything that was begun through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import ray

from spa_server.cluster.node import Node

__all__ = ["main"]

_PIECE = 4 << 20
"""Bytes of a file that travel at a time."""
_FLIGHT = 4
"""Pieces of one job that are on their way at the same time."""
_LINE = 64 << 20
_POLITE = 1.5
"""Seconds that a node has to stop a job; callers are promised two in all."""
_THREADS = _FLIGHT + 4
"""Calls that a node takes at the same time: pieces, `run`, `said`, `stop`."""


class _Job:
    """One attempt at a job, from here."""

    def __init__(self, call: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None]) -> None:
        self._key, self._order, self._say = call["start"], call["order"], say
        self._inputs, self._output = Path(call["inputs"]), Path(call["output"])
        self._begun = False
        needs = call["needs"]
        self._node = (
            ray.remote(Node)
            .options(
                num_cpus=needs["cpus"],
                num_gpus=needs["gpus"],
                memory=needs["memory"] or None,
                max_restarts=0,
                max_concurrency=_THREADS,
            )
            .remote(self._order)
        )

    async def see_through(self) -> None:
        """Until its end, which is told."""
        try:
            ended = await self._run()
        except ray.exceptions.RayActorError as error:
            ended = _ended("died", "crash", f"the process of Ray around the worker ended ({_first(error)})")
        except ray.exceptions.RayTaskError as error:
            kind = ("died", "storage") if isinstance(error.cause, OSError) else ("failed", "internal")
            ended = _ended(*kind, f"a node of the cluster could not do it ({_first(error.cause)})")
        except ConnectionError as error:  # a client of Ray's client server is not ended by Ray
            print(_first(error), file=sys.stderr, flush=True)
            os._exit(1)
        except (ray.exceptions.RayError, OSError) as error:
            ended = _ended("died", "cluster", f"the cluster could not do it ({_first(error)})")
        finally:
            with contextlib.suppress(Exception):  # there may be nobody who could be told
                self.kill()
        self._say({"job": self._key, "ended": ended})

    async def stop(self) -> None:
        """Ask it to stop, and end it if it does not."""
        if self._begun:
            self._node.stop.remote()
            await asyncio.sleep(_POLITE)
        self.kill()

    def kill(self) -> None:
        """End it now."""
        ray.kill(self._node)

    async def _run(self) -> Mapping[str, Any]:
        problem = await _got(self._node.begin.remote())
        self._begun = True
        if problem:
            return _ended("failed", "cluster", problem)
        await _together(self._sent(path) for path in sorted(self._inputs.rglob("*")) if path.is_file())
        run, more = self._node.run.remote(), True
        while more:
            said, more = await _got(self._node.said.remote())
            for body in said:
                self._say({"job": self._key, "said": body})
        ending, files = await _got(run)
        for name, size in files.items():
            await self._fetched(name, size)
        await _got(self._node.end.remote(work=ending["kind"] != "died"))
        return dict(ending)

    async def _sent(self, path: Path) -> None:
        name = path.relative_to(self._inputs).as_posix()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size

            async def send(offset: int) -> None:
                await _got(self._node.write.remote(name, offset, os.pread(file.fileno(), _PIECE, offset)))

            await _together(send(offset) for offset in range(0, max(size, 1), _PIECE))

    async def _fetched(self, name: str, size: int) -> None:
        path = self._output / name
        if ".." in path.parts or Path(name).is_absolute():
            raise OSError(f"a node named a file outside of the folder ({name!r})")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:

            async def fetch(offset: int) -> None:
                data = await _got(self._node.read.remote(name, offset, min(_PIECE, size - offset)))
                os.pwrite(file.fileno(), data, offset)

            await _together(fetch(offset) for offset in range(0, size, _PIECE))
        if path.stat().st_size != size:
            raise OSError(f"{name} came in part")


async def _serve(say: Callable[[Mapping[str, Any]], None]) -> None:
    """Until the server is gone."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    jobs: dict[str, _Job] = {}

    async def see_through(key: str) -> None:
        await jobs[key].see_through()
        del jobs[key]

    tasks = set[asyncio.Task[None]]()
    while line := await reader.readline():
        call = json.loads(line)
        if "start" in call:
            jobs[call["start"]] = _Job(call, say)
            task = asyncio.create_task(see_through(call["start"]))
        elif (known := jobs.get(call.get("stop") or call.get("kill"))) is None:
            continue
        elif "stop" in call:
            task = asyncio.create_task(known.stop())
        else:
            known.kill()
            continue
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _got(ref: Any) -> Any:
    return await asyncio.wrap_future(ref.future())


async def _together(calls: Iterable[Awaitable[None]]) -> None:
    """A few at a time."""
    under_way = set[asyncio.Future[None]]()
    for call in calls:
        if len(under_way) >= _FLIGHT:
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        under_way.add(asyncio.ensure_future(call))
    await asyncio.gather(*under_way)


def _ended(kind: str, code: str, message: str) -> dict[str, Any]:
    return {"kind": kind, "code": code, "message": message, "stderr": ""}


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def _connected(address: str) -> str:
    """Why there is no connection; empty if there is one."""
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    try:
        if address == "ray://local":
            ray.init(address="local", include_dashboard=False, **options)
        elif address == "ray":
            ray.init(address="auto", **options)
        else:
            ray.init(address=address, **options)
    except Exception as error:  # Ray raises many things here
        return _first(error)
    return ""


def main() -> int:
    """Connect, and work until the input ends."""
    pipe: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(body: Mapping[str, Any]) -> None:
        pipe.write(json.dumps(body) + "\n")
        pipe.flush()

    problem = _connected(sys.argv[1])
    if problem:
        say({"error": problem})
        return 1
    say({"ready": True})
    asyncio.run(_serve(say))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
