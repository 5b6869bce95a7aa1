"""Time the models of a kit, operator by operator. Needs onnxruntime and numpy only, and is copied into every kit.

    python measure.py [--provider cpu] [--threads 1] [-o result.json]

Every model of the kit is run in turns with the dense one, so that a slow moment of the machine slows both, in several
passes over all models in different orders. ONNX Runtime's profiler tells how long each operator of the *optimised*
graph took: these are the kernels that really run, with their layouts and with what is fused into them. What is done
is kept in a journal: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

FORMAT = 1
DENSE = "dense"
PASSES = 2
SECONDS = 0.1
"""Per model and pass, once with the profiler and once without; the dense model takes as long again."""
_RUNS = (8, 200)
_TURN = 0.01
_FAST = 0.1
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_SUFFIX = "_kernel_time"


class Weights(TypedDict):
    """What a file of made-up weights must be."""

    kind: str
    """float32, float16, bfloat16, float64 or bytes."""
    bytes: int


class KitError(Exception):
    """The kit cannot be measured here; says why."""


def measure(
    folder: Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    passes: int = PASSES,
    seconds: float = SECONDS,
    journal: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure all models of a kit.

    Args:
        folder: the kit: `kit.json`, `inputs.npz` and the models.
        provider: `cpu` or `cuda`.
        threads: inside one operator; 0 lets ONNX Runtime choose.
        passes: over all models.
        seconds: of running one model in one pass.
        journal: where finished models are noted, one line of JSON each.
        progress: called with (done, total).

    Returns:
        What `spa profile --import` reads.

    Raises:
        KitError: a model cannot be run here.
    """
    kit = json.loads((folder / "kit.json").read_text(encoding="utf-8"))
    if kit.get("format") != FORMAT:
        raise KitError(f"{folder}: the kit has format {kit.get('format')}, expected {FORMAT}; make it anew")
    prepare(folder, kit["weights"])
    with np.load(folder / "inputs.npz", allow_pickle=False) as stored:
        feeds = {name: stored[name] for name in kit["inputs"]}
    key = {**machine(provider, threads), "batch": kit["batch"], "dtype": kit["dtype"]}
    header = {"format": FORMAT, "about": kit["about"], "key": key}
    records = _read(journal, header) if journal is not None else []
    done = {(r["pass"], r["id"]) for r in records}
    todo = [(p, name) for p in range(passes) for name in _order(kit["models"], p) if (p, name) not in done]
    total, ready = passes * len(kit["models"]), passes * len(kit["models"]) - len(todo)
    progress(ready, total)
    dense = None
    for k, (number, name) in enumerate(todo):
        if dense is None:
            dense = Subject(folder / f"{DENSE}.onnx", feeds, provider, threads)
        record = {
            "pass": number,
            "id": name,
            **_record(dense, folder / f"{name}.onnx", feeds, provider, threads, seconds),
        }
        records.append(record)
        if journal is not None:
            with open(journal, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        progress(ready + k + 1, total)
    return {**header, "records": records}


def _order(names: Sequence[str], number: int) -> list[str]:
    return [names[k] for k in np.random.default_rng(number).permutation(len(names))]


def _read(journal: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a stopped run has measured; a journal of something else is begun anew, a torn last line is dropped."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    if not found or found[0] != dict(header):
        found = [dict(header)]
    text = "".join(json.dumps(entry) + "\n" for entry in found)
    journal.write_text(text, encoding="utf-8")
    return found[1:]


class Subject:
    """A model ready to run.

    Args:
        path: of the model.
        feeds: its inputs.
        provider: `cpu` or `cuda`.
        threads: inside one operator; 0 lets ONNX Runtime choose.
        profile: prefix of the file that the profiler writes; None for no profiler.

    Raises:
        KitError: it cannot be run.
    """

    def __init__(
        self, path: Path, feeds: Mapping[str, Any], provider: str, threads: int, profile: Path | None = None
    ) -> None:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.clock = _clock(provider, threads)
        try:
            self.session = ort.InferenceSession(str(path), options, providers=_PROVIDERS[provider])
            if self.session.get_providers()[0] != _PROVIDERS[provider][0]:
                raise KitError(f"provider {provider} does not work here: choose another one, or install what it needs")
            names = [output.name for output in self.session.get_outputs()]
            if provider == "cpu":
                self.call: Callable[[], object] = lambda: self.session.run(names, feeds)
            else:
                binding = self.session.io_binding()
                for name, array in feeds.items():
                    binding.bind_cpu_input(name, array)
                for name in names:
                    binding.bind_output(name)
                self.call = lambda: self.session.run_with_iobinding(binding)
            for _ in range(3):
                self.call()
        except KitError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions are private and share no base
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KitError(f"{path.name} cannot be run by ONNX Runtime here ({first})") from error

    def times(self, runs: int) -> list[float]:
        """Milliseconds of several runs, after one that is not timed."""
        self.call()
        marks = [self.clock()]
        for _ in range(runs):
            self.call()
            marks.append(self.clock())
        return [max(t * 1e-6, 1e-6) for t in np.diff(marks).tolist()]


def _clock(provider: str, threads: int) -> Callable[[], int]:
    """What is read before and after a run, in nanoseconds.

    With one thread on the CPU it is the time that the thread itself computed: that of the wall, less what others on the
    machine took.
    """
    alone = provider == "cpu" and threads == 1
    return (
        time.thread_time_ns if alone and time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter_ns
    )


def compare(dense: Subject, other: Subject, seconds: float) -> tuple[float, float]:
    """Milliseconds of the dense model and of another one, in turns for about twice so many seconds.

    The tenth part of the runs that were faster tells: on a machine with other work many runs are interrupted.
    """
    once = min(other.times(3)) * 1e-3
    runs = int(np.clip(_TURN / once, 1, _RUNS[1]))
    turns = int(np.clip(seconds / (once * (runs + 1)), _RUNS[0], 100))
    times = [(dense.times(runs), other.times(runs)) for _ in range(turns)]
    first, second = (np.concatenate([pair[k] for pair in times]) for k in (0, 1))
    return float(np.quantile(first, _FAST)), float(np.quantile(second, _FAST))


def _record(
    dense: Subject, path: Path, feeds: Mapping[str, Any], provider: str, threads: int, seconds: float
) -> dict[str, Any]:
    """One model: its operators, and its time beside that of the dense model."""
    with tempfile.TemporaryDirectory(prefix="spa-profile-") as folder:
        subject = Subject(path, feeds, provider, threads, Path(folder) / "trace")
        once = min(subject.times(3)) * 1e-3
        for _ in range(int(np.clip(seconds / once, *_RUNS))):
            subject.call()
        trace = Path(subject.session.end_profiling())
        operators = _operators(json.loads(trace.read_text(encoding="utf-8")))
    reference, own = compare(dense, subject, seconds)
    return {"dense_ms": reference, "ms": own, "operators": operators}


def _operators(events: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """[node, operator, shapes of inputs, shapes of outputs, microseconds] in the order of execution.

    The time is the mean of the faster half of the runs: the clock counts whole microseconds, so that a median of
    short operators would be too coarse, and interruptions only ever add.
    """
    found: dict[tuple[str, Any], list[Any]] = {}
    times: dict[tuple[str, Any], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
            continue
        args = event["args"]
        key = (name.removesuffix(_SUFFIX), args.get("node_index"))
        shapes = [
            [f"{dtype}{dims}".replace(" ", "") for entry in args.get(side, ()) for dtype, dims in entry.items()]
            for side in ("input_type_shape", "output_type_shape")
        ]
        found[key] = [key[0], args["op_name"], *shapes]
        times.setdefault(key, []).append(float(event["dur"]))
    out = []
    for key, entry in found.items():
        ordered = np.sort(times[key])
        out.append([*entry, float(ordered[: max(len(ordered) // 2, 1)].mean())])
    return out


# -- what the kit holds ---------------------------------------------------------------------------------------------


def prepare(folder: Path, sizes: Mapping[str, Weights]) -> None:
    """Write made-up numbers that all models share; what they are makes no difference to how long they take."""
    rng = np.random.default_rng(0)
    for name, entry in sizes.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            continue
        temporary = path.with_name(f".{name}.tmp")
        with open(temporary, "wb") as file:
            left = entry["bytes"]
            while left > 0:
                piece = _numbers(rng, entry["kind"], min(left, 1 << 24))
                file.write(piece)
                left -= len(piece)
        os.replace(temporary, path)


def _numbers(rng: np.random.Generator, kind: str, count: int) -> bytes:
    """`count` bytes of small numbers of a type."""
    if kind in ("float32", "bfloat16"):
        values = (rng.standard_normal(count // 2 + 2) * 0.05).astype("<f4")
        data = values.tobytes() if kind == "float32" else (values.view("<u4") >> 16).astype("<u2").tobytes()
    elif kind == "float16":
        data = (rng.standard_normal(count // 2 + 2) * 0.05).astype("<f2").tobytes()
    elif kind == "float64":
        data = (rng.standard_normal(count // 8 + 2) * 0.05).astype("<f8").tobytes()
    else:
        data = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
    return data[:count]


def machine(provider: str, threads: int) -> dict[str, Any]:
    """Where models are run."""
    return {
        "device": _device(provider),
        "runtime": f"onnxruntime {importlib.import_module('onnxruntime').__version__}",
        "provider": provider,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }


def _device(provider: str) -> str:
    if provider == "cuda":
        import subprocess

        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "CUDA device"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for label in ("model name", "Hardware", "Processor"):
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith(label)), "")
        if found:
            return found
    return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """As a script."""
    parser = argparse.ArgumentParser(description="Time the models of this kit with ONNX Runtime.")
    parser.add_argument("--provider", choices=sorted(_PROVIDERS), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="inside one operator; 0: ONNX Runtime's choice")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of running each model in each pass")
    parser.add_argument("-o", "--output", type=Path, default=Path("result.json"))
    options = parser.parse_args(arguments)
    output: Path = options.output

    def show(done: int, total: int) -> None:
        print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        result = measure(
            Path(__file__).resolve().parent,
            provider=options.provider,
            threads=options.threads,
            passes=options.passes,
            seconds=options.seconds,
            journal=output.with_name(output.name + ".journal"),
            progress=show,
        )
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, output)
    output.with_name(output.name + ".journal").unlink(missing_ok=True)
    print(f"wrote {output}: give it to `spa profile --import`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
