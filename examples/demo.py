"""Train a small CNN and a small ViT on handwritten digits, prune each to two sizes by two methods, and compare.

    make demo        # or: python examples/demo.py

Pruning goes through the public API, accuracy and latency through ONNX Runtime. Models are written to examples/out/.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
from rich.console import Console
from rich.table import Table

import spa
from spa.bench import ModelBench, bench

TARGETS = {"cnn": (0.7, 0.5), "vit": (0.8, 0.6)}
"""Fractions of the MACs to keep."""
TITLES = {"cnn": "CNN (residual, depthwise, BatchNorm)", "vit": "ViT (4 layers, fused qkv, GELU)"}
BATCH = 64
BENCH_SECONDS = 5.0
SAMPLES = 256
"""Training images, without labels, that obspa looks at."""
NOTE = (
    "Accuracy is on 450 test images that neither training nor calibration saw. l2 looks at weights only and leaves "
    f"those that stay as they are; obspa looks at {SAMPLES} training images without labels and refits what stays, in "
    "closed form. Nothing was trained after pruning. Latency is ONNX Runtime's on this machine, all models of a table "
    "interleaved in one process. The exactness error is that of the pruned model, before any refit, against the dense "
    "one with the same channels masked: removing them changes nothing else."
)


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    path: Path
    accuracy: float
    macs: float
    parameters: int
    bytes: int
    error: float | None = None
    """Largest relative error against the masked dense model; None for the dense model itself."""


def rows_of(key: str, dense: Path, console: Console) -> list[Row]:
    """The dense model and its pruned versions."""
    images = digits.data()[0]
    ways: dict[str, dict[str, Any]] = {
        "l2": {"criterion": "l2"},
        "obspa": {"method": "obspa", "calibration": images, "samples": SAMPLES},
    }
    pruned: list[Row] = []
    first: Any = None
    for fraction in TARGETS[key]:
        for way, options in ways.items():
            path = digits.OUT / f"{key}-{fraction}-{way}.onnx"
            start = time.perf_counter()
            report = spa.prune(dense, target=f"macs={fraction}", scope="exact", output=path, seed=0, **options).report
            first = first or report
            seconds = time.perf_counter() - start
            console.print(f"{key}: pruned to {fraction:.0%} of its MACs by {way} and verified in {seconds:.1f} s")
            pruned.append(
                Row(
                    name=f"{way}, macs={fraction}",
                    path=path,
                    accuracy=digits.accuracy(path),
                    macs=report.macs.after,
                    parameters=report.parameters.after,
                    bytes=path.stat().st_size,
                    error=report.verify.max_rel_error,
                )
            )
    before = Row(
        name="dense",
        path=dense,
        accuracy=digits.accuracy(dense),
        macs=first.macs.before,
        parameters=first.parameters.before,
        bytes=dense.stat().st_size,
    )
    return [before, *pruned]


def table_of(title: str, rows: list[Row], timings: tuple[ModelBench, ...], batch: int) -> Table:
    """One line for each model, relative figures against the first."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in ("test accuracy", "MACs", "parameters", "bytes", f"ms / {batch} images", "speed", "exactness error"):
        table.add_column(heading, justify="right")
    dense = rows[0]
    for row, timing in zip(rows, timings, strict=True):
        versus = timing.versus_first
        table.add_row(
            row.name,
            f"{row.accuracy:.1%}",
            f"{row.macs / 1e6:.2f} M ({row.macs / dense.macs:.0%})",
            f"{row.parameters:,} ({row.parameters / dense.parameters:.0%})",
            f"{row.bytes:,} ({row.bytes / dense.bytes:.0%})",
            f"{timing.latency.median_ms:.2f} ± {timing.latency.mad_ms:.2f}",
            "1x" if versus is None else f"{versus.speedup:.2f}x [{versus.low:.2f}, {versus.high:.2f}]",
            "-" if row.error is None else f"{row.error:.1e}",
        )
    return table


def main() -> int:
    """Train, prune, measure, print."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    start = time.perf_counter()
    console.print("Training a CNN and a ViT on scikit-learn's digits (only the first time) ...")
    models = digits.trained()
    console.print(f"trained and exported in {time.perf_counter() - start:.0f} s")
    tables = []
    for key, dense in models.items():
        rows = rows_of(key, dense, console)
        report = bench(
            [row.path for row in rows],
            [row.name for row in rows],
            provider="cpu",
            batch=BATCH,
            repeats=500,
            seconds=BENCH_SECONDS,
            memory=False,
        )
        tables.append(table_of(TITLES[key], rows, report.models, report.batch))
    for table in tables:
        console.print()
        console.print(table)
    console.print(NOTE, width=120)
    console.print(f"\nModels: {digits.OUT}/", soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except spa.SpaError as error:
        sys.exit(f"demo: {error}")
