"""spa frontier: a family of models from which one is picked later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.metric import dropped
from spa.cli.options import (
    Batch,
    Dims,
    Inputs,
    Json,
    MaxLength,
    Memory,
    Model,
    Normalised,
    Preprocess,
    Samples,
    SamplesProvider,
    Seed,
    Tokenizer,
    Verbose,
    read_dims,
    read_list,
)
from spa.cli.page import command_line
from spa.cli.prune import read_align
from spa.cli.query import (
    Aggregated,
    Alignment,
    Allocated,
    CacheFolder,
    CalibrationSource,
    Compensated,
    CriterionName,
    Evaluated,
    Ignored,
    Kinds,
    LatencyBatch,
    LatencyTable,
    LatencyThreads,
    LossName,
    MethodName,
    MetricName,
    Minimised,
    MinKept,
    NoCache,
    Recalibrated,
    ScopeName,
)
from spa.errors import UsageError

if TYPE_CHECKING:
    from spa.frontier.index import Family, Point


def frontier(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder; a run that was stopped goes on.", show_default=False
        ),
    ],
    shares: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="Of the original's cost, one model each.",
            show_default="0.95 to 0.3 in steps of 0.05",
        ),
    ] = None,
    minimise: Minimised = None,
    metric: MetricName = None,
    evaluate: Evaluated = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit every model on the pruned prefix before it is measured (minutes).")
    ] = False,
    method: MethodName = None,
    criterion: CriterionName = None,
    aggregation: Aggregated = None,
    normalisation: Normalised = None,
    allocation: Allocated = None,
    compensate: Compensated = None,
    recalibrate: Recalibrated = None,
    calibration: CalibrationSource = None,
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    loss: LossName = "auto",
    memory: Memory = "4GB",
    provider: SamplesProvider = "cpu",
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    latency_table: LatencyTable = None,
    threads: LatencyThreads = 0,
    batch_size: LatencyBatch = None,
    scope: ScopeName = "exact",
    kinds: Kinds = None,
    ignore: Ignored = None,
    align: Alignment = "auto",
    min_keep: MinKept = "auto",
    seed: Seed = 0,
    dim: Dims = None,
    inputs: Inputs = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a family of plans from large to small, each measured on held-out samples; `spa pick` makes one of them."""
    from spa.cache import default_folder
    from spa.frontier.index import PAGE, write
    from spa.frontier.run import SHARES
    from spa.frontier.run import frontier as run
    from spa.report.family import render

    with output.stages(quiet=json) as progress:
        family = run(
            model,
            output=out,
            shares=SHARES if shares is None else _shares(shares),
            minimise=minimise or "macs",
            metric=metric,
            evaluate=evaluate,
            refit=refit,
            reached=None if json else _reached,
            progress=progress,
            method=method,
            criterion=criterion,
            aggregation=aggregation,
            normalisation=normalisation,
            allocation=allocation,
            compensate=compensate,
            recalibrate=recalibrate,
            calibration=calibration,
            samples=samples,
            batch=batch,
            preprocess=preprocess,
            tokenizer=tokenizer,
            max_length=max_length,
            loss=loss,
            memory=memory,
            provider=provider,
            cache=None if no_cache else cache or default_folder(),
            latency_table=latency_table,
            threads=threads,
            batch_size=batch_size,
            scope=scope,
            kinds=read_list(kinds),
            ignore=ignore or (),
            align=read_align(align),
            min_keep=min_keep,
            seed=seed,
            dims=read_dims(dim) or None,
            inputs=inputs,
        )
    write(out / PAGE, render(family, command_line(context)))
    if json:
        output.emit({**family.to_json(), "page": str(out / PAGE)})
        return
    _show(family, out / PAGE)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--shares: cannot read {text!r}; write shares of the original, such as 0.9,0.7,0.5") from None


def _reached(point: Point) -> None:
    """One line, as soon as a point is there."""
    macs = output.count(round(point.costs["macs"]))
    output.console().print(f"{point.share:g}: {macs} MACs, {dropped(point.drop)}", soft_wrap=True)


def _show(family: Family, page: Path) -> None:
    screen = output.console()
    timed = any("latency" in p.costs for p in family.points)
    columns = ["point", family.minimised, "MACs", "parameters", "size", *(["latency"] if timed else [])]
    columns += [family.metric, "drop", "std. error", ""]
    rows = []
    for p in family.points:
        cells = [str(p.index), f"{p.share:g}", output.count(round(p.costs["macs"]))]
        cells += [output.count(round(p.costs["parameters"])), output.size(round(p.costs["bytes"]))]
        if timed:
            cells.append(f"{p.cost('latency'):.3g} ms")
        cells += [f"{p.drop.after:.4g}", f"{p.drop.drop:.4g}", "-" if p.drop.error is None else f"{p.drop.error:.2g}"]
        rows.append([*cells, "" if p.front else "another is better"])
    screen.print(output.table(columns, rows, right=columns[:-1]))
    held = f"{family.calibration['held_samples']} samples of {family.calibration['held']}"
    screen.print(f"{family.metric} of the dense model {family.before:.4g}, on {held}", soft_wrap=True)
    if any(p.draft for p in family.points):
        screen.print("weights are drafts in closed form; `spa pick` refits them, which makes the model better")
    for share, reason in family.skipped.items():
        screen.print(f"{share}: {reason}", soft_wrap=True)
    screen.print(f"page: {page}", soft_wrap=True)
    screen.print(f"make one with `spa pick {family.folder} --index N -o OUT.onnx`", soft_wrap=True)
