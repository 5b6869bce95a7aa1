"""Where the time of a run goes: nodes as ONNX Runtime executes them, after its own fusions, by its profiler."""

from __future__ import annotations

import bisect
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from spa.runtime import Array, open_session, run
from spa.signature import as_ir

RUNS = 5
"""That are profiled, if nothing else is asked for; the first one comes on top."""
_NODES = 200
"""Slowest nodes that are kept."""
_SECONDS = 0.2  # of profiled runs of fast models: the profiler's clock counts whole microseconds
_MOST = 50
_SUFFIX = "_kernel_time"
_GIVEN = {"Constant"}
"""Operators that only hold data: no runtime executes them."""


@dataclass(frozen=True)
class NodeTime:
    """One node as ONNX Runtime executes it, after its own fusions."""

    name: str
    operator: str
    ms: float
    """Median over the runs, milliseconds; all iterations of a loop together."""


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one type of operator."""

    operator: str
    ms: float
    """Milliseconds of one run."""
    nodes: int
    """That are executed; those with one name in different subgraphs count once. 0: all are fused into others, or were
    computed when the model was opened."""
    in_file: int
    """Nodes in the model's file. 0: the runtime made them, by a fusion or for another layout of the data."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one run goes, by the profiler's own clock: it takes time itself, so the sum is too much."""

    operators: tuple[OperatorTime, ...]
    """Slowest first."""
    nodes: tuple[NodeTime, ...]
    """The slowest ones, slowest first."""
    runs: int
    """Runs that times are medians of."""


def profile(
    model: Path | bytes, feeds: Mapping[str, Array], *, threads: int = 0, expected_ms: float | None = None
) -> Profile:
    """Profile one model on the CPU, in runs of its own.

    Args:
        model: file, or serialised model without external data.
        feeds: its inputs.
        threads: inside one operator; 0 lets ONNX Runtime choose.
        expected_ms: of one run; fast models are run more often.

    Raises:
        RuntimeFailure: the model does not run.
    """
    runs = RUNS if expected_ms is None else int(np.clip(_SECONDS * 1e3 / expected_ms, RUNS, _MOST))
    nodes = node_times(model, feeds, threads=threads, runs=runs)
    return Profile(tuple(_by_operator(nodes, _in_file(model))), tuple(nodes[:_NODES]), runs)


def _in_file(model: Path | bytes) -> Counter[str]:
    """How many nodes of each type the file has, in subgraphs and local functions, too."""
    loaded = as_ir(model)
    bodies: list[ir.Graph | ir.Function] = [*loaded.graphs(), *loaded.functions.values()]
    types = Counter(node.op_type for body in bodies for node in body)
    own = {function.name for function in loaded.functions.values()}
    return Counter({name: count for name, count in types.items() if name not in _GIVEN | own})


def _by_operator(nodes: Iterable[NodeTime], in_file: Mapping[str, int]) -> list[OperatorTime]:
    spent: dict[str, list[NodeTime]] = {name: [] for name in in_file}
    for node in nodes:
        spent.setdefault(node.operator, []).append(node)
    rows = [
        OperatorTime(name, sum(node.ms for node in found), len(found), in_file.get(name, 0))
        for name, found in spent.items()
    ]
    return sorted(rows, key=lambda row: (-row.ms, row.operator))


def node_times(
    model: Path | bytes, feeds: Mapping[str, Array], *, threads: int = 0, runs: int = RUNS
) -> list[NodeTime]:
    """Time of each node in one run on the CPU, by ONNX Runtime's profiler; slowest first.

    Raises:
        RuntimeFailure: the model does not run.
    """
    with tempfile.TemporaryDirectory(prefix="spa-") as folder:
        session = open_session(
            model, provider="cpu", threads=threads, deterministic=False, profile=Path(folder) / "trace"
        )
        written = ""
        try:
            for _ in range(runs + 1):  # the first one also places memory
                run(session, feeds)
        finally:
            written = session.end_profiling()
        events = json.loads(Path(written).read_text(encoding="utf-8", errors="replace"))
    return times_of(events)


def times_of(events: Iterable[Mapping[str, Any]]) -> list[NodeTime]:
    """Median time per node over all runs but the first, from a trace; slowest first."""
    complete = [e for e in events if e.get("ph") == "X"]
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if e["name"] == "model_run")[1:]
    starts = [start for start, _ in runs]
    spent: dict[tuple[str, str], np.ndarray[Any, np.dtype[np.float64]]] = {}
    for event in complete:
        name = str(event["name"])
        if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
            continue
        k = bisect.bisect_right(starts, event["ts"]) - 1
        if k >= 0 and event["ts"] < runs[k][1]:
            key = name.removesuffix(_SUFFIX), str(event.get("args", {}).get("op_name", ""))
            spent.setdefault(key, np.zeros(len(runs)))[k] += event["dur"] / 1e3
    found = [NodeTime(*key, float(np.median(times))) for key, times in spent.items()]
    return sorted(found, key=lambda node: -node.ms)
