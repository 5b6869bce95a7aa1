"""From a measured kit to a table: which operators ran, how long they took, and which widths their sizes follow."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import UsageError
from spa.groups import Analysis
from spa.latency.design import CLASSES, Configuration
from spa.latency.device import DENSE, FORMAT
from spa.latency.sizes import Row, Widths, counts_of
from spa.latency.table import Key, Operator, Profile, Slot, Table

_SHAPE = re.compile(r"([a-z0-9()]+)\[([0-9,]*)\]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PLACED = re.compile(r"(_token_\d+|_nchwc)$")

_BELIEVED = 1.5
"""By how much operators may be off together; beyond it, much of a run is not in its operators."""
_LEAST = 0.05
"""Microseconds that no operator is shorter than."""

_Place = tuple[str, int, int, int]
"""(operator, its number among equal ones at this node, tensor, dimension)."""


@dataclass(frozen=True)
class _Ran:
    """An operator in one configuration."""

    op: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """(type, dimensions) of the inputs, then of the outputs."""
    inputs: int
    """How many of them are inputs."""
    microseconds: float


@dataclass(frozen=True)
class _Measured:
    """One configuration over all passes."""

    milliseconds: float
    nodes: Mapping[str, tuple[_Ran, ...]]
    """Node -> what ran there: the operator itself, and what the runtime put behind it (other layouts, casts)."""


def observed(result: Mapping[str, Any], analysis: Analysis, sha256: str) -> Table:
    """A table with one model.

    Args:
        result: of `spa.latency.device.measure`.
        analysis: of the model.
        sha256: of the model file.

    Raises:
        UsageError: the result is damaged, lacks models, or is one of another model.
    """
    try:
        if result["format"] != FORMAT:
            raise UsageError(f"the result has format {result['format']}, expected {FORMAT}; measure with a new kit")
        about = result["about"]
        if about["sha256"] != sha256:
            raise UsageError("the result was measured on another model; give the model that the kit was made of")
        configurations = [Configuration(str(c["name"]), dict(c["widths"])) for c in about["configurations"]]
        name, key = str(about["name"]), Key(**result["key"])
        found = _merged(result["records"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the result is damaged ({type(error).__name__}: {error}); measure it again") from None
    missing = [c.name for c in configurations if c.name not in found]
    if missing:
        raise UsageError(f"the result lacks {len(missing)} of {len(configurations)} models; finish measuring first")
    configurations.sort(key=lambda c: c.name != DENSE)
    measured = [found[c.name] for c in configurations]
    operators, slots = _slots(measured, Widths(analysis, [c.widths for c in configurations]))
    cost = analysis.cost
    alignments = {
        step: (found[c.name].milliseconds, cost.totals(counts_of(analysis, c.widths))["macs"])
        for c in configurations
        for step in CLASSES
        if c.name == f"align{step}"
    }
    milliseconds = tuple(m.milliseconds for m in measured)
    profile = Profile(name, tuple(c.widths for c in configurations), milliseconds, slots, alignments)
    return Table(key, operators, {sha256: profile})


def _merged(records: Sequence[Mapping[str, Any]]) -> dict[str, _Measured]:
    """Per configuration: all passes, brought to the same speed of the machine by the dense model beside them."""
    reference = float(np.median([r["dense_ms"] for r in records]))
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_name[record["id"]].append(record)
    out: dict[str, tuple[float, Sequence[Sequence[Any]], NDArray[np.float64]]] = {}
    for name, several in by_name.items():
        ratio = float(np.median([r["ms"] / r["dense_ms"] for r in several]))
        first = several[0]["operators"]
        same = [r for r in several if len(r["operators"]) == len(first)]
        times = np.median([[op[4] * reference / r["dense_ms"] for op in r["operators"]] for r in same], axis=0)
        out[name] = (ratio * reference, first, times)
    clock = _clock([(ms, times) for ms, _, times in out.values()])
    return {
        name: _Measured(ms, _nodes(first, _shared(ms, times - clock).tolist()))
        for name, (ms, first, times) in out.items()
    }


def _shared(milliseconds: float, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Operators' shares of the whole run's time, which is known better than theirs."""
    times = np.maximum(times, _LEAST)
    factor = 1e3 * milliseconds / float(times.sum())
    return times * min(max(factor, 1 / _BELIEVED), _BELIEVED)


