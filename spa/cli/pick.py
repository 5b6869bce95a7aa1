"""spa pick: one model of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa.cli import output
from spa.cli.options import Json, NoLatency, Output, Report, Verbose, text_file
from spa.cli.options import check_output as check
from spa.cli.page import command_line, write_page
from spa.cli.prune import show, summary
from spa.cli.query import CacheFolder, CalibrationSource, Compensated, Evaluated
from spa.errors import UsageError


def pick(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made by `spa frontier`.", show_default=False)],
    out: Output,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="METRIC=LIMIT",
            help="The best point within macs=0.6, size=2MB ...; the cheapest with top1-drop=0.01; repeatable.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        int | None, typer.Option(metavar="N", help="Number of the point, instead of a target.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The dense model, if it was moved.", show_default="where it was"),
    ] = None,
    calibration: CalibrationSource = None,
    evaluate: Evaluated = None,
    compensate: Compensated = None,
    cache: CacheFolder = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write the plan there, for `spa apply` and `spa verify`.")
    ] = None,
    report: Report = None,
    no_latency: NoLatency = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make one model of a frontier: cut, prove, compensate, measure its metric, write."""
    from spa.frontier.index import read
    from spa.frontier.pick import pick as run
    from spa.report.family import frontier_of
    from spa.runtime import check_installation

    if no_latency and report is None:
        raise UsageError("--no-latency is about the page of --report: give --report PAGE.html, or leave it out")
    family = read(folder)
    dense = model or Path(family.model)
    if dense.is_file():
        check(dense, out)
    output.warn(check_installation())
    with (
        text_file(plan, dense, out) as write,
        text_file(report, dense, out, *filter(None, (plan,))) as write_report,
        output.stages(quiet=json) as progress,
    ):
        result = run(
            family,
            output=out,
            target=target or None,
            index=index,
            model=model,
            calibration=calibration,
            evaluate=evaluate,
            compensate=compensate,
            cache=cache,
            progress=progress,
        )
        write(result.plan.to_json())
        if report is not None:
            write_page(
                write_report,
                result,
                dense,
                command=command_line(context),
                latency=not no_latency,
                provider="cpu",
                dims={},
                inputs=None,
                seed=0,
                progress=progress,
                frontier=frontier_of(family, result),
            )
    if json:
        output.emit({**summary(result, plan), "page": None if report is None else str(report)})
        return
    show(result, dense, verbose)
    for name, path in (("plan", plan), ("report", report)):
        if path is not None:
            output.console().print(f"{name}: {path}", soft_wrap=True)
