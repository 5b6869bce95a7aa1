"""Plans driven by latency against plans driven by MACs, at equal measured latency, with the accuracy of both.

    python -m benchmarks.latency_target [resnet56 mobilenetv2 deit minilm] [--share 0.6] [--seed 0] [--json FILE]

Each network is pruned twice by the same method, batch 1: to `latency=SHARE`, in a closed loop; and to MACs, whose
target is moved until its measured latency is that of the first. Both are timed in turns with the dense network;
MACs-driven plans take the default alignment, which knows no latency table. While the target moves, nothing is refit:
weights do not change latency. Networks and data are those of the accuracy benchmark (SPA_DATA).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import spa
from benchmarks.accuracy import data, evaluate
from benchmarks.accuracy.suites import DEIT, MINILM
from benchmarks.measure import write
from benchmarks.paths import cache
from spa.graph import load
from spa.latency.loop import TOLERANCE, converge
from spa.latency.query import Setting, Stopwatch, table_for
from spa.pipeline import analyze

SLACK = 0.2
"""Points by which the latency-driven plan may be worse."""


@dataclass(frozen=True)
class Case:
    """One network with what it is calibrated and judged on."""

    path: Path
    calibration: dict[str, Any]
    metric: Callable[[Path], float]
    """More is better, in points."""
    dims: dict[str, int] | None = None


def resnet56(seed: int) -> Case:
    test = data.cifar_test("jpeg")
    feeds = {"input": data.cifar_calibration("jpeg", seed).x}
    return Case(data.model("resnet56_cifar10_bn"), feeds, partial(evaluate.top1, images=test))


def mobilenetv2(seed: int) -> Case:
    calibration, test = data.imagenet_halves("mobilenetv2", seed)
    feeds = {"input": calibration.x}
    return Case(data.model("mobilenetv2_1.0_224_imagenet"), feeds, partial(evaluate.top1, images=test))


def deit(seed: int) -> Case:
    calibration, test = data.imagenet_halves("torch", seed)
    return Case(data.model(DEIT), {"input": calibration.x}, partial(evaluate.top1, images=test, batch=25))


def minilm(seed: int) -> Case:
    return Case(data.model(MINILM), data.sentences(512, seed), partial(evaluate.similarity, pairs=data.sts("test")))


CASES = {"resnet56": resnet56, "mobilenetv2": mobilenetv2, "deit": deit, "minilm": minilm}


def compare(case: Case, share: float, method: str, threads: int, seed: int) -> dict[str, Any]:
    """Both plans with what they measured."""
    graph, setting = load(case.path), Setting("cpu", threads, 1)
    kept = cache() / "statistics"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        table = folder / "table.json"
        table_for(graph, analyze(graph), setting, cache=kept, progress=show).write(table)
        profiled = time.perf_counter() - start
        options: dict[str, Any] = {
            "method": method, "calibration": case.calibration, "seed": seed, "cache": kept, "check": False
        }  # fmt: skip
        ours, theirs = folder / "latency.onnx", folder / "macs.onnx"
        start = time.perf_counter()
        result = spa.prune(
            case.path, target=f"latency={share}", output=ours, latency_table=table, threads=threads, batch_size=1,
            **options,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        found = result.report.latency
        assert found is not None
        watch = Stopwatch(graph, setting, folder)

        def by_macs(macs: float, **parts: str) -> spa.Result:
            return spa.prune(case.path, target=f"macs={min(macs, 1.0)}", output=theirs, **options, **parts)

        def measured(candidate: spa.Result) -> float:
            before, after = watch.times(theirs)
            return after / before

        driven = converge(
            found.share,
            partial(by_macs, compensate="none", recalibrate="none"),
            lambda r: r.report.macs.after / r.report.macs.before,
            measured,
            lambda r: r.plan.removed,
        )
        nearest = min(driven.attempts, key=lambda a: abs(a.measured - found.share))
        plain = by_macs(nearest.requested)
        verdict = found.versus_original
        return {
            "model": case.path.name,
            "asked": share,
            "within": abs(found.share / share - 1) <= TOLERANCE,
            "dense_metric": case.metric(case.path),
            "latency": {
                "share": found.share,
                "macs": result.report.macs.after / result.report.macs.before,
                "metric": case.metric(ours),
                "attempts": [asdict(a) for a in found.attempts],
                "verdict": None if verdict is None else asdict(verdict),
                "seconds": seconds,
            },
            "macs": {
                "share": measured(plain),
                "macs": plain.report.macs.after / plain.report.macs.before,
                "metric": case.metric(theirs),
                "attempts": [asdict(a) for a in driven.attempts],
            },
            "table": {**asdict(found.table), "seconds": profiled},
            "where": {k: getattr(found, k) for k in ("device", "runtime", "provider", "threads", "batch")},
        }


def show(stage: str, done: int, total: int) -> None:
    """Progress on stderr."""
    if stage == "profile" and sys.stderr.isatty():
        print(f"\r{stage} {done} of {total}   ", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--method", default="obspa")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.names or CASES:
        if name not in CASES:
            parser.error(f"unknown network {name!r}; choose from {', '.join(CASES)}")
        try:
            case = CASES[name](options.seed)
        except data.DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        rows.append(row := compare(case, options.share, options.method, options.threads, options.seed))
        ours, theirs = row["latency"], row["macs"]
        print(
            f"{row['model']}: asked {row['asked']:.2f}; latency-driven {ours['share']:.3f} with {ours['macs']:.2f} of "
            f"the MACs, metric {ours['metric']:.2f}; MACs-driven {theirs['share']:.3f} with {theirs['macs']:.2f}, "
            f"metric {theirs['metric']:.2f}; dense {row['dense_metric']:.2f}",
            flush=True,
        )
        write(options.json, {"results": rows})
    gains = [row["latency"]["metric"] - row["macs"]["metric"] for row in rows]
    held, better = sum(row["within"] for row in rows), sum(gain > 0 for gain in gains)
    print(f"of {len(rows)}: {held} within {TOLERANCE:.0%} of the target, {better} better than MACs-driven")
    print(f"worst difference: {min(gains):+.2f} points (demanded: -{SLACK} at least)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
