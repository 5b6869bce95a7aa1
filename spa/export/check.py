"""The exported file against the source's own outputs, on the same inputs and more than one batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from spa.errors import RuntimeFailure, VerifyError
from spa.export.process import Worker
from spa.feeds import runnable_feeds
from spa.runtime import Session, open_session, run
from spa.verify import HALF_TOLERANCE, TOLERANCE, half_precision, measure

__all__ = ["Checked", "compare"]

Array = npt.NDArray[Any]
_BATCHES = (1, 3)
_LONGER = 11
"""Another size of open axes that are not the batch, where the model takes it."""


@dataclass(frozen=True)
class Checked:
    """How far an exported file is from its source."""

    max_abs_error: float
    """Largest absolute difference over all outputs and inputs."""
    max_rel_error: float
    """Largest difference of an output, divided by the largest magnitude in that output."""
    tolerance: float
    """Relative error that would still be accepted."""
    outputs: int
    """Outputs compared."""
    batches: tuple[int, ...]
    """Batch sizes of the inputs; empty if no input has one."""
    runs: int
    """Sets of inputs."""


def compare(
    worker: Worker,
    file: Path,
    model: ir.Model,
    examples: Mapping[str, Array],
    seed: int,
    dims: Mapping[str, int],
    label: str,
) -> Checked:
    """Run both on the source's example inputs and on seeded random ones.

    Args:
        worker: has the source.
        file: the ONNX file.
        model: the same.
        examples: the source's own inputs.
        seed: of random inputs.
        dims: sizes of open axes of random inputs.
        label: what the source is called in messages.

    Raises:
        VerifyError: the outputs differ.
        RuntimeFailure: one of them does not run.
    """
    session = open_session(file, provider="cpu", optimize=False)
    tolerance = HALF_TOLERANCE if half_precision(model) else TOLERANCE
    worst = (0.0, 0.0)
    sets = _inputs(model, session, examples, seed, dims)
    batches: list[int] = []
    count = 0
    for feeds in sets:
        rows = {a.shape[0] for a in feeds.values() if a.ndim}
        where = f"a batch of {rows.copy().pop()}" if len(rows) == 1 else "random inputs"
        got = [np.asarray(y) for y in run(session, feeds).values()]
        want = worker.run(feeds)
        if len(got) != len(want):
            raise VerifyError(
                f"{label}: has {len(want)} outputs, but its export {len(got)}; return tensors only, each once"
            )
        count = len(got)
        for k, (a, b) in enumerate(zip(want, got, strict=True)):
            _check_shape(a, b, k, where, label)
            found = measure({"": a}, {"": _plain(b)}, True, tolerance)
            if not found.passed:
                raise VerifyError(
                    f"{label}: output {k} of the exported file differs from the source's by {found.max_rel_error:.3g} "
                    f"of its magnitude on {where} (accepted: {tolerance:g}), so that nothing was written; {_ADVICE}"
                )
            worst = (max(worst[0], found.max_abs_error), max(worst[1], found.max_rel_error))
        batches.extend(rows if len(rows) == 1 else ())
    return Checked(*worst, tolerance, count, tuple(dict.fromkeys(batches)), len(sets))


_ADVICE = (
    "is it in evaluation mode and without randomness, does its Python code look at sizes or values? Try another "
    "--exporter or --opset, or --static-batch"
)


def _check_shape(want: Array, got: Array, k: int, where: str, label: str) -> None:
    if want.shape != got.shape:
        raise VerifyError(
            f"{label}: output {k} is {list(got.shape)} in the exported file and {list(want.shape)} in the source on "
            f"{where}, so that nothing was written; {_ADVICE}"
        )


def _plain(array: Array) -> Array:
    return array if array.dtype.kind in "fiubc" else array.astype(np.float32)


def _inputs(
    model: ir.Model, session: Session, examples: Mapping[str, Array], seed: int, dims: Mapping[str, int]
) -> Sequence[Mapping[str, Array]]:
    """The examples, and random ones at each batch size, the last with longer sequences if the model takes them."""
    shapes = [list(v.shape or ()) for v in model.graph.inputs if v.name not in model.graph.initializers]
    first = [str(shape[0].value) for shape in shapes if shape and not isinstance(shape[0], int)]
    symbols = {str(size.value) for shape in shapes for size in shape if not isinstance(size, int)}
    sets: list[Mapping[str, Array]] = [examples] if examples else []
    if not first:
        return [*sets, runnable_feeds(model, session, seed, dims)]
    others = dict.fromkeys(symbols - {first[0], "None", *dims}, _LONGER)
    for k, size in enumerate(_BATCHES):
        given = {first[0]: size, **dims}
        try:
            sets.append(runnable_feeds(model, session, seed + k, {**given, **others} if k else given))
        except RuntimeFailure:
            if not (k and others):
                raise
            sets.append(runnable_feeds(model, session, seed + k, given))
    return sets
