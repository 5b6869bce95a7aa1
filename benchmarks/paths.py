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


def data_of(path: Path) -> list[Path]:
    """The files with a model's external data."""
    return sorted(path.parent.glob(f"{path.name}.data*"))


def size_of(path: Path) -> int:
    """Bytes of a model with its external data."""
    return sum(part.stat().st_size for part in (path, *data_of(path)))