def _clock(models: Sequence[tuple[float, NDArray[np.float64]]]) -> float:
    """Microseconds that the profiler adds to every operator: by that much their sum is more than a run without it."""
    excess = float(np.median([(float(times.sum()) - 1e3 * ms) / len(times) for ms, times in models]))
    return max(excess, 0.0)


def _nodes(operators: Sequence[Sequence[Any]], times: Sequence[float]) -> dict[str, tuple[_Ran, ...]]:
    """Operators by the node they stand for; those that the runtime added without a lasting name go with the one before.

    Names with a number that counts the runtime's own changes say nothing: it differs from model to model.
    """
    out: dict[str, list[_Ran]] = {}
    node = ""
    for (name, op, ins, outs, _), time in zip(operators, times, strict=True):
        if not (name == op or "_token_" in name) or not node:
            node = _PLACED.sub("", name)
        shapes = tuple(_shape(text) for text in (*ins, *outs))
        out.setdefault(node, []).append(_Ran(op, shapes, len(ins), time))
    return {name: tuple(ran) for name, ran in out.items()}


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    match = _SHAPE.fullmatch(text)
    return (text, ()) if match is None else (match[1], tuple(int(d) for d in match[2].split(",") if d))


def _slots(measured: Sequence[_Measured], widths: Widths) -> tuple[dict[str, Operator], tuple[Slot, ...]]:
    """Operators with their samples, and the places in which they stand."""
    samples: dict[str, dict[tuple[int, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    places: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
    for node in dict.fromkeys(node for m in measured for node in m.nodes):
        ran = [m.nodes.get(node, ()) for m in measured]
        signature, rows = _signature(ran, widths)
        places[signature, tuple(tuple(row.tolist()) for row in rows)] += 1
        for k, operators in enumerate(ran):
            samples[signature][tuple(int(row[k]) for row in rows)].append(sum(o.microseconds for o in operators))
    found = {}
    for signature, points in samples.items():
        ordered = sorted(points.items())
        found[signature] = Operator(
            tuple(p for p, _ in ordered),
            tuple(float(np.median(v)) for _, v in ordered),
            tuple(len(v) for _, v in ordered),
        )
    return found, tuple(Slot(signature, sizes, count) for (signature, sizes), count in places.items())


def _signature(ran: Sequence[Sequence[_Ran]], widths: Widths) -> tuple[str, list[Row]]:
    """`Conv(float[1,a,32,32],float[b,a,3,3])->(float[1,b,32,32])`, and a and b in all configurations."""
    letters: dict[tuple[int, ...], str] = {}
    rows: list[Row] = []
    named: dict[_Place, str] = {}
    for place, row in _rows(ran).items():
        found = widths.followed(row)
        if found is None or (len(letters) == len(_LETTERS) and tuple(found[1].tolist()) not in letters):
            continue
        values = tuple(found[1].tolist())
        if values not in letters:
            letters[values] = _LETTERS[len(letters)]
            rows.append(found[1])
        named[place] = letters[values]
    texts = []
    seen: Counter[str] = Counter()
    for operator in next(r for r in ran if r):
        number = seen[operator.op]
        seen[operator.op] += 1
        shapes = []
        for t, (dtype, dims) in enumerate(operator.shapes):
            sizes = [named.get((operator.op, number, t, d), str(size)) for d, size in enumerate(dims)]
            shapes.append(f"{dtype}[{','.join(sizes)}]")
        ins, outs = ",".join(shapes[: operator.inputs]), ",".join(shapes[operator.inputs :])
        texts.append(f"{operator.op}({ins})->({outs})")
    hidden = len(rows) - len(set("".join(named.values())))
    varying = f" of {','.join(letters.values())}" if letters else ""
    return " + ".join(texts) + varying + ("" if ran[0] else " not in the dense model") + "*" * hidden, rows


def _rows(ran: Sequence[Sequence[_Ran]]) -> dict[_Place, Row]:
    """All dimensions at a node, each in all configurations."""
    out: dict[_Place, Row] = {}
    for k, operators in enumerate(ran):
        seen: Counter[str] = Counter()
        for operator in operators:
            number = seen[operator.op]
            seen[operator.op] += 1
            for t, (_, dims) in enumerate(operator.shapes):
                for d, size in enumerate(dims):
                    place = (operator.op, number, t, d)
                    if place not in out:
                        out[place] = np.zeros(len(ran), dtype=np.int64)
                    out[place][k] = size
    return out
