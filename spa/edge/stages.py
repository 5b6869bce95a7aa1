"""The stages that turn one file into another: make it, compare it with what it was made of, check its gates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from spa.edge.base import Step, bytes_of
from spa.edge.fidelity import Fidelity, Samples, compare_files
from spa.edge.gates import Check, Gate, parse_gates, passed
from spa.edge.half import to_float16
from spa.edge.opset import to_opset
from spa.edge.ort_format import to_ort
from spa.edge.quantize import Method, Ops, Platform, Quantizer, Settings
from spa.edge.search import search as search_nodes
from spa.errors import UsageError
from spa.graph import load
from spa.progress import Progress, silent
from spa.verify import HALF_TOLERANCE, TOLERANCE, half_precision

__all__ = ["Job", "checks", "float16", "judged", "moved", "opset", "ort", "quantize"]

_OF_OUTPUTS = ("max_error", "error", "agreement", "accuracy", "accuracy_drop", "metric", "metric_drop")
"""Gates on what a model computes; a stage that has one of them does without its default gate."""
_QUANTISED = 0.1
"""Default gate of `quantize`: 10 dB of signal over quantisation noise; below that something went wrong."""
_ROUNDED = 1e-3
"""Default gate of `opset` and `ort` on models whose arithmetic rounds coarsely: 30 dB, in squared error."""


@dataclass(frozen=True)
class Job:
    """One stage about to run."""

    stage: str
    """How messages and results call it."""
    source: Path
    """What it starts from: .onnx, or for stages that only look, .ort."""
    target: Path
    """What it writes."""
    on: Samples
    """What the outputs are compared on."""
    gates: tuple[Gate, ...] = ()
    progress: Progress = silent


def quantize(
    job: Job,
    *,
    calibration: Samples | None = None,
    platform: Platform = "auto",
    method: Method = "minmax",
    per_channel: bool = True,
    ops: Ops = "auto",
    exclude: Sequence[str] = (),
    search: bool = True,
) -> Step:
    """INT8 static quantisation in QDQ format, see `spa.edge.quantize`.

    Args:
        job: the stage.
        calibration: samples whose ranges are measured; those of the job if None.
        platform: whose integer kernels it is for: `x86`, `x86-vnni`, `arm`, `gpu`; `auto` is this machine.
        method: ranges from the least to the largest value (`minmax`), or cut where that loses least (`entropy`), or at
            99.999 % (`percentile`).
        per_channel: a scale per output channel of weights.
        ops: `linear` quantises products with weights, `all` everything ONNX Runtime can; `auto` leaves norms, softmax
            and the like alone, and in transformers all but the products with weights.
        exclude: shell patterns of names or types of nodes that are left alone.
        search: where a gate is missed, leave alone the fewest of the worst nodes with which it is reached.
    """
    gates = _with_default(job.gates, "error", _QUANTISED)
    found: list[str] = []

    def make(source: Path, target: Path) -> dict[str, Any]:
        folder = target.parent / f".{target.name}.quantize"
        folder.mkdir()
        data = calibration or job.on
        job.progress("calibrate", 0, 1)
        ready = Quantizer(source, folder, data, Settings(platform, method, per_channel, ops, tuple(exclude)))
        close = [gate for gate in gates if gate.name in _OF_OUTPUTS]  # more in floating point is never smaller

        def good(fidelity: Fidelity) -> bool:
            return all(check.passed for check in checks(job.stage, close, fidelity, 0, 0))

        if search and close:
            found.extend(search_nodes(ready, target, job.on, good, job.progress))
        else:
            ready.write(target)
        return ready.detail(found)

    return judged(job, gates, make)


def float16(job: Job, *, keep: Sequence[str] = (), half_io: bool = False) -> Step:
    """Half precision, see `spa.edge.half`."""
    gates = _with_default(job.gates, "max_error", HALF_TOLERANCE)
    return judged(job, gates, lambda source, target: to_float16(source, target, keep=keep, half_io=half_io))


def opset(job: Job, *, version: int) -> Step:
    """Another opset, see `spa.edge.opset`."""
    gates = _same_numbers(job)
    return judged(job, gates, lambda source, target: to_opset(source, target, version=version))


def ort(
    job: Job,
    *,
    style: Literal["fixed", "runtime"] = "fixed",
    platform: Literal["any", "arm", "amd64"] = "any",
) -> Step:
    """ONNX Runtime's own format, see `spa.edge.ort_format`."""
    gates = _same_numbers(job)
    return judged(job, gates, lambda source, target: to_ort(source, target, style=style, platform=platform))


def judged(job: Job, gates: Sequence[Gate], make: Callable[[Path, Path], Mapping[str, Any]]) -> Step:
    """Run `make(source, target)`, compare what it wrote with its source, and check the gates."""
    start = time.perf_counter()
    detail = make(job.source, job.target)
    seconds = time.perf_counter() - start
    fidelity = compare_files(job.source, job.target, job.on, job.progress)
    before, after = bytes_of(job.source), bytes_of(job.target)
    found = checks(job.stage, gates, fidelity, before, after)
    return Step(job.stage, job.target, before, after, seconds, fidelity, found, detail)


def checks(
    stage: str,
    gates: Sequence[Gate],
    fidelity: Fidelity | None,
    before: int,
    after: int,
    more: Mapping[str, float] | None = None,
) -> tuple[Check, ...]:
    """Compare gates with what was measured.

    Raises:
        UsageError: a gate is about something that this stage or these samples do not tell.
    """
    known = {"size": float(after), **(more or {})}
    out = []
    for gate in gates:
        value = known.get(gate.name)
        if value is None and fidelity is not None:
            value = fidelity.measured(gate.name)
        if value is None:
            raise UsageError(f"stage {stage}: gate {gate.name} {_MISSING.get(gate.name, 'is not measured here')}")
        out.append(passed(gate, value, before))
    return tuple(out)


_MISSING = {
    "agreement": "needs an output with scores of classes: one named logits, or a single one with two or three axes",
    "accuracy": "needs labels with the samples: an array `labels` in the .npz file",
    "accuracy_drop": "needs labels with the samples: an array `labels` in the .npz file",
    "metric": "needs the recipe's key `metric`",
    "metric_drop": "needs the recipe's key `metric`",
    "latency": "is measured by stage bench only",
    "speedup": "is measured by stage bench only",
}


def _with_default(gates: tuple[Gate, ...], name: str, limit: float) -> tuple[Gate, ...]:
    if any(gate.name in _OF_OUTPUTS for gate in gates):
        return gates
    return (*gates, *parse_gates({name: limit}))


def _same_numbers(job: Job) -> tuple[Gate, ...]:
    """Conversions that should change nothing but rounding; where arithmetic is coarse one step may round the other
    way, and then a few others."""
    model = load(job.source).model
    coarse = half_precision(model) or any(node.op_type == "QuantizeLinear" for node in _nodes(model))
    return _with_default(job.gates, *(("error", _ROUNDED) if coarse else ("max_error", TOLERANCE)))


def _nodes(model: ir.Model) -> list[ir.Node]:
    return list(model.graph.all_nodes())


def moved(step: Step, output: Path) -> Step:
    """The same step, whose file was renamed."""
    return replace(step, output=output)
