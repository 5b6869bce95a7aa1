"""What the benchmarks share: clocks, worker processes, tables, machine facts."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that `spa` is found where it is not installed


@dataclass(frozen=True)
class Times:
    """Medians over repeats, in seconds."""

    cpu: float
    wall: float
    low: float
    """Smallest CPU time."""
    high: float
    """Largest CPU time."""
    repeats: int

    @staticmethod
    def of(rows: Sequence[Sequence[float]]) -> Times:
        """From (cpu, wall) pairs."""
        cpu, wall = [row[0] for row in rows], [row[1] for row in rows]
        return Times(statistics.median(cpu), statistics.median(wall), min(cpu), max(cpu), len(rows))


def clock(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds (all threads of this process), wall seconds, and the result."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return time.process_time() - cpu, time.perf_counter() - wall, result


class Worker:
    """A process that answers JSON lines with JSON lines; see `serve`."""

    def __init__(self, python: str, script: Path, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        """One answer, or {"error": ...} (also when the process died)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process died (exit code {self.process.wait()})", "dead": True}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer questions on stdin until it closes; whatever else prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except BaseException as error:
            reply = {"error": brief(error)}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


def brief(error: BaseException) -> str:
    """The error's kind and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def machine() -> dict[str, Any]:
    """Facts about this machine and run."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"date": date.today().isoformat(), "cpu": name, "cores": cores, "python": platform.python_version()}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(headings), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headings))]
    rule = ["-" * (w + 2) if not k else "-" * (w + 1) + ":" for k, w in enumerate(widths)]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def seconds(value: float | None) -> str:
    """For a table."""
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def write(path: Path | None, body: dict[str, Any]) -> None:
    """Keep the figures."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **body}, indent=1, default=str) + "\n")
