"""How long further queries take once a model was measured: other targets on a warm cache, proof included.

    python benchmarks/queries.py MODEL SAMPLES.npz [--cache DIR] [--compensate stitch] [--shares S ...] [--json FILE]

The first share fills the cache (which may be warm already). Each other one is asked for twice: as `spa prune` in a
process of its own, everything from start to exit counted; then, at a share nearby, in a process that has asked before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, clock

import spa


def process(arguments: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of the command line."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "spa", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--method", default="obspa")
    parser.add_argument("--compensate", default="stitch")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.7, 0.65, 0.55])
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="spa-queries-") as name:
        cache, out = given.cache or Path(name) / "cache", Path(name) / "out.onnx"
        how: dict[str, Any] = {"method": given.method, "compensate": given.compensate}

        def ask(share: float) -> spa.Result:
            return spa.prune(
                given.model, target=f"macs={share}", calibration=given.samples, cache=cache, output=out, **how
            )

        def note(what: str, share: float, cpu: float, wall: float) -> None:
            rows.append({"query": what, "share": share, "cpu_seconds": cpu, "wall_seconds": wall})
            print(f"{what}, macs={share:g}: {cpu:.2f} s CPU, {wall:.2f} s wall", flush=True)

        first, *others = given.shares
        cpu, wall, _ = clock(lambda: ask(first))
        note("first query (library)", first, cpu, wall)
        for share in others:
            fixed = ["prune", given.model, "-o", out, "--calibration", given.samples, "--cache", cache]
            options = [f"--{key}={value}" for key, value in how.items()]
            note("command line", share, *process([*map(str, fixed), *options, f"--target=macs={share}"]))
            cpu, wall, result = clock(lambda share=share: ask(share + 0.01))
            note("library call", share + 0.01, cpu, wall)
            assert result.report.verify is not None
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
