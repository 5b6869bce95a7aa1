"""Timing sessions in turns: what is opened, warmed and called, and in which order."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from spa.bench.estimates import Floats, Ints
from spa.bench.figures import Copies
from spa.bench.machine import Clocks, clocks, read_clocks
from spa.errors import ModelError, RuntimeFailure
from spa.runtime import Array, Provider, Session, bound_runner, open_session, provider_of, runner

Progress = Callable[[int, int], None]

_BLOCKS = 8
_SECONDS_PER_TURN = 0.01  # shorter runs are repeated within a round
_MAX_RUNS_PER_ROUND = 200


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Say which model a failure is about."""
    try:
        yield
    except (RuntimeFailure, ModelError) as error:
        raise type(error)(f"{name}: {error}") from error


@dataclass(frozen=True)
class Subject:
    """What is compared, and on what."""

    models: tuple[Path | bytes, ...]
    names: tuple[str, ...]
    provider: Provider
    threads: int
    copies: Copies

    def open(self, index: int) -> Session:
        """A session for one of the models. Raises: RuntimeFailure that names it."""
        with about(self.names[index]):
            return open_session(self.models[index], provider=self.provider, threads=self.threads, deterministic=False)

    def warm(self, index: int, session: Session, feeds: Mapping[str, Array], runs: int) -> Callable[[], object]:
        """Run untimed, at least once, and return the call to time. Raises: RuntimeFailure that names the model."""
        bound = self.copies == "excluded" and provider_of(session) == "cuda"
        with about(self.names[index]):
            call = bound_runner(session, feeds) if bound else runner(session, feeds)
            for _ in range(max(runs, 1)):
                call()
        return call


@dataclass(frozen=True)
class Schedule:
    """How long to measure; see `spa.bench.measure.sweep`."""

    repeats: int
    warmup: int
    seconds: float | None
    progress: Progress | None


@dataclass(frozen=True)
class Times:
    """What was timed, in seconds."""

    rounds: Floats
    """`[model, round]`: the median run of each round."""
    runs: Floats
    """`[model, run]`: every run of all rounds, in order."""
    blocks: Ints
    """`[round]`: the block of each round."""
    runs_per_round: int
    providers: tuple[Literal["cpu", "cuda"], ...]
    """What each model really ran on."""
    clocks: Clocks | None


def measure(subject: Subject, feeds: Mapping[str, Array], schedule: Schedule, rng: np.random.Generator) -> Times:
    """Time all models in turns.

    Where a session's memory and threads happen to lie makes it faster or slower for as long as it lives, so the rounds
    are split in blocks, each with sessions of its own: that luck becomes visible as a difference between blocks.
    """
    blocks = min(_BLOCKS, schedule.repeats)
    rounds: list[Floats] = []
    block_of: list[int] = []
    runs = 0
    used: tuple[Literal["cpu", "cuda"], ...] = ()
    start = time.perf_counter()
    for block in range(blocks):
        sessions = {int(index): subject.open(index) for index in rng.permutation(len(subject.models))}
        calls = [subject.warm(i, sessions[i], feeds, schedule.warmup) for i in range(len(sessions))]
        if block == 0:
            used = tuple(provider_of(sessions[i]) for i in range(len(sessions)))
            runs = _runs_per_round(calls)
            before = read_clocks(gpu="cuda" in used)  # after warm-up: idle processors tell nothing
        wanted = schedule.repeats * (block + 1) // blocks
        end = math.inf if schedule.seconds is None else start + schedule.seconds * (block + 1) / blocks
        first = len(rounds)
        while len(rounds) < wanted and (len(rounds) == first or time.perf_counter() < end):
            rounds.append(_round(calls, subject.names, runs, rng))
            block_of.append(block)
            if schedule.progress is not None:
                schedule.progress(len(rounds), schedule.repeats)
        del sessions, calls  # before the next ones need memory
    found = np.stack(rounds, axis=1)
    return Times(
        rounds=np.median(found, axis=2),
        runs=found.reshape(len(found), -1),
        blocks=np.array(block_of, dtype=np.int64),
        runs_per_round=runs,
        providers=used,
        clocks=clocks(before, read_clocks(gpu="cuda" in used)),
    )


def _runs_per_round(calls: Sequence[Callable[[], object]]) -> int:
    """The same for all models, or the comparison would be biased."""
    slowest = max(float(np.median(_time(call, 3))) for call in calls)
    return int(np.clip(np.ceil(_SECONDS_PER_TURN / slowest), 1, _MAX_RUNS_PER_ROUND))


def _round(calls: Sequence[Callable[[], object]], names: Sequence[str], runs: int, rng: np.random.Generator) -> Floats:
    """Time every model `runs` times, model after model in a random order; seconds as `[model, run]`."""
    rows = np.empty((len(calls), runs))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in rng.permutation(len(calls)):
            with about(names[index]):
                calls[index]()  # untimed: the caches still hold the previous model
                rows[index] = _time(calls[index], runs)
    finally:
        if collecting:
            gc.enable()
    return rows


def _time(call: Callable[[], object], count: int) -> Floats:
    """Seconds of each of `count` runs."""
    clock = time.perf_counter_ns
    marks = [clock()]
    for _ in range(count):
        call()
        marks.append(clock())
    return np.maximum(np.diff(marks), 1) * 1e-9
