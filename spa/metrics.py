"""Metrics of a model on held-out samples, and how sure one can be that pruning made one of them worse.

Every metric is a mean of one number per sample, or a function of that mean (perplexity), so that the dense and the
pruned model are compared sample by sample: the standard error of the difference is that of its paired samples, which
is far smaller than that of either value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.calibration.data import is_float
from spa.decisions import class_output, classes_last, decisions
from spa.errors import UsageError

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Vector = NDArray[np.float64]
Custom = Callable[[Outputs, "NDArray[np.int64] | None"], "float | Array"]
"""Of all outputs, by name [samples, ...], and labels; larger is better. One number, or one per sample."""


@dataclass(frozen=True)
class Batch:
    """Some samples, and what two models make of them."""

    feeds: Mapping[str, Array]
    labels: NDArray[np.int64] | None
    dense: Outputs
    outputs: Outputs
    """Of the model that is judged."""


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is on samples."""

    name: str
    text: str
    """What it is, in a few words."""
    higher_is_better: bool
    needs: str
    """`labels`, `tokens` or empty: what samples must have."""
    rows: Callable[[Batch], Vector]
    """One number per sample of a batch, [n]; a UsageError if the metric does not fit the model."""
    link: str = ""
    """`exp`: the metric is e to the mean of the rows; empty: it is the mean."""
    relative: bool = False
    """Whether a percentage means a share of the dense model's value instead of points."""

    def value(self, mean: float) -> float:
        """The metric for a mean of rows."""
        return math.exp(min(mean, 700.0)) if self.link == "exp" else mean


@dataclass(frozen=True)
class Drop:
    """How much worse a model is than the dense one, on the same samples."""

    metric: str
    before: float
    """The dense model's value."""
    after: float
    drop: float
    """How much worse, in the metric's own unit; negative if it is better."""
    error: float | None
    """Standard error of the drop over the samples (paired); None where a metric gives no number per sample."""
    samples: int

    def within(self, limit: float) -> bool:
        """Whether it is at most `limit`, up to rounding: 0.8 - 0.75 is 0.05."""
        return self.drop <= limit + 1e-9 * max(abs(self.before), abs(limit))


def drop_of(metric: Metric, dense: Vector, pruned: Vector) -> Drop:
    """Compare two models by their rows, [samples] each.

    The standard error of a difference of means is std(differences) / sqrt(n); through the exponential by the delta
    method.
    """
    n = len(dense)
    means = float(dense.mean()), float(pruned.mean())
    before, after = (metric.value(m) for m in means)
    slopes = (before, after) if metric.link == "exp" else (1.0, 1.0)
    spread = slopes[1] * (pruned - means[1]) - slopes[0] * (dense - means[0])
    error = float(np.sqrt(np.square(spread).sum() / max(n - 1, 1) / n)) if n > 1 else None
    drop = before - after if metric.higher_is_better else after - before
    return Drop(metric.name, before, after, drop, error, n)


# -- the metrics -------------------------------------------------------------------------------------------------------


def _scores(outputs: Outputs, what: str) -> Array:
    name = class_output(outputs)
    if name is None:
        raise UsageError(f"{what} needs one output with scores of classes, and this model has none: use divergence")
    return outputs[name]


def _labels(batch: Batch, scores: Array, what: str) -> NDArray[np.int64]:
    labels = batch.labels
    if labels is None:
        raise UsageError(f"{what} needs labels with the samples: an array `labels` in the .npz file, or use divergence")
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise UsageError(f"{what}: labels of shape {list(labels.shape)} do not fit scores {list(scores.shape)}")
    if labels.max(initial=0) >= scores.shape[1] or labels.min(initial=0) < 0:
        raise UsageError(f"{what}: labels must be between 0 and {scores.shape[1] - 1}, the classes of the model")
    return labels


def _top(k: int) -> Callable[[Batch], Vector]:
    def rows(batch: Batch) -> Vector:
        scores = _scores(batch.outputs, f"top{k}")
        labels = _labels(batch, scores, f"top{k}")
        mine = scores[np.arange(len(labels)), labels][:, None]
        better = (scores > mine).sum(axis=1)
        earlier = ((scores == mine) & (np.arange(scores.shape[1]) < labels[:, None])).sum(axis=1)
        return np.asarray(better + earlier < k, dtype=np.float64)  # ties as argmax breaks them

    return rows


def _agreement(batch: Batch) -> Vector:
    a, b = (decisions(_scores(outputs, "agreement")) for outputs in (batch.dense, batch.outputs))
    return np.asarray((a == b).reshape(len(a), -1).mean(axis=1), dtype=np.float64)


def _divergence(batch: Batch) -> Vector:
    """Squared difference of a sample's outputs; `Judge` divides by the variance of the dense model's."""
    total: Vector | None = None
    for name, dense in batch.dense.items():
        if is_float(dense.dtype):
            step = np.square(batch.outputs[name].astype(np.float64) - dense.astype(np.float64))
            part = step.reshape(len(step), -1).sum(axis=1)
            total = part if total is None else total + part
    if total is None:
        raise UsageError("divergence needs an output of floating-point numbers, and this model has none")
    return total


def _likelihood(batch: Batch) -> Vector:
    """Mean of -log p(next token) over a sample's tokens; padding (attention_mask 0) does not count."""
    scores = _scores(batch.outputs, "perplexity")
    tokens = [a for n, a in batch.feeds.items() if a.dtype.kind in "iu" and a.ndim == 2 and "mask" not in n.lower()]
    named = [a for n, a in batch.feeds.items() if a.dtype.kind in "iu" and a.ndim == 2 and "input_ids" in n.lower()]
    found = (named or tokens)[:1]
    if scores.ndim != 3 or not found or found[0].shape != scores.shape[:2] or scores.shape[1] < 2:
        raise UsageError("perplexity needs a model from token ids [n, tokens] to scores [n, tokens, vocabulary]")
    logits = classes_last(scores)[:, :-1].astype(np.float64)
    following = found[0][:, 1:].astype(np.int64)
    top = logits.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    loss = norm - np.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    mask = next((a for n, a in batch.feeds.items() if "mask" in n.lower() and a.shape == found[0].shape), None)
    counts = np.ones_like(loss) if mask is None else (mask[:, 1:] > 0).astype(np.float64)
    return np.asarray((loss * counts).sum(axis=1) / np.maximum(counts.sum(axis=1), 1))


METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("top1", "share of labels met", True, "labels", _top(1)),
        Metric("top5", "share of labels among the five best scores", True, "labels", _top(5)),
        Metric("agreement", "share of decisions that are the dense model's", True, "", _agreement),
        Metric("divergence", "squared error of the outputs against the dense model's, of their variance", False, "",
               _divergence),
        Metric("perplexity", "e to the mean loss of the next token", False, "tokens", _likelihood, "exp", True),
    )
}  # fmt: skip
"""What `--target NAME-drop=X` may name; `metric-drop` is the one that was chosen, or fits."""


def default_metric(labelled: bool) -> str:
    """What `metric-drop` stands for where nobody said: accuracy if there are labels, else the outputs' error."""
    return "top1" if labelled else "divergence"
