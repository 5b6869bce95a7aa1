"""Benchmarks of several models at one setting, or at several batch sizes and numbers of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from spa.bench.estimates import compare, latency
from spa.bench.figures import BenchReport, Copies, ModelBench
from spa.bench.machine import allowed, cpu_name
from spa.bench.operators import Profile, profile
from spa.bench.timing import Progress, Schedule, Subject, about, measure
from spa.errors import UsageError
from spa.feeds import check_feeds, load_feeds, runnable_feeds
from spa.footprint import Memory, memory_of
from spa.runtime import Array, Provider, runtime_version
from spa.signature import InputSpec, as_ir, inputs_of

_MIN_ROUNDS = 5
_COPIES: Mapping[str, str] = {
    "none": "",
    "included": ", with copies of inputs and outputs to and from the device",
    "excluded": ", inputs and outputs stay on the device and their copies are not in it",
}
_MEASURED = (
    "latency is the wall time of one run call{copies}; memory is the process's resident host memory, in a fresh "
    "process for each model"
)


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
    """Time `models` against the first of them, at one setting.

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
    (report,) = sweep(
        models,
        names,
        provider=provider,
        threads=(threads,),
        batches=(batch,),
        dims=dims,
        inputs=inputs,
        repeats=repeats,
        warmup=warmup,
        seconds=seconds,
        seed=seed,
        memory=memory,
        progress=progress,
    )
    return report


def sweep(
    models: Sequence[Path | bytes],
    names: Sequence[str],
    *,
    provider: Provider = "auto",
    threads: Sequence[int] = (0,),
    batches: Sequence[int | None] = (None,),
    dims: Mapping[str, int] | None = None,
    inputs: Path | Mapping[str, Array] | None = None,
    repeats: int = 50,
    warmup: int = 3,
    seconds: float | None = None,
    seed: int = 0,
    memory: bool = True,
    operators: bool = False,
    copies: Copies = "included",
    progress: Progress | None = None,
) -> tuple[BenchReport, ...]:
    """Time `models` against the first of them, at every number of threads and batch size.

    Args:
        models: as for `bench`.
        names: as for `bench`.
        provider: as for `bench`.
        threads: numbers of threads inside one operator; each is combined with each batch size.
        batches: sizes of axis 0 of every input, where the models leave it open; None leaves it to the model.
        dims: as for `bench`.
        inputs: as for `bench`; with them there is one batch size, theirs.
        repeats: as for `bench`, at each setting.
        warmup: as for `bench`, at each setting.
        seconds: as for `bench`, at each setting.
        seed: as for `bench`.
        memory: as for `bench`.
        operators: also profile each model, in runs of its own. On the CPU only: on a GPU the runtime's clock sees
            operators being launched, not run.
        copies: of inputs and outputs to and from a GPU: timed, or left out by binding both to the device. Without a
            GPU there are none.
        progress: called with (rounds done, rounds at most) after each round, over all settings.

    Returns:
        One report for each number of threads and, within it, each batch size.

    Raises:
        ModelError: a model cannot be read; the message begins with its name.
        RuntimeFailure: a model cannot be opened or run; the message begins with its name.
        UsageError: an argument is wrong, or the models have different inputs.
    """
    _check_arguments(models, names, repeats, warmup, seconds)
    _check_settings(threads, batches, copies)
    settings = list(itertools.product(threads, batches))
    if inputs is None:
        for batch in batches:  # before anything is measured
            with about(names[0]):
                batch_dims(inputs_of(models[0]), batch, names[0])
    reports = []
    for k, (count, batch) in enumerate(settings):
        subject = Subject(tuple(models), tuple(names), provider, count, copies)
        feeds = _feeds(subject, batch, dims or {}, inputs, seed)
        schedule = Schedule(repeats, warmup, seconds, _shifted(progress, k * repeats, len(settings) * repeats))
        reports.append(_report(subject, feeds, schedule, seed, memory, operators))
    return tuple(reports)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one setting as that of all."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _report(
    subject: Subject, feeds: Mapping[str, Array], schedule: Schedule, seed: int, memory: bool, operators: bool
) -> BenchReport:
    """All figures of one setting."""
    times = measure(subject, feeds, schedule, np.random.default_rng(seed))
    samples = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    first = times.rounds[0]
    rows = []
    for i, (name, own) in enumerate(zip(subject.names, times.rounds, strict=True)):
        row = ModelBench(
            name=name,
            file_bytes=_file_bytes(subject.models[i]),
            provider=times.providers[i],
            latency=latency(own, times.runs[i], times.runs_per_round),
            throughput=samples / float(np.median(own)),
            memory=_memory(subject, i, feeds) if memory else None,
            versus_first=compare(first, own, times.blocks, np.random.default_rng(seed)) if i else None,
        )
        rows.append(replace(row, profile=_profile(subject, i, feeds, row)) if operators else row)
    copies: Literal["none", "included", "excluded"] = subject.copies if "cuda" in times.providers else "none"
    return BenchReport(
        models=tuple(rows),
        batch=samples,
        inputs={name: tuple(array.shape) for name, array in feeds.items()},
        rounds=len(times.blocks),
        blocks=len(set(times.blocks.tolist())),
        threads=subject.threads,
        seed=seed,
        runtime=runtime_version(),
        cpu=cpu_name(),
        cores=len(allowed()),
        measured=_MEASURED.format(copies=_COPIES[copies]),
        warmup=schedule.warmup,
        copies=copies,
        clocks=times.clocks,
    )


