"""Engines for tests, and requests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spa import runtime
from spa_server.serving import Engine, FolderSource, Limits

T = TypeVar("T")


def with_engine(folder: Path, work: Callable[[Engine], Awaitable[T]], limits: Limits | None = None) -> T:
    """Run `work` with an engine, and close it; nothing may be left behind that nobody looked at."""
    complaints: list[dict[str, Any]] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        engine = Engine(FolderSource(folder), limits)
        try:
            return await work(engine)
        finally:
            await engine.close()
            gc.collect()

    result = asyncio.run(main())
    assert complaints == []
    return result


def x_of(rows: int, seed: int = 0, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return runtime.run(runtime.open_session(path, provider="cpu", threads=1), feeds)


def turns(count: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros(1, np.float32), "turns": np.array([count])}


LONG = 200_000
"""Turns of `nets.patient` that take some tenths of a second."""
