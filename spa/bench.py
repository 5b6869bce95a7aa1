"""How fast several models run, compared fairly: interleaved in one process, on the same inputs.

A machine drifts (heat, neighbours, clock), so timing one model after the other compares moments, not models. Here
each round times every model once, in a random order, and models are compared within rounds. Sessions are opened anew
several times, because one session can be luckier than another of the same model for all of its life.
Memory is measured in a fresh process for each model, so that one model's figures do not contain another's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from spa.errors import ModelError, RuntimeFailure, UsageError
from spa.feeds import check_feeds, load_feeds, runnable_feeds
from spa.footprint import Memory, memory_of
from spa.runtime import Array, Provider, Session, open_session, provider_of, run, runner, runtime_version
from spa.signature import InputSpec, as_ir, inputs_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BenchReport", "Comparison", "Latency", "Memory", "ModelBench", "Verdict", "bench", "report_table"]

Verdict = Literal["faster", "slower", "no measurable difference"]
Progress = Callable[[int, int], None]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONFIDENCE = 0.95
"""Of the intervals of ratios."""
SMALLEST_EFFECT = 0.02
"""Ratios closer to 1 are not called a difference: two copies of one model differ by about as much."""
_MIN_ROUNDS = 5
_BLOCKS = 8
_SECONDS_PER_TURN = 0.01  # shorter runs are repeated within a round
_MAX_RUNS_PER_ROUND = 200
_RESAMPLES = 2000
_MEASURED = (
    "latency is the wall time of one run call, with copies of inputs and outputs to and from the device; "
    "memory is the process's resident host memory, in a fresh process for each model"
)


@dataclass(frozen=True)
class Latency:
    """Times of one run, in milliseconds, over the rounds."""

    median_ms: float
    """Half of the rounds were faster."""
    p10_ms: float
    """One round in ten was faster."""
    p90_ms: float
    """Nine rounds in ten were faster."""
    min_ms: float
    """The fastest round."""
    mad_ms: float
    """Spread: median absolute deviation from the median."""
    rounds_ms: tuple[float, ...]
    """The time of one run in each round, in order; rounds with the same place are paired across models."""
    runs_per_round: int
    """How many runs each round's time is the median of; more than 1 for fast models."""


@dataclass(frozen=True)
class Comparison:
    """One model against the first, from the same rounds."""

    speedup: float
    """Median over the rounds of (time of the first model) / (time of this one); above 1 is faster."""
    low: float
    """Lower end of the confidence interval of `speedup`."""
    high: float
    """Upper end of the confidence interval of `speedup`."""
    confidence: float
    """Probability that the interval is made for, such as 0.95."""
    verdict: Verdict
    """What the interval says: a difference only if all of it lies beyond `SMALLEST_EFFECT`."""


@dataclass(frozen=True)
class ModelBench:
    """All figures of one model."""

    name: str
    """As given by the caller."""
    file_bytes: int
    """Size of the model, with its external data."""
    provider: Literal["cpu", "cuda"]
    """What it really ran on."""
    latency: Latency
    """Times of one run."""
    throughput: float
    """Samples per second at the median latency."""
    memory: Memory | None
    """Host memory; None if it was not asked for or the system does not tell."""
    versus_first: Comparison | None
    """Against the first model; None for the first model itself."""


