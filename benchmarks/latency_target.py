"""Plans driven by latency against plans driven by MACs, at equal measured latency.

    python -m benchmarks.latency_target MODEL --eval CALL [--share 0.6] [--method obspa --calibration FILE]

Two prunings of one model with the same method: one to `latency=SHARE`, in a closed loop; and one to MACs, whose target
is moved until its measured latency is that of the first. `--eval` names a function `module:function` that takes the
path of an ONNX file and returns a metric (more is better), such as one of the accuracy benchmark's; without it only
latencies are compared. Everything runs on one table; all latencies are measured, in turns with the dense model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import spa
from spa.graph import load
from spa.latency.loop import TOLERANCE, converge
from spa.latency.query import Setting, Stopwatch, table_for
from spa.pipeline import analyze


def compare(
    model: Path, share: float, options: dict[str, Any], setting: Setting, metric: Callable[[Path], float] | None
) -> dict[str, Any]:
    """Both plans with what they measured."""
    graph = load(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = setting.table or folder / "table.json"
        start = time.perf_counter()
        if setting.table is None:
            table_for(graph, analyze(graph), setting, progress=show).write(table)
        profiled = time.perf_counter() - start
        shared = {**options, "latency_table": table, "threads": setting.threads, "batch_size": setting.batch}
        ours, theirs = folder / "latency.onnx", folder / "macs.onnx"
        start = time.perf_counter()
        result = spa.prune(model, target=f"latency={share}", output=ours, progress=show, **shared)
        seconds = time.perf_counter() - start
        found = result.report.latency
        assert found is not None
        plain = {**options, "align": "auto"}
        watch = Stopwatch(graph, setting, folder)

        def by_macs(macs: float) -> spa.Result:
            return spa.prune(model, target=f"macs={min(macs, 1.0)}", output=theirs, **plain)

        def measured(candidate: spa.Result) -> float:
            before, after = watch.times(theirs)
            return after / before

        driven = converge(
            found.share,
            by_macs,
            lambda r: r.report.macs.after / r.report.macs.before,
            measured,
            lambda r: r.plan.removed,
        )
        nearest = min(driven.attempts, key=lambda a: abs(a.measured - driven.measured))
        by_macs(nearest.requested)  # writes the file of that one again
        return {
            "model": model.name,
            "asked": share,
            "within": abs(found.share / share - 1) <= TOLERANCE,
            "latency": {
                "share": found.share,
                "macs": result.report.macs.after / result.report.macs.before,
                "metric": None if metric is None else metric(ours),
                "attempts": [asdict(a) for a in found.attempts],
                "verdict": None if found.versus_original is None else asdict(found.versus_original),
                "seconds": seconds,
            },
            "macs": {
                "share": driven.measured,
                "macs": driven.solution.report.macs.after / driven.solution.report.macs.before,
                "metric": None if metric is None else metric(theirs),
            },
            "dense_metric": None if metric is None else metric(model),
            "table": {**asdict(found.table), "seconds": profiled},
            "where": {k: getattr(found, k) for k in ("device", "runtime", "provider", "threads", "batch")},
        }


def show(stage: str, done: int, total: int) -> None:
    """Progress on stderr."""
    if stage in ("profile", "latency") and sys.stderr.isatty():
        print(f"\r{stage} {done} of {total}   ", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--eval", default="", help="module:function, called with the path of a model")
    parser.add_argument("--method", default=None)
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--allocation", default="efficient")
    parser.add_argument("--scope", default="exact")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("-o", "--output", type=Path, default=None)
    args = parser.parse_args()
    metric = None
    if args.eval:
        module, _, function = args.eval.partition(":")
        metric = getattr(importlib.import_module(module), function)
    options = {k: getattr(args, k) for k in ("method", "calibration", "samples", "allocation", "scope", "provider")}
    setting = Setting(args.provider, args.threads, args.batch_size, args.table)
    rows = []
    for model in args.model:
        rows.append(row := compare(model, args.share, options, setting, metric))
        ours, theirs = row["latency"], row["macs"]
        print(
            f"{row['model']}: asked {row['asked']:.2f}, measured {ours['share']:.3f}, {ours['macs']:.2f} of the MACs "
            f"(metric {ours['metric']}); MACs-driven {theirs['share']:.3f} with {theirs['macs']:.2f} "
            f"(metric {theirs['metric']}); dense {row['dense_metric']}",
            flush=True,
        )
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
