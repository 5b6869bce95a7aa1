"""Accuracy after pruning without any training, ours next to Torch-Pruning 1.6.1, on trained networks and real data.

    python -m benchmarks.accuracy [SUITE ...] [--json FILE] [--quick] [--targets 0.8,0.7] [--seeds 3]
                                  [--methods obspa,vbp] [--networks resnet20] [--only ours|peer] [--fresh]

Suites: cifar, imagenet, deit, text (default: all). Networks and data are read from the folder SPA_DATA, or `shared`
beside the checkout. The peer's rows are remembered in $SPA_BENCH_CACHE; `--fresh` measures them again.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.accuracy.data import ROOT, DataError
from benchmarks.accuracy.report import tables
from benchmarks.accuracy.rows import Row, comparisons
from benchmarks.accuracy.suites import OURS_BY_SUITE, SUITES, Options
from benchmarks.paths import cache

PACKAGES = ("spa-prune", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime", "torch", "torch-pruning")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if not (ROOT / "data" / "models").is_dir():
        return _stop(f"no trained networks in {ROOT}: set SPA_DATA to the folder that holds data/models")
    names = options.suites or list(SUITES)
    store = None
    if options.only != "ours" and names != ["text"]:
        if importlib.util.find_spec("torch") is None:
            return _stop("the peer needs torch: pip install torch, or leave it out with --only ours")
        import torch

        from benchmarks.accuracy import peers

        if (why := peers.missing()) is not None:
            return _stop(f"{why}, or leave it out with --only ours")
        torch.set_num_threads(1)
        store = peers.Store(cache() / "accuracy", options.fresh)
    settings = Options(
        options.seeds or (1 if options.quick else 3), options.targets, options.methods, options.only != "peer",
        options.only != "ours", options.quick, options.networks, store,
    )  # fmt: skip
    rows: list[Row] = []
    start = time.perf_counter()
    try:
        for name in names:
            for row in SUITES[name](settings):
                rows.append(row)
                _say(row)
                if options.json is not None and len(rows) % 20 == 0:
                    measure.write(options.json, _body(rows, settings, start, arguments))
    except DataError as error:
        return _stop(str(error))
    print(tables(rows, _headline(settings)))
    measure.write(options.json, _body(rows, settings, start, arguments))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all rows")
    parser.add_argument("--quick", action="store_true", help="one seed, 2,000 CIFAR-10 JPEG images, fewer points")
    parser.add_argument("--targets", type=_shares, default=(), help="shares of the MACs instead of each suite's own")
    parser.add_argument("--seeds", type=int, help="calibration subsets; default 3, with --quick 1")
    parser.add_argument("--methods", type=_words, default=(), help="ours; the first is compared with the peer's best")
    parser.add_argument("--networks", type=_words, default=(), help="only networks with one of these in their name")
    parser.add_argument("--only", choices=("ours", "peer"))
    parser.add_argument("--fresh", action="store_true", help="measure the peer's rows again")
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}; choose from {', '.join(SUITES)}")
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares such as 0.8,0.5") from None
    if not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError("shares must be above 0 and below 1")
    return shares


def _headline(settings: Options) -> dict[str, str]:
    return {name: (settings.methods or OURS_BY_SUITE[name])[0] for name in SUITES}


def _body(rows: Sequence[Row], settings: Options, start: float, arguments: Sequence[str] | None) -> dict[str, Any]:
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    compared = comparisons(rows, _headline(settings))
    return {
        "command": ["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if arguments is None else arguments)],
        "versions": found,
        "seconds": round(time.perf_counter() - start, 1),
        "seeds": settings.seeds,
        "comparisons": [
            {
                "suite": c.key[0], "network": c.key[1], "data": c.key[2], "target": c.key[3],
                "ours": None if c.ours is None else {**vars(c.ours), "drop": c.ours.drop},
                "peer": None if c.peer is None else {**vars(c.peer), "drop": c.peer.drop},
                "ratio": c.ratio, "demanded": c.demanded, "met": c.met,
            }
            for c in compared
        ],
        "rows": [row.to_json() for row in rows],
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _say(row: Row) -> None:
    value = row.error or f"{row.value:.2f} (dense {row.dense:.2f})"
    reached = "" if row.reached is None else f" macs {row.reached:.3f}"
    words = (row.network, row.data, row.tool, row.method, row.target, f"seed {row.seed}", value + reached)
    print(*words, "(screening)" if row.screening else "", file=sys.stderr, flush=True)


def _stop(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
