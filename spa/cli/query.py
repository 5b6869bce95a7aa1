"""Options of a query: how units are scored, chosen and compensated, on which samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

MethodName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Published method: obspa, vbp, flap, ob2c, spa-l1 ... (`spa methods` lists all), or auto.",
        show_default=False,
    ),
]
CriterionName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--criterion", help="How units are scored: l2, l1, bn-scale, obspa, variance ...", show_default="the method's"
    ),
]
Aggregated: TypeAlias = Annotated[
    Literal["sum", "mean", "max"] | None,
    typer.Option("--aggregation", help="How the scores of a unit's members are joined.", show_default="the method's"),
]
Allocated: TypeAlias = Annotated[
    Literal["global", "uniform", "efficient", "knapsack"] | None,
    typer.Option(
        "--allocation",
        help="Rank all units together, take the same share of each group, least loss per cost, or least loss.",
        show_default="the method's",
    ),
]
Compensated: TypeAlias = Annotated[
    Literal["none", "bias", "obs", "obs-dense", "stitch"] | None,
    typer.Option("--compensate", help="What is done to the weights that stay.", show_default="the method's"),
]
Recalibrated: TypeAlias = Annotated[
    Literal["none", "norm", "auto"] | None,
    typer.Option(
        "--recalibrate", help="Re-estimate norm statistics; auto keeps that if it helps.", show_default="the method's"
    ),
]
CalibrationSource: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="PATH|none|noise|bn",
        help="Samples: .npz, folder of images, .jsonl or .txt; none makes inputs up.",
        show_default=False,
    ),
]
LossName: TypeAlias = Annotated[
    Literal["auto", "ce", "sampled", "gaussian", "lm"],
    typer.Option(
        "--loss", help="What gradients are taken of: labels of the samples, or none needed (sampled, gaussian)."
    ),
]
CacheFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Keep measurements for further queries.", show_default="the user's cache folder"
    ),
]
NoCache: TypeAlias = Annotated[bool, typer.Option("--no-cache", help="Keep no measurements.")]
Steps: TypeAlias = Annotated[
    int, typer.Option("--steps", metavar="N", help="Prune in steps, and score again after each.", min=1)
]
LatencyTable: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        metavar="TABLE.json",
        help="Made by `spa profile`, for latency and widths.",
        show_default="measured if needed",
    ),
]
LatencyThreads: TypeAlias = Annotated[
    int,
    typer.Option("--threads", metavar="N", help="Inside one operator, for latency; 0: ONNX Runtime's choice.", min=0),
]
LatencyBatch: TypeAlias = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Of the inputs, for latency.", min=1, show_default="1")
]
ScopeName: TypeAlias = Annotated[
    Literal["exact", "all"],
    typer.Option("--scope", help="Only units that leave exactly, or also those that meet a statistic."),
]
Kinds: TypeAlias = Annotated[
    list[str] | None, typer.Option("--kinds", metavar="KIND,...", help="Only these kinds: channel, head, neuron ...")
]
Ignored: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore", metavar="PATTERN", help="Leave groups alone whose name, tensors or nodes match; repeatable."
    ),
]
AllowIO: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-io",
        metavar="PATTERN",
        help="Inputs and outputs of the graph whose shapes may change, as those of a KV cache; repeatable.",
    ),
]
Alignment: TypeAlias = Annotated[
    str,
    typer.Option(
        "--align", metavar="auto|N", help="Units kept per group are a multiple of this; auto: what kernels like."
    ),
]
MinKept: TypeAlias = Annotated[
    str, typer.Option("--min-keep", metavar="N", help="Units kept per group at least: 4, 10%, or head=2,channel=8.")
]
Minimised: TypeAlias = Annotated[
    Literal["macs", "params", "size", "latency"] | None,
    typer.Option("--minimise", help="What models are to be small in.", show_default="macs"),
]
MetricName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="top1, top5, agreement, divergence or perplexity.",
        show_default="top1 with labels, else divergence",
    ),
]
Evaluated: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="PATH",
        help="Samples for the metric, as --calibration.",
        show_default="a fifth of --calibration",
    ),
]
