"""A metric of the dense and of pruned models on samples that nothing was fit on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.budget.targets import Goal
from spa.cache import Cache
from spa.calibration import Calibration
from spa.calibration.data import is_float
from spa.errors import UsageError
from spa.executors.collect import Setup
from spa.executors.segments import Segments, placed
from spa.metrics import METRICS, Batch, Custom, Drop, Metric, Outputs, default_metric, drop_of
from spa.progress import Progress, silent
from spa.runtime import fetch
from spa.shelf import Shelf

Vector = NDArray[np.float64]
LARGEST = 64 << 20
"""Bytes of the dense model's outputs that are kept for the next query."""


def chosen(metric: str | Custom | None, data: Calibration, goal: Goal | None = None) -> Metric | Custom:
    """The metric that is meant.

    Args:
        metric: a name, a function, or None.
        data: held-out samples.
        goal: a target, which may name one itself.

    Raises:
        UsageError: the name is unknown, or two different ones were given.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise UsageError(f"--metric: unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    named = None if goal is None or goal.metric == "metric" else goal.metric
    if named is not None and metric is not None and metric != named:
        given = metric if isinstance(metric, str) else "a function"
        raise UsageError(f"--metric {given} and target {goal.text if goal else ''} are about two metrics: choose one")
    if callable(metric):
        return metric
    return METRICS[metric or named or default_metric(data.labels is not None)]


def tolerance(goal: Goal, metric: Metric | Custom, before: float) -> float:
    """By how much the metric may get worse, in its own unit."""
    relative = callable(metric) or metric.relative
    return goal.limit * abs(before) if goal.percent and relative else goal.limit


class Judge:
    """Measures models on held-out samples.

    Args:
        model: the dense model.
        data: the samples.
        metric: what is measured.
        setup: how models are run.
        cache: keeps what the dense model makes of the samples.
        progress: told how many samples were run (`evaluate`).

    Raises:
        UsageError: the metric does not fit the model or the samples.
    """

    def __init__(
        self,
        model: ir.Model,
        data: Calibration,
        metric: Metric | Custom,
        setup: Setup,
        cache: Cache,
        progress: Progress = silent,
    ) -> None:
        self.data, self.metric, self.setup, self.progress = data, metric, setup, progress
        self._feeds = list(data.batches(setup.batch))
        self._dense = self._recall(model, cache)
        self._scale = self._spread() if isinstance(metric, Metric) and metric.name == "divergence" else 1.0

    @property
    def name(self) -> str:
        """Of the metric."""
        return self.metric.name if isinstance(self.metric, Metric) else "metric"

    @cached_property
    def before(self) -> float:
        """The dense model's value."""
        if isinstance(self.metric, Metric):
            return self.metric.value(float(self._own.mean()))
        return float(np.mean(_called(self.metric, self._dense, self.data.labels)))

    def __call__(self, model: ir.Model) -> Drop:
        """How much worse a model is.

        Raises:
            UsageError: the metric fails, or is not finite.
        """
        if not isinstance(self.metric, Metric):
            return self._custom(self.metric, list(self._run(model)))
        drop = drop_of(self.metric, self._own, self._rows(self.metric, self._run(model)))
        if not np.isfinite(drop.drop):
            raise UsageError(f"{self.name} of the pruned model is not finite on the held-out samples")
        return drop

    @cached_property
    def _own(self) -> Vector:
        assert isinstance(self.metric, Metric)
        return self._rows(self.metric, iter(self._dense))

    def _rows(self, metric: Metric, outputs: Iterator[Outputs]) -> Vector:
        parts, start = [], 0
        for feeds, dense, mine in zip(self._feeds, self._dense, outputs, strict=True):
            count = len(next(iter(feeds.values())))
            labels = None if self.data.labels is None else self.data.labels[start : start + count]
            start += count
            parts.append(metric.rows(Batch(feeds, labels, dense, mine)))
        return np.concatenate(parts) / self._scale

    def _custom(self, metric: Custom, outputs: list[Outputs]) -> Drop:
        pair = [np.asarray(_called(metric, o, self.data.labels), np.float64) for o in (self._dense, outputs)]
        n = self.data.samples
        if pair[0].shape == pair[1].shape == (n,):
            return drop_of(Metric("metric", "", True, "", lambda batch: pair[0]), pair[0], pair[1])
        if any(v.ndim for v in pair):
            raise UsageError(f"metric: must give one number, or one for each of the {n} samples")
        before, after = (float(v) for v in pair)
        return Drop("metric", before, after, before - after, None, n)

    def _run(self, model: ir.Model) -> Iterator[Outputs]:
        parts = Segments.of(model, self.setup.provider, self.setup.threads)
        run = parts.runner(parts.outputs, (), optimize=True)
        done = 0
        self.progress("evaluate", 0, self.data.samples)
        for feeds in self._feeds:
            values = run(placed(feeds))
            yield {name: fetch(values[name]) for name in parts.outputs}
            done += len(next(iter(feeds.values())))
            self.progress("evaluate", done, self.data.samples)

    def _recall(self, model: ir.Model, cache: Cache) -> list[Outputs]:
        """The dense model's outputs."""
        request = [self.setup.batch, self.setup.provider, self.setup.threads]
        known = cache.get("held", self.data.digest, request)
        if known is not None:
            names = [v.name or "" for v in model.graph.outputs]
            return [{n: known[f"{k}.{n}"] for n in names} for k in range(len(self._feeds))]
        shelf = Shelf(self.setup.memory // 4)
        found: list[Outputs] = [{n: shelf.keep(a) for n, a in outputs.items()} for outputs in self._run(model)]
        if sum(a.nbytes for outputs in found for a in outputs.values()) <= LARGEST:
            flat = {f"{k}.{n}": a for k, outputs in enumerate(found) for n, a in outputs.items()}
            cache.put("held", self.data.digest, request, flat)
        return found

    def _spread(self) -> float:
        """Variance of the dense model's outputs over the samples, all numbers of a sample together."""
        total = 0.0
        for name in self._dense[0]:
            arrays = [np.asarray(o[name]) for o in self._dense]
            if not is_float(arrays[0].dtype) or not arrays[0].ndim:
                continue
            if len({a.shape[1:] for a in arrays}) == 1:
                joined = np.concatenate(arrays).astype(np.float64)
                total += float(np.square(joined - joined.mean(axis=0)).sum())
            else:  # texts of several lengths
                wide = [a.astype(np.float64) for a in arrays]
                total += sum(float(np.square(a - a.mean(axis=0)).sum()) for a in wide)
        return max(total / max(self.data.samples, 1), 1e-30)


def _called(metric: Custom, parts: list[Outputs], labels: NDArray[np.int64] | None) -> Any:
    joined = {n: np.concatenate([p[n] for p in parts]) if parts[0][n].ndim else parts[0][n] for n in parts[0]}
    try:
        return metric(joined, labels)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"metric: failed with {type(error).__name__}: {error}") from error
