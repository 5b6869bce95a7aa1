"""How far a model is from another one: outputs on the same samples, decisions, labels, and the user's own metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.calibration.data import is_float
from spa.decisions import class_output, decisions
from spa.errors import RuntimeFailure, UsageError
from spa.progress import Progress, silent
from spa.runtime import Provider, Session, open_session, run

__all__ = ["Fidelity", "Metric", "Samples", "compare_files"]

Array = NDArray[Any]
Metric = Callable[[Mapping[str, Array], NDArray[np.int64] | None], float]
"""Of all outputs, by name [samples, ...], and labels; larger is better."""

Pair = tuple[float | None, float | None]
"""Before and after."""

_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
}


@dataclass(frozen=True)
class Samples:
    """What models are compared on."""

    data: Calibration
    batch: int = 32
    """Samples per run."""
    provider: Provider = "cpu"
    threads: int = 0
    metric: Metric | None = None


@dataclass(frozen=True)
class Fidelity:
    """One model against another, on samples."""

    samples: int
    max_error: float
    """Largest difference of an output, divided by the largest magnitude in that output; infinite where shapes differ or
    one is not finite and the other is."""
    error: float
    """Squared difference of all floating-point outputs relative to their variance over the samples."""
    agreement: float | None
    """Share of decisions (largest score) that are the same; None for outputs that are no scores of classes."""
    accuracy_before: float | None = None
    """Share of labels met by the first model; None without labels or classes."""
    accuracy: float | None = None
    """... and by the second one."""
    metric_before: float | None = None
    """The user's metric of the first model."""
    metric: float | None = None
    """... and of the second one."""

    def measured(self, name: str) -> float | None:
        """The value that a gate is about; None if there is none."""
        if name == "accuracy_drop":
            return _drop(self.accuracy_before, self.accuracy)
        if name == "metric_drop":
            return _drop(self.metric_before, self.metric)
        found: float | None = getattr(self, name, None)
        return found