def _memory(subject: Subject, index: int, feeds: Mapping[str, Array]) -> Memory | None:
    with about(subject.names[index]):
        return memory_of(subject.models[index], feeds, provider=subject.provider, threads=subject.threads)


def _profile(subject: Subject, index: int, feeds: Mapping[str, Array], row: ModelBench) -> Profile | None:
    if row.provider != "cpu":
        return None
    with about(row.name):
        return profile(subject.models[index], feeds, threads=subject.threads, expected_ms=row.latency.median_ms)


def _file_bytes(model: Path | bytes) -> int:
    if isinstance(model, bytes):
        return len(model)
    graphs = as_ir(model).graphs()
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    others = {model.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(path.stat().st_size for path in {model, *others})


# ---- arguments --------------------------------------------------------------------------------------------------


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


def _check_settings(threads: Sequence[int], batches: Sequence[int | None], copies: str) -> None:
    for what, values, least in (("threads", threads, 0), ("batch", [b for b in batches if b is not None], 1)):
        for value in values:
            if value < least:
                raise UsageError(f"{what} must be {least} or more, not {value}.")
            if values.count(value) > 1:
                raise UsageError(f"{what} {value} comes twice: give each value once.")
    if not threads or not batches:
        raise UsageError("a sweep needs at least one number of threads and one batch size (None for the model's own).")
    if copies not in ("included", "excluded"):
        raise UsageError(f"copies must be included or excluded, not {copies!r}.")


# ---- inputs -----------------------------------------------------------------------------------------------------


def _feeds(
    subject: Subject,
    batch: int | None,
    dims: Mapping[str, int],
    inputs: Path | Mapping[str, Array] | None,
    seed: int,
) -> dict[str, Array]:
    """What every model is run on: given, or made up so that the first model runs."""
    models, names = subject.models, subject.names
    specs = []
    for model, name in zip(models, names, strict=True):
        with about(name):
            specs.append(inputs_of(model))
    if inputs is not None and (batch is not None or dims):
        raise UsageError("batch and dims are for made-up inputs: leave them out where inputs are given.")
    if isinstance(inputs, Path):
        feeds = load_feeds(inputs, specs[0])
    elif inputs is not None:
        feeds = dict(inputs)
    else:
        sizes = {**batch_dims(specs[0], batch, names[0]), **dims}
        session = subject.open(0)
        with about(names[0]):
            feeds = runnable_feeds(models[0], session, seed, sizes)
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
