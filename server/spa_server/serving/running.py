"""One batch on one session: join, run, split. Runs in a thread; knows no event loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from spa.errors import RuntimeFailure
from spa.runtime import run
from spa_server.serving.codec import Array
from spa_server.serving.errors import InvalidRequest, RunFailed, ServingError
from spa_server.serving.stoppable import StoppableSession
from spa_server.serving.waiting import Request

__all__ = ["Outcome", "Ran", "execute"]

Outcome: TypeAlias = dict[str, Array] | ServingError


@dataclass(frozen=True)
class Ran:
    """What one run of the runtime was."""

    rows: int
    requests: int
    join_ns: int
    run_ns: int
    split_ns: int


def execute(session: StoppableSession, batch: Sequence[Request]) -> tuple[list[Outcome], list[Ran]]:
    """An answer or an error for each request, and the runs that succeeded.

    A batch that fails is run again one by one: nobody's request fails for what another one holds. (If it was stopped,
    its single runs end at once, too.)
    """
    try:
        answers, ran = _together(session, batch)
    except ServingError as error:
        if len(batch) == 1:
            return [error], []
    else:
        return list(answers), [ran]
    outcomes: list[Outcome] = []
    runs: list[Ran] = []
    for request in batch:
        alone, more = execute(session, [request])
        outcomes += alone
        runs += more
    return outcomes, runs


def _together(session: StoppableSession, batch: Sequence[Request]) -> tuple[list[dict[str, Array]], Ran]:
    start = time.perf_counter_ns()
    rows = sum(request.rows for request in batch)
    names = list(dict.fromkeys(name for request in batch for name in request.outputs))
    feeds = _joined(batch)
    joined = time.perf_counter_ns()
    outputs = _run(session, feeds, names)
    ran = time.perf_counter_ns()
    answers = [outputs] if len(batch) == 1 else _split(outputs, batch, rows)
    split = time.perf_counter_ns()
    return answers, Ran(rows, len(batch), joined - start, ran - joined, split - ran)


def _joined(batch: Sequence[Request]) -> Mapping[str, Array]:
    first = batch[0].feeds
    if len(batch) == 1:
        return first
    return {name: np.concatenate([request.feeds[name] for request in batch]) for name in first}


def _run(session: StoppableSession, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    try:
        return run(session.session, feeds, names)
    except RuntimeFailure as error:
        # the only hint at whose fault it is: an index out of range and the like are invalid arguments
        kind = InvalidRequest if "INVALID_ARGUMENT" in str(error) else RunFailed
        raise kind(str(error)) from error
    except MemoryError as error:
        raise RunFailed("there is not enough memory to run this request.") from error


def _split(outputs: Mapping[str, Array], batch: Sequence[Request], rows: int) -> list[dict[str, Array]]:
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != rows:
            raise RunFailed(f"output {name!r} of {rows} joined rows has shape {list(array.shape)}.")
    answers, start = [], 0
    for request in batch:
        answers.append({name: outputs[name][start : start + request.rows] for name in request.outputs})
        start += request.rows
    return answers
