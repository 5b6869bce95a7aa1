"""Opening a version: its sessions, its signature, and the proof that its requests may be joined."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spa.errors import RuntimeFailure, SpaError
from spa.feeds import runnable_feeds
from spa.runtime import open_session, provider_of, run
from spa_server.serving.codec import Array
from spa_server.serving.errors import NotLoadable
from spa_server.serving.options import ModelOptions
from spa_server.serving.signature import Signature, signature_of
from spa_server.serving.stoppable import StoppableSession

__all__ = ["Opened", "open_version"]

_CLOSE = {"FP16": 2e-2, "BF16": 5e-2}
"""Largest difference relative to the largest magnitude; other types are computed to 1e-3 or better."""
_LOUDER = 4.0
"""The second request of the proof is so much larger, so that what depends on the whole batch's range shows."""


@dataclass(frozen=True)
class Opened:
    """What serving needs of one version."""

    sessions: tuple[StoppableSession, ...]
    signature: Signature
    provider: str
    """What the sessions really run on."""


def open_version(path: Path, options: ModelOptions) -> Opened:
    """Open `path` as `options` say.

    Raises: NotLoadable if ONNX Runtime refuses the model, CUDA is asked for and missing, the protocol cannot carry a
        tensor, or requests are to be joined and must not be.
    """
    threads = options.threads or max(1, _cores() // options.sessions)
    try:
        sessions = tuple(
            open_session(path, provider=options.provider, threads=threads) for _ in range(options.sessions)
        )
    except SpaError as error:
        raise NotLoadable(str(error)) from error
    stoppable = tuple(StoppableSession(session) for session in sessions)
    opened = Opened(stoppable, signature_of(sessions[0]), provider_of(sessions[0]))
    if options.max_batch > 1:
        _check_axes(opened.signature)
        if options.check_batch:
            _check_rows(path, opened, options.run_seconds)
    return opened


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_axes(signature: Signature) -> None:
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.shape is not None and not spec.open_rows:
                raise NotLoadable(
                    f"requests cannot be joined: axis 0 of {kind} {spec.name!r} is not a batch of any size; "
                    "set max_batch to 1."
                )
    if not signature.inputs:
        raise NotLoadable("requests cannot be joined: the model has no inputs; set max_batch to 1.")


def _check_rows(path: Path, opened: Opened, most_seconds: float) -> None:
    """Run two made-up requests alone and joined: the answers must be the same."""
    limit = threading.Timer(most_seconds, opened.sessions[0].ready())
    session = opened.sessions[0].session
    limit.start()
    try:
        first, second = (runnable_feeds(path, session, seed) for seed in (0, 1))
        second = {name: _louder(array) for name, array in second.items()}
        alone = [run(session, feeds) for feeds in (first, second)]
        joined = run(session, {name: np.concatenate([array, second[name]]) for name, array in first.items()})
    except (RuntimeFailure, ValueError) as error:
        raise NotLoadable(
            "whether requests may be joined could not be checked on made-up inputs "
            f"({str(error).rstrip('.')}): set max_batch to 1, or check_batch to false if you know that they may."
        ) from error
    finally:
        limit.cancel()
    for spec in opened.signature.outputs:
        parts = [answer[spec.name] for answer in alone]
        if not _same(parts, joined[spec.name], _CLOSE.get(spec.datatype.name, 1e-3)):
            raise NotLoadable(
                f"requests must not be joined: output {spec.name!r} of a request depends on what runs beside it "
                "(axis 0 is no batch, or a statistic is taken over it); set max_batch to 1."
            )


def _louder(array: Array) -> Array:
    return array * array.dtype.type(_LOUDER) if _floats(array) else array


def _floats(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _same(parts: list[Array], joined: Array, close: float) -> bool:
    rows = [part.shape[0] if part.ndim else -1 for part in parts]
    if min(rows) < 0 or joined.shape != (sum(rows), *parts[0].shape[1:]):
        return False
    return all(
        _near(part, again, close) for part, again in zip(parts, np.split(joined, np.cumsum(rows)[:-1]), strict=True)
    )


def _near(part: Array, again: Array, close: float) -> bool:
    if not _floats(part):
        return bool(np.array_equal(part, again))
    x, y = part.astype(np.float64), again.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)):
        return False
    largest = np.abs(x[finite]).max(initial=0.0)
    return bool(np.abs(x[finite] - y[finite]).max(initial=0.0) <= close * largest)