def _drop(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def compare_files(before: Path, after: Path, on: Samples, progress: Progress = silent) -> Fidelity:
    """Run two models (.onnx or .ort) on the same samples and compare all outputs.

    Args:
        before: the reference.
        after: the model that is judged; its inputs may be of another floating-point type.
        on: samples; with labels accuracies are measured, too.
        progress: told how many samples were run (`outputs`).

    Raises:
        RuntimeFailure: one of the models cannot be opened or run; the message begins with its name.
        UsageError: the user's metric fails.
    """
    first, second = _open(before, on), _open(after, on)
    sums, done = _Sums(), 0
    progress("outputs", 0, on.data.samples)
    for batch in on.data.batches(on.batch):
        sums.add(_run(first, before, batch), _run(second, after, batch), keep=on.metric is not None)
        done += len(next(iter(batch.values())))
        progress("outputs", done, on.data.samples)
    return sums.close(done, on)


def _open(path: Path, on: Samples) -> Session:
    try:
        return open_session(path, provider=on.provider, threads=on.threads)
    except RuntimeFailure as error:
        raise RuntimeFailure(f"{path.name}: {error}") from error


def _run(session: Session, path: Path, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs; inputs are cast to the floating-point type that the model takes."""
    types = {arg.name: _TYPES[arg.type] for arg in session.get_inputs() if arg.type in _TYPES}
    feeds = {n: a.astype(types[n]) if n in types and is_float(a.dtype) else a for n, a in batch.items()}
    try:
        return run(session, feeds)
    except RuntimeFailure as error:
        raise RuntimeFailure(f"{path.name}: {error}") from error


@dataclass
class _Sums:
    """What is added up over batches."""

    largest: dict[str, float] = field(default_factory=dict)
    """Largest difference of each output."""
    magnitude: dict[str, float] = field(default_factory=dict)
    squares: float = 0.0
    moments: dict[str, tuple[Array, Array, int]] = field(default_factory=dict)
    """Sum, sum of squares about the first batch's mean, and rows, of each output of fixed shape."""
    decided: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    undecided: bool = False
    spread: float = 0.0
    kept: tuple[list[dict[str, Array]], list[dict[str, Array]]] = field(default_factory=lambda: ([], []))

    def add(self, a: Mapping[str, Array], b: Mapping[str, Array], keep: bool) -> None:
        if keep:
            self.kept[0].append(dict(a))
            self.kept[1].append(dict(b))
        for name, x in a.items():
            self._output(name, x, b.get(name))
        scores = class_output(a)
        if scores is None or scores not in b or a[scores].shape != b[scores].shape:
            self.undecided = True
        else:
            self.decided.append((decisions(a[scores]), decisions(b[scores])))

    def _output(self, name: str, x: Array, y: Array | None) -> None:
        self.largest.setdefault(name, 0.0)
        self.magnitude.setdefault(name, 0.0)
        if y is None or x.shape != y.shape:
            self.largest[name] = self.squares = float("inf")
            return
        if x.dtype.kind in "OUS":
            self.largest[name] = max(self.largest[name], 0.0 if np.array_equal(x, y) else 1.0)
            self.magnitude[name] = 1.0
            return
        p, q = x.astype(np.float64), y.astype(np.float64)
        same = (p == q) | (np.isnan(p) & np.isnan(q))
        with np.errstate(invalid="ignore"):
            difference = np.nan_to_num(np.where(same, 0.0, np.abs(p - q)), nan=np.inf, posinf=np.inf)
        self.largest[name] = max(self.largest[name], float(difference.max(initial=0.0)))
        finite = np.where(np.isfinite(p), p, 0.0)
        self.magnitude[name] = max(self.magnitude[name], float(np.abs(finite).max(initial=0.0)))
        if is_float(x.dtype):
            self.squares += float(np.square(difference).sum())
            self._spread(name, finite)

    def _spread(self, name: str, p: Array) -> None:
        """Squares about the mean over all samples (Chan et al.'s merge of batches); outputs whose shape varies from
        batch to batch are taken about the mean of each batch."""
        rows = len(p) if p.ndim else 1
        p = p.reshape(rows, -1)
        mean, inner = p.mean(axis=0), np.square(p - p.mean(axis=0)).sum(axis=0)
        before = self.moments.get(name)
        if before is not None and before[0].shape == mean.shape:
            shift, total = mean - before[0], before[2] + rows
            inner = before[1] + inner + np.square(shift) * (before[2] * rows / total)
            mean, rows = before[0] + shift * (rows / total), total
        elif before is not None:
            self.spread += float(before[1].sum())
        self.moments[name] = (mean, inner, rows)

    def close(self, samples: int, on: Samples) -> Fidelity:
        spread = self.spread + sum(float(inner.sum()) for _, inner, _ in self.moments.values())
        relative = [
            value / self.magnitude[name] if self.magnitude[name] else value for name, value in self.largest.items()
        ]
        agreement: float | None = None
        accuracies: Pair = (None, None)
        if self.decided and not self.undecided:
            equal = [(a == b).ravel() for a, b in self.decided]
            agreement = float(np.concatenate(equal).mean())
            accuracies = self._accuracies(on.data.labels, samples)
        metrics: Pair = (None, None)
        if on.metric is not None:
            first, second = self.kept
            metrics = (_metric(on.metric, first, on.data.labels), _metric(on.metric, second, on.data.labels))
        error = self.squares / max(spread, 1e-30) if self.squares else 0.0
        return Fidelity(samples, max(relative, default=0.0), error, agreement, *accuracies, *metrics)

    def _accuracies(self, labels: NDArray[np.int64] | None, samples: int) -> Pair:
        if labels is None or len(labels) != samples or any(a.ndim != 1 for a, _ in self.decided):
            return None, None
        before, after = (np.concatenate([pair[k] for pair in self.decided]) for k in (0, 1))
        return float((before == labels).mean()), float((after == labels).mean())


def _metric(metric: Metric, parts: Sequence[Mapping[str, Array]], labels: NDArray[np.int64] | None) -> float:
    outputs = {n: [part[n] for part in parts] for n in parts[0]}
    try:
        joined = {n: np.concatenate(arrays) if arrays[0].ndim else np.array(arrays) for n, arrays in outputs.items()}
        return float(metric(joined, labels))
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"metric: failed with {type(error).__name__}: {error}") from error
