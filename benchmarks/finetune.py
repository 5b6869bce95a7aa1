"""What fine-tuning gives back: ResNet-20 at half of its MACs, cross-entropy against inner distillation.

    python benchmarks/finetune.py [--losses ce inner] [--seeds 3] [--epochs 8] [--images 10000] [--json FILE]
    python benchmarks/finetune.py --choose [--train lossless] [--epochs 2]      # what the defaults were chosen by

ResNet-20 (CIFAR-10, trained) is pruned to `--target` by obspa with 1,000 calibration images, chosen by the seed, and
then fine-tuned by each loss for the same number of epochs on the same batches: of the 10,000 recompressed (JPEG)
training images, or with `--train lossless` of 3,805 original ones. Accuracy is that of ONNX Runtime on test images that
nothing was chosen by: all 10,000 recompressed ones, and the 761 that there are as published (`lossless`; one standard
error is a point). `recovered` is the share of the accuracy that pruning cost which came back; it passes 100 % on JPEGs
where training on them teaches what the network had not seen. Seconds are wall time. Needs torch, pillow, and the
networks and data of the accuracy benchmark (SPA_DATA).

`--choose` compares learning rates, then shares of distillation (`alpha`) of the inner loss, by the accuracy on a fifth
of the training images that is held out of both pruning and training; no test image is read. The network has learned all
of these images before it was pruned, which favours small steps: of the rates within one standard error of the best the
largest is chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import table, write

import spa
from benchmarks.accuracy import data, evaluate

PROMISE = 0.8
"""Share of the lost accuracy that comes back at least, by the best loss."""
KINDS = ("jpeg", "lossless")
ALPHA = 0.9
"""Share of distillation while rates are compared."""


def measured(path: Path, tests: dict[str, data.Images]) -> dict[str, float]:
    """Top-1 in percent per set of test images."""
    return {kind: evaluate.top1(path, images) for kind, images in tests.items()}


def one_seed(options: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    """One row per loss."""
    dense = data.model(options.network)
    train = data.cifar_train(options.train).first(options.images)  # where the accuracy benchmark only calibrates
    tests = {kind: data.cifar_test(kind).first(options.test) for kind in KINDS}
    name = spa.load(dense).model.graph.inputs[0].name
    calibration = data.cifar_calibration(options.train, seed).first(options.calibration)
    small = folder / f"pruned{seed}.onnx"
    pruned = spa.prune(
        dense, target=options.target, output=small, method="obspa", calibration={name: calibration.x}, seed=seed
    )
    before, after = measured(dense, tests), measured(small, tests)
    rows = []
    for loss in options.losses:
        path = folder / f"{loss}{seed}.onnx"
        start = time.perf_counter()
        result = spa.finetune(
            small,
            data={name: train.x, "labels": train.y},
            output=path,
            teacher=None if loss == "ce" else dense,
            plan=None if loss == "ce" else pruned.plan,
            loss=loss,
            epochs=options.epochs,
            batch=options.batch,
            lr=options.lr,
            augment="flip-crop",
            alpha=options.alpha,
            gamma=options.gamma,
            temperature=options.temperature,
            held_out=0,  # the last epoch counts: both losses see all images
            provider=options.provider,
            seed=seed,
        )
        seconds = time.perf_counter() - start
        tuned = measured(path, tests)
        rows.append(
            {
                "loss": loss,
                "seed": seed,
                "dense": before,
                "pruned": after,
                "tuned": tuned,
                "recovered": {k: share(before[k], after[k], tuned[k]) for k in KINDS},
                "seconds": seconds,
                "matched": len(result.matched),
                "history": [dict(e.parts) for e in result.history],
            }
        )
        print(*_cells(rows[-1]), file=sys.stderr, flush=True)
    return rows


def choose(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Accuracy on held-out training images per learning rate, and per alpha at the best one."""
    dense = data.model(options.network)
    images = data.cifar_train(options.train).first(options.images)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = images.at(order[: len(order) // 5]), images.at(order[len(order) // 5 :])
    name = spa.load(dense).model.graph.inputs[0].name
    pruned = spa.prune(
        dense, target=options.target, output=folder / "pruned.onnx", method="obspa",
        calibration={name: train.first(options.calibration or 1000).x},
    )  # fmt: skip
    print(f"dense {evaluate.top1(dense, test):.2f}, pruned {evaluate.top1(folder / 'pruned.onnx', test):.2f}")
    rows: list[dict[str, Any]] = []

    def tried(lr: float, alpha: float) -> float:
        done = next((r["top1"] for r in rows if (r["lr"], r["alpha"]) == (lr, alpha)), None)
        if done is not None:
            return float(done)
        spa.finetune(
            folder / "pruned.onnx", data={name: train.x, "labels": train.y}, output=folder / "tuned.onnx",
            teacher=dense, plan=pruned.plan, loss="inner", epochs=options.epochs, batch=options.batch, lr=lr,
            augment="flip-crop", alpha=alpha, gamma=options.gamma, temperature=options.temperature, held_out=0,
            provider=options.provider,
        )  # fmt: skip
        rows.append({"lr": lr, "alpha": alpha, "top1": evaluate.top1(folder / "tuned.onnx", test)})
        print(f"lr {lr:g}, alpha {alpha:g}: {rows[-1]['top1']:.2f}", flush=True)
        return float(rows[-1]["top1"])

    top = max(tried(lr, ALPHA) for lr in options.rates)
    error = (top * (100 - top) / len(test)) ** 0.5
    best = max(lr for lr in options.rates if tried(lr, ALPHA) >= top - error)
    chosen = max(options.alphas, key=lambda alpha: tried(best, alpha))
    print(
        f"on {len(test)} held-out training images ({options.train}, one standard error {error:.2f} points): "
        f"lr {best:g}, alpha {chosen:g}"
    )
    return rows


def share(dense: float, pruned: float, tuned: float) -> float:
    """Share of the lost accuracy that came back; NaN where none was lost."""
    return (tuned - pruned) / (dense - pruned) if dense > pruned else float("nan")


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["loss"]), str(row["seed"])]
    for kind in KINDS:
        cells += [f"{row[part][kind]:.2f}" for part in ("dense", "pruned", "tuned")]
        cells.append(f"{100 * row['recovered'][kind]:.0f} %")
    return [*cells, f"{row['seconds']:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20_cifar10_bn")
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--train", default="jpeg", choices=KINDS)
    parser.add_argument("--losses", nargs="+", default=["ce", "inner"], choices=["ce", "kd", "inner"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--alpha", type=float, default=0.5, help="0.5 for JPEGs, that the teacher reads badly")
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--provider", default="cpu", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--images", type=int, help="training images; default: all")
    parser.add_argument("--calibration", type=int, help="calibration images; default: 1,000")
    parser.add_argument("--test", type=int, help="test images of each kind; default: all")
    parser.add_argument("--choose", action="store_true", help="compare rates and alphas on held-out training images")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.02, 0.05], help="of --choose")
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5, 0.9, 1.0], help="of --choose")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.choose:
                rows = choose(options, Path(folder))
                write(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "results": rows})
                return 0
            for seed in range(options.seeds):
                rows += one_seed(options, seed, Path(folder))
                write(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "results": rows})
    except (data.DataError, spa.SpaError) as error:
        sys.exit(f"benchmarks/finetune.py: {error}")
    columns = ["loss", "seed"]
    for kind in KINDS:
        columns += [f"{kind} dense", "pruned", "tuned", "recovered"]
    print(table((*columns, "s"), [_cells(row) for row in rows]))
    means, shares = (
        {
            loss: statistics.fmean(row[part][options.train] for row in rows if row["loss"] == loss)
            for loss in options.losses
        }
        for part in ("tuned", "recovered")
    )
    for loss in options.losses:
        print(
            f"{loss}: mean top-1 {means[loss]:.2f} ({options.train}), {100 * shares[loss]:.0f} % of the loss recovered"
        )
    print(f"best recovers {100 * PROMISE:.0f} % or more: {'yes' if max(shares.values()) >= PROMISE else 'NO'}")
    if {"ce", "inner"} <= means.keys():
        print(f"inner above ce: {'yes' if means['inner'] > means['ce'] else 'NO'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
