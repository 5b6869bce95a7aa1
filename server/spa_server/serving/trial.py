"""Opening a model once in a process of its own, with limits.

A file that makes ONNX Runtime crash, hang or take all memory shall not do so where requests are answered. Memory is
watched, not limited: where it is short ONNX Runtime leaves out what it would do elsewhere, such as large constants.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from spa.errors import SpaError
from spa.runtime import open_session
from spa_server.memory import resident
from spa_server.serving.errors import NotLoadable

__all__ = ["Trial", "try_opening"]

_REFUSED = 3
_LOOK_EVERY = 0.01  # seconds
_LONGEST = 1 << 16  # bytes of a complaint


@dataclass(frozen=True)
class Trial:
    """What opening a model may take."""

    seconds: float = 120.0
    """Time."""
    max_bytes: int = 8 << 30
    """Resident memory without mapped files, watched on Linux only; Python and ONNX Runtime alone take 0.1 GB."""


def try_opening(path: Path, trial: Trial) -> None:
    """Raises: NotLoadable if `path` cannot be opened on the CPU within the limits."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "spa_server.serving.trial", os.fspath(path)]
    with (
        tempfile.TemporaryFile() as complaint,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaint
        ) as child,
    ):
        problem = _watch(child, trial)
        if problem is not None:
            child.kill()
            raise NotLoadable(problem)
        if child.returncode != 0:
            complaint.seek(0)
            raise NotLoadable(_verdict(child.returncode, complaint.read(_LONGEST).decode(errors="replace")))


def _watch(child: subprocess.Popen[bytes], trial: Trial) -> str | None:
    """Wait for the child; what it exceeds, if it does."""
    end = time.monotonic() + trial.seconds
    while time.monotonic() < end:
        try:
            child.wait(_LOOK_EVERY)
        except subprocess.TimeoutExpired:
            if resident(child.pid) > trial.max_bytes:
                return f"opening it took more than {trial.max_bytes} bytes of memory."
        else:
            return None
    return f"opening it took more than {trial.seconds:g} s."


def _verdict(status: int, complaint: str) -> str:
    if status == _REFUSED:
        return complaint.strip()
    if status < 0:
        return f"ONNX Runtime was ended by {signal.Signals(-status).name} when it opened the model."
    return f"opening it in a process of its own failed with status {status}."


def _main(path: str) -> int:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        open_session(Path(path), provider="cpu", threads=1)
    except SpaError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(*sys.argv[1:]))
