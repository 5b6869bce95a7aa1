"""Where the models of the benchmarks lie: $SPA_BENCH_CACHE, by default `spa-benchmarks` in the temporary folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache() -> Path:
    """Where models are kept."""
    folder = Path(os.environ.get("SPA_BENCH_CACHE") or Path(tempfile.gettempdir()) / "spa-benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def path_of(name: str) -> Path:
    """Where a model lies once `build` made it."""
    return cache() / f"{name}.onnx"
