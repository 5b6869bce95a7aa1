"""Cost of collecting statistics, as a multiple of plain forward passes over the same samples.

    python benchmarks/collect.py [NAME ...] [--samples 256] [--batch 8] [--memory 4GB] [--json FILE]

For each model the moments of the inputs of all prunable layers are collected (means and covariances of patches, what
`obspa` needs), and the profiles of their channels (what `vbp` and `flap` need); between them the model itself is run by
an ordinary, optimised ONNX Runtime session. Figures are wall times of one run and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from analysis import made
from measure import table, write
from paths import path_of

import spa
from spa.calibration import load_calibration
from spa.executors.collect import Setup, covariances, profiles
from spa.graph import load
from spa.measured import Measured
from spa.options import parse_memory
from spa.runtime import open_session, run

MODELS = ("resnet50", "vit-b16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, results = [], []
    for name in made(list(options.names or MODELS), None):
        found = measure(path_of(name), options)
        results.append({"name": name, **found})
        forward = found["forward_s"]
        cells = [f"{found[k]:.1f} ({found[k] / forward:.2f} x)" for k in ("moments_s", "profiles_s")]
        rows.append([name, str(options.samples), f"{forward:.1f}", *cells, f"{found['peak_mb']:.0f}"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        write(options.json, {"samples": options.samples, "batch": options.batch, "results": results})
    print(table(("model", "samples", "forward s", "moments s", "profiles s", "peak MB"), rows))
    return 0


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both collections, and of the forward passes before and after them (their mean)."""
    graph = load(path)
    shape = [int(d) if isinstance(d, int) else 1 for d in graph.model.graph.inputs[0].shape or ()]
    array = np.random.default_rng(0).standard_normal((options.samples, *shape[1:])).astype(np.float32)
    data = load_calibration(array, graph.model)
    analysis = spa.analyze(graph)
    setup = Setup(options.batch, parse_memory(options.memory))
    measured = Measured(analysis, analysis.groups, data, setup)
    taps = [tap for group in analysis.groups for tap in measured.taps(group)]
    sites = list({t.site.name: t.site for t in taps if t.site is not None}.values())
    session = open_session(path, provider="cpu")

    def forward() -> float:
        start = time.perf_counter()
        for batch in data.batches(options.batch):
            run(session, batch)
        return time.perf_counter() - start

    run(session, next(data.batches(options.batch)))
    times = [forward()]
    start = time.perf_counter()
    covariances(graph.model, sites, data, setup)
    moments = time.perf_counter() - start
    times.append(forward())
    start = time.perf_counter()
    profiles(graph.model, list({t.key: t for t in taps}.values()), data, setup)
    channels = time.perf_counter() - start
    times.append(forward())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "forward_s": sum(times) / len(times),
        "forward_spread_s": [min(times), max(times)],
        "moments_s": moments,
        "profiles_s": channels,
        "sites": len(sites),
        "peak_mb": peak,
    }


if __name__ == "__main__":
    sys.exit(main())
