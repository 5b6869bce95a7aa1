"""ONNX Runtime latency, dense against pruned: multiples of what kernels like against widths as they fall.

    python benchmarks/latency.py [NAME ...] [--target macs=0.6] [--batch 1] [--seconds 30] [--json FILE]

Each model is pruned twice to the same target, with `align=auto` and with `align=1`, and the three are timed by
`spa.bench`, interleaved in one process. Fewer MACs are not always faster: odd widths can be slower than the model
they came from.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from analysis import made
from measure import table, write
from paths import path_of

import spa.pipeline as pipeline
from spa.bench import bench

MODELS = ("mobilenet-v2", "efficientnet-b0", "resnet50", "vit-b16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--batch", type=int, action="append", help="may be given several times; default 1")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each model and batch")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--allocation", choices=("global", "uniform"), default="global")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, results = [], []
    for name in made(list(options.names or MODELS), os.environ.get("SPA_PEERS_PYTHON")):
        path = path_of(name)
        with tempfile.TemporaryDirectory(prefix="spa-latency-") as folder:
            files, left = [path], [1.0]
            for align in ("auto", 1):
                out = Path(folder) / f"{align}.onnx"
                result = pipeline.prune(
                    path, target=options.target, output=out, align=align, check=False, allocation=options.allocation
                )
                files.append(out)
                left.append(result.report.macs.after / result.report.macs.before)
            names = ["dense", "align auto", "align 1"]
            for batch in options.batch or [1]:
                report = bench(
                    files, names, provider="cpu", batch=batch, seconds=options.seconds, repeats=400,
                    threads=options.threads, memory=False,
                )  # fmt: skip
                results.append({"name": name, "batch": batch, "macs_left": left, **report.to_json()})
                for row, share in zip(report.models, left, strict=True):
                    rows.append(_row(name, batch, row, share))
                    print(" ".join(rows[-1]), file=sys.stderr, flush=True)
                write(options.json, {"target": options.target, "allocation": options.allocation, "results": results})
    headings = ("model", "batch", "version", "MACs kept", "median ms", "p10 - p90", "time / dense", "verdict")
    print(table(headings, rows))
    return 0


def _row(name: str, batch: int, row: Any, share: float) -> list[str]:
    latency, versus = row.latency, row.versus_first
    ratio, verdict = "1", ""
    if versus is not None:
        ratio = f"{1 / versus.speedup:.2f} [{1 / versus.high:.2f}, {1 / versus.low:.2f}]"
        verdict = versus.verdict
    spread = f"{latency.p10_ms:.1f} - {latency.p90_ms:.1f}"
    return [name, str(batch), row.name, f"{share:.3f}", f"{latency.median_ms:.2f}", spread, ratio, verdict]


if __name__ == "__main__":
    sys.exit(main())