@dataclass(frozen=True)
class BenchReport:
    """The result of `bench`."""

    models: tuple[ModelBench, ...]
    """One for each model, in the order given."""
    batch: int
    """Samples in one run: size of axis 0 of the first input that has axes, else 1."""
    inputs: Mapping[str, tuple[int, ...]]
    """Shape of each input."""
    rounds: int
    """Rounds that were timed."""
    blocks: int
    """How many times the sessions were opened anew, each for a part of the rounds."""
    threads: int
    """Threads inside one operator, as asked for; 0: chosen by ONNX Runtime."""
    seed: int
    """Of the made-up inputs, the order in each round, and the confidence intervals."""
    runtime: str
    """ONNX Runtime's version."""
    cpu: str
    """The processor's model name."""
    cores: int
    """Processors this process may use."""
    measured: str
    """What the figures mean, in a sentence."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


# ---- the run ----------------------------------------------------------------------------------------------------


def bench(
    models: Sequence[Path | bytes],
    names: Sequence[str],
    *,
    provider: Provider = "auto",
    threads: int = 0,
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: Path | Mapping[str, Array] | None = None,
    repeats: int = 50,
    warmup: int = 3,
    seconds: float | None = None,
    seed: int = 0,
    memory: bool = True,
    progress: Progress | None = None,
) -> BenchReport:
    """Time `models` against the first of them.

    Args:
        models: files, or serialised models without external data; all with the same inputs.
        names: one for each, to be used in the report.
        provider: see `spa.runtime.open_session`.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
        batch: size of axis 0 of every input, where the model leaves it open.
        dims: sizes of symbols for made-up inputs (`spa.feeds.make_feeds`).
        inputs: an .npz file or arrays by input name; made up if None.
        repeats: rounds at most.
        warmup: untimed runs of each model before the first round.
        seconds: stop after about this time, but not before 8 rounds; None for no limit. Memory is extra.
        seed: of everything random.
        memory: also measure memory, which opens each model once more in its own process.
        progress: called with (rounds done, rounds at most) after each round.

    Raises:
        ModelError: a model cannot be read; the message begins with its name.
        RuntimeFailure: a model cannot be opened or run; the message begins with its name.
        UsageError: an argument is wrong, or the models have different inputs.
    """
    _check_arguments(models, names, repeats, warmup, seconds)
    subject = _Subject(tuple(models), tuple(names), provider, threads)
    feeds = _feeds(subject, batch, dims or {}, inputs, seed)
    schedule = _Schedule(repeats, warmup, seconds, progress)
    times, blocks, runs, used = _measure(subject, feeds, schedule, np.random.default_rng(seed))
    samples = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    rows = tuple(
        ModelBench(
            name=name,
            file_bytes=_file_bytes(models[i]),
            provider=used[i],
            latency=_latency(times[i], runs),
            throughput=samples / float(np.median(times[i])),
            memory=_memory(subject, i, feeds) if memory else None,
            versus_first=_compare(times[0], times[i], blocks, np.random.default_rng(seed)) if i else None,
        )
        for i, name in enumerate(names)
    )
    return BenchReport(
        models=rows,
        batch=samples,
        inputs={name: tuple(array.shape) for name, array in feeds.items()},
        rounds=len(blocks),
        blocks=len(set(blocks.tolist())),
        threads=threads,
        seed=seed,
        runtime=runtime_version(),
        cpu=_cpu_name(),
        cores=_cores(),
        measured=_MEASURED,
    )


def _check_arguments(
    models: Sequence[Path | bytes], names: Sequence[str], repeats: int, warmup: int, seconds: float | None
) -> None:
    if not models:
        raise UsageError("bench needs at least one model.")
    if len(names) != len(models) or len(set(names)) != len(names):
        raise UsageError(f"bench needs one distinct name for each of its {len(models)} models, not {list(names)}.")
    if repeats < _MIN_ROUNDS:
        raise UsageError(f"repeats must be {_MIN_ROUNDS} or more to tell a spread, not {repeats}.")
    if warmup < 0:
        raise UsageError(f"warmup must be 0 or more, not {warmup}.")
    if seconds is not None and not seconds > 0:
        raise UsageError(f"seconds must be above 0, not {seconds}.")


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Say which model a failure is about."""
    try:
        yield
    except (RuntimeFailure, ModelError) as error:
        raise type(error)(f"{name}: {error}") from error


@dataclass(frozen=True)
class _Subject:
    """What is compared, and on what."""

    models: tuple[Path | bytes, ...]
    names: tuple[str, ...]
    provider: Provider
    threads: int

    def open(self, index: int) -> Session:
        """A session for one of the models. Raises: RuntimeFailure that names it."""
        with _about(self.names[index]):
            return open_session(self.models[index], provider=self.provider, threads=self.threads, deterministic=False)

    def warm(self, index: int, session: Session, feeds: Mapping[str, Array], runs: int) -> Callable[[], object]:
        """Run untimed, at least once, and return the call to time. Raises: RuntimeFailure that names the model."""
        with _about(self.names[index]):
            for _ in range(max(runs, 1)):
                run(session, feeds)
        return runner(session, feeds)


