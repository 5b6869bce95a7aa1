"""The process that does one job: `python -P -m spa_server.worker`, started by the server and by nobody else.

It knows no database, no store and no token: files of the job are where the first line of its input says. It reads
models that nobody vouches for, so it limits itself before it reads anything, and its parent watches it. Lines of JSON
go through what was its standard output; whatever libraries print goes to its standard error.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

_LOCK_WAIT = 30.0
"""Seconds that the worker of an attempt before has to be gone."""


def main() -> int:
    """Read the job, do it, say how it ended. The exit status is 0 if that was said."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    limit(job["limits"])
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    say = _Pipe(pipe)
    lock = _lock(Path(job["work"]))
    if lock is None:
        say.line({"error": {"code": "busy", "message": "a worker of an attempt before is still there"}})
        return 0
    say.line(_done(job, say, stop))
    return 0


def _done(job: Mapping[str, Any], say: _Pipe, stop: threading.Event) -> dict[str, Any]:
    """Do the job; what to say at the end."""
    from spa.errors import SpaError
    from spa.jobs import Event, JobCancelled, StageEvent, Store, read, run

    def emit(event: Event) -> None:
        kind = "stage" if isinstance(event, StageEvent) else "metric"
        say.line({kind: vars(event)})

    files = {name: Path(path) for name, path in job["files"].items()}
    store = Store(files, Path(job["output"]), Path(job["work"]), Path(job["cache"]))
    try:
        run(read(job["spec"]), store, emit, stop.is_set)
    except JobCancelled:
        return {"cancelled": True}
    except SpaError as error:
        return {"error": {"code": error.code, "message": _clean(str(error), job)}}
    except MemoryError:
        return {"error": {"code": "memory", "message": "the job needs more memory than workers have here"}}
    except Exception as error:  # the last line of defence: a job fails with a sentence
        import traceback

        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        message = f"internal error ({type(error).__name__}: {_clean(first, job)})"
        return {"error": {"code": "internal", "message": message}}
    return {"done": True}


def _clean(message: str, job: Mapping[str, Any]) -> str:
    """Callers see what they named, not where it is on this machine."""
    for reference, path in sorted(job["files"].items(), key=lambda item: -len(item[1])):
        message = message.replace(path, reference)
    return message.replace(f"{job['output']}/", "").replace(job["work"], "work")[:2000]


class _Pipe:
    """Lines to the parent."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def line(self, body: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(body) + "\n")
            self._file.flush()


def limit(limits: Mapping[str, int]) -> None:
    """Limits that the kernel keeps; memory that is really taken is watched by the parent besides."""
    cpu = limits["cpu_seconds"]
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_DATA, limits["data_bytes"]),
    ):
        if most or kind == resource.RLIMIT_CORE:
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with a sentence
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server


def _listen(stop: threading.Event) -> None:
    """A line asks to stop; the end of the input says that the server has died, and this worker goes with it."""
    for _ in sys.stdin:
        stop.set()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _lock(folder: Path) -> int | None:
    """The work folder is for one worker at a time."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    until = time.monotonic() + _LOCK_WAIT
    while time.monotonic() < until:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.1)
    return None


if __name__ == "__main__":
    sys.exit(main())
