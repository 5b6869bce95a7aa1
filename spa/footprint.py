"""Memory that a model takes, measured in a fresh process so that nothing else is in the figures."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spa.errors import RuntimeFailure
from spa.runtime import Array, Provider, open_session, run, runtime_version

__all__ = ["Memory", "memory_of"]

_RUNS = 3  # the first run allocates most, the second what depends on the first


@dataclass(frozen=True)
class Memory:
    """Resident host memory, in bytes, of a process that does nothing but open one model and run it."""

    session: int
    """Added by opening the session: weights, as ONNX Runtime lays them out, and the graph."""
    running: int
    """Added by running it: activations and work space that stay allocated."""
    peak: int
    """The most there ever was above the process before the session was opened, loading included."""
    open_seconds: float
    """Time it took to open the session."""


def memory_of(
    model: Path | bytes, feeds: Mapping[str, Array], *, provider: Provider = "auto", threads: int = 0
) -> Memory | None:
    """Open `model` and run it on `feeds` in a fresh process; None where the system does not tell (no /proc).

    Raises: RuntimeFailure if that process fails.
    """
    with tempfile.TemporaryDirectory(prefix="spa-memory-") as folder:
        path = Path(folder) / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            path = model.resolve()
        task = Path(folder) / "task.pickle"
        task.write_bytes(pickle.dumps((path, dict(feeds), provider, threads)))
        child = _spawn(task)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1].rstrip(".")
        raise RuntimeFailure(f"the process that measures memory failed ({last}): try without measuring memory.")
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    return None if answer is None else Memory(**answer)


def _spawn(task: Path) -> subprocess.CompletedProcess[str]:
    """This same Python and the same packages, but none of this process's memory."""
    search = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    code = "import sys; from spa.footprint import _child; _child(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", code, str(task)],
        env={**os.environ, "PYTHONPATH": search},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _child(task: str) -> None:
    """Run in the fresh process; prints the fields of `Memory` as JSON, or null."""
    path, feeds, provider, threads = pickle.loads(Path(task).read_bytes())
    runtime_version()  # loads ONNX Runtime: its own size is not the model's
    gc.collect()
    with contextlib.suppress(OSError):  # forget the peak of starting up
        Path("/proc/self/clear_refs").write_text("5")
    before, _ = _resident()
    start = time.perf_counter()
    session = open_session(path, provider=provider, threads=threads, deterministic=False)
    opened = time.perf_counter() - start
    loaded, _ = _resident()
    for _ in range(_RUNS):
        run(session, feeds)
    after, peak = _resident()
    if before is None or loaded is None or after is None or peak is None:
        print("null")
        return
    memory = Memory(max(loaded - before, 0), max(after - loaded, 0), max(peak - before, 0), opened)
    print(json.dumps(asdict(memory)))


def _resident() -> tuple[int | None, int | None]:
    """Resident bytes of this process, now and at most so far; None where there is no /proc.

    `resource.getrusage` will not do: its maximum is inherited from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return sizes.get("VmRSS"), sizes.get("VmHWM")