@dataclass(frozen=True)
class _Schedule:
    """How long to measure; see `bench`."""

    repeats: int
    warmup: int
    seconds: float | None
    progress: Progress | None


# ---- inputs -----------------------------------------------------------------------------------------------------


def _feeds(
    subject: _Subject,
    batch: int | None,
    dims: Mapping[str, int],
    inputs: Path | Mapping[str, Array] | None,
    seed: int,
) -> dict[str, Array]:
    """What every model is run on: given, or made up so that the first model runs."""
    models, names = subject.models, subject.names
    specs = []
    for model, name in zip(models, names, strict=True):
        with _about(name):
            specs.append(inputs_of(model))
    if inputs is not None and (batch is not None or dims):
        raise UsageError("batch and dims are for made-up inputs: leave them out where inputs are given.")
    if isinstance(inputs, Path):
        feeds = load_feeds(inputs, specs[0])
    elif inputs is not None:
        feeds = dict(inputs)
    else:
        sizes = {**batch_dims(specs[0], batch, names[0]), **dims}
        with _about(names[0]):
            feeds = runnable_feeds(models[0], subject.open(0), seed, sizes)
    for name, own in zip(names, specs, strict=True):
        if {spec.name for spec in own} != set(feeds):
            raise UsageError(
                f"{name} has the inputs {_listed(spec.name for spec in own)} but {_listed(feeds)} are to be fed: "
                "compare models with the same inputs."
            )
        check_feeds(feeds, own, f"the common input of {names[0]} and {name}" if name != names[0] else "the input")
    return feeds


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def batch_dims(specs: Sequence[InputSpec], batch: int | None, name: str) -> dict[str, int]:
    """`batch` as sizes for `make_feeds`. Raises: UsageError if a model fixes another one."""
    sizes: dict[str, int] = {}
    for spec in specs if batch is not None else ():
        first = spec.shape[0] if spec.shape else 0
        if not spec.shape or batch is None:
            continue
        if isinstance(first, int) and first != batch:
            raise UsageError(f"batch is {batch}, but {name} fixes axis 0 of input {spec.name!r} to {first}.")
        if not isinstance(first, int):
            sizes[first or f"{spec.name}:0"] = batch
    return sizes


# ---- time -------------------------------------------------------------------------------------------------------


def _measure(
    subject: _Subject, feeds: Mapping[str, Array], schedule: _Schedule, rng: np.random.Generator
) -> tuple[Floats, Ints, int, list[Literal["cpu", "cuda"]]]:
    """Seconds per run as `[model, round]`, the block of each round, runs per round, and providers.

    Where a session's memory and threads happen to lie makes it faster or slower for as long as it lives, so the rounds
    are split in blocks, each with sessions of its own: that luck becomes visible as a difference between blocks.
    """
    blocks = min(_BLOCKS, schedule.repeats)
    rounds: list[list[float]] = []
    block_of: list[int] = []
    runs = 0
    used: list[Literal["cpu", "cuda"]] = []
    start = time.perf_counter()
    for block in range(blocks):
        sessions = {int(index): subject.open(index) for index in rng.permutation(len(subject.models))}
        calls = [subject.warm(i, sessions[i], feeds, schedule.warmup) for i in range(len(sessions))]
        if block == 0:
            used = [provider_of(sessions[i]) for i in range(len(sessions))]
            runs = _runs_per_round(calls)
        wanted = schedule.repeats * (block + 1) // blocks
        end = math.inf if schedule.seconds is None else start + schedule.seconds * (block + 1) / blocks
        first = len(rounds)
        while len(rounds) < wanted and (len(rounds) == first or time.perf_counter() < end):
            rounds.append(_round(calls, subject.names, runs, rng))
            block_of.append(block)
            if schedule.progress is not None:
                schedule.progress(len(rounds), schedule.repeats)
        del sessions, calls  # before the next ones need memory
    return np.array(rounds, dtype=np.float64).T, np.array(block_of, dtype=np.int64), runs, used


