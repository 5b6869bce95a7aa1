"""Accuracy of a network in ONNX Runtime: top-1, perplexity, rank correlation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.accuracy.data import Array, Images, Pairs, tokens

Run = Callable[[dict[str, Array]], Array]


def session(path: Path, threads: int = 1) -> Run:
    """The first output of a network on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    s = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(feeds: dict[str, Array]) -> Array:
        output: Array = s.run(None, feeds)[0]
        return output

    run.input_name = s.get_inputs()[0].name  # type: ignore[attr-defined]  # for those who make feeds
    return run


def correct(path: Path, images: Images, batch: int = 50) -> int:
    """How many images are classified correctly."""
    run: Any = session(path)
    hits = 0
    for k in range(0, len(images), batch):
        hits += int((run({run.input_name: images.x[k : k + batch]}).argmax(1) == images.y[k : k + batch]).sum())
    return hits


def top1(path: Path, images: Images, batch: int = 50) -> float:
    """Percentage classified correctly."""
    return 100 * correct(path, images, batch) / len(images)


def perplexity(path: Path, ids: Array, batch: int = 8) -> float:
    """exp of the mean negative log likelihood of each token given those before it, in nats."""
    run: Any = session(path)
    total, count = 0.0, 0
    for k in range(0, len(ids), batch):
        rows = ids[k : k + batch]
        logits = run({run.input_name: rows})[:, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
        picked = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
        total += float((log_sum - picked).sum())
        count += picked.size
    return float(np.exp(total / count))


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; ties get their mean rank."""

    def ranks(v: Array) -> Array:
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def similarity(path: Path, pairs: Pairs, batch: int = 64) -> float:
    """100 x Spearman correlation of cosine similarity with the judged one."""
    run = session(path)

    def embed(texts: tuple[str, ...]) -> Array:
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))  # little padding per batch
        vectors: dict[int, Array] = {}
        for k in range(0, len(order), batch):
            rows = order[k : k + batch]
            vectors.update(zip(rows, run(tokens([texts[r] for r in rows])), strict=True))
        return np.stack([vectors[k] for k in range(len(texts))])

    u, v = embed(pairs.first), embed(pairs.second)
    cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    return 100 * spearman(cosine, pairs.score)