def _runs_per_round(calls: Sequence[Callable[[], object]]) -> int:
    """The same for all models, or the comparison would be biased."""
    slowest = max(_time(call, 3) for call in calls)
    return int(np.clip(np.ceil(_SECONDS_PER_TURN / slowest), 1, _MAX_RUNS_PER_ROUND))


def _round(
    calls: Sequence[Callable[[], object]], names: Sequence[str], runs: int, rng: np.random.Generator
) -> list[float]:
    """Time every model once, in a random order."""
    row = [0.0] * len(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in rng.permutation(len(calls)):
            with _about(names[index]):
                calls[index]()  # untimed: the caches still hold the previous model
                row[index] = _time(calls[index], runs)
    finally:
        if collecting:
            gc.enable()
    return row


def _time(call: Callable[[], object], count: int) -> float:
    """Seconds of one run: the median of `count`, so that an interrupted one does not count."""
    clock = time.perf_counter_ns
    marks = [clock()]
    for _ in range(count):
        call()
        marks.append(clock())
    return max(float(np.median(np.diff(marks))), 1.0) * 1e-9


def _latency(seconds: Floats, runs: int) -> Latency:
    ms = seconds * 1e3
    median = float(np.median(ms))
    return Latency(
        median_ms=median,
        p10_ms=float(np.percentile(ms, 10)),
        p90_ms=float(np.percentile(ms, 90)),
        min_ms=float(ms.min()),
        mad_ms=float(np.median(np.abs(ms - median))),
        rounds_ms=tuple(float(value) for value in ms),
        runs_per_round=runs,
    )


def _compare(first: Floats, other: Floats, blocks: Ints, rng: np.random.Generator) -> Comparison:
    """Median of the ratios within rounds: a slow moment slows both models of a round.

    The interval is a bootstrap over blocks, and over the rounds of each: rounds of one block are not independent.
    """
    ratios = first / other
    groups = [ratios[blocks == block] for block in np.unique(blocks)]
    medians = np.empty(_RESAMPLES)
    for k in range(_RESAMPLES):
        drawn = [groups[block] for block in rng.integers(0, len(groups), size=len(groups))]
        medians[k] = np.median(np.concatenate([rng.choice(group, size=len(group)) for group in drawn]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    verdict: Verdict = "no measurable difference"
    if low > 1 + SMALLEST_EFFECT:
        verdict = "faster"
    elif high < 1 - SMALLEST_EFFECT:
        verdict = "slower"
    return Comparison(float(np.median(ratios)), float(low), float(high), CONFIDENCE, verdict)


def _memory(subject: _Subject, index: int, feeds: Mapping[str, Array]) -> Memory | None:
    with _about(subject.names[index]):
        return memory_of(subject.models[index], feeds, provider=subject.provider, threads=subject.threads)


# ---- the machine and the table ----------------------------------------------------------------------------------


def _file_bytes(model: Path | bytes) -> int:
    if isinstance(model, bytes):
        return len(model)
    graphs = as_ir(model).graphs()
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    others = {model.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(path.stat().st_size for path in {model, *others})


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report_table(report: BenchReport) -> Table:
    """The report as a `rich` table, one row for each model."""
    from rich.table import Table

    threads = report.threads or "auto"
    table = Table(
        title=f"batch {report.batch}, {report.rounds} rounds, threads {threads}, onnxruntime {report.runtime}",
        caption=f"{report.cpu}, {report.cores} cores",
    )
    table.add_column("model", overflow="fold")
    for heading in ("median ms", "p10 - p90", "samples/s", "file", "memory peak"):
        table.add_column(heading, justify="right")
    table.add_column("speed against the first")
    for model in report.models:
        latency, memory = model.latency, model.memory
        table.add_row(
            f"{model.name} ({model.provider})",
            f"{latency.median_ms:.3g}",
            f"{latency.p10_ms:.3g} - {latency.p90_ms:.3g}",
            f"{model.throughput:,.0f}" if model.throughput >= 10 else f"{model.throughput:.2g}",
            _size(model.file_bytes),
            "-" if memory is None else _size(memory.peak),
            _sentence(model.versus_first),
        )
    return table


def _sentence(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    interval = f"{comparison.speedup:.2f}x [{comparison.low:.2f}, {comparison.high:.2f}]"
    return f"{interval} {comparison.verdict}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
