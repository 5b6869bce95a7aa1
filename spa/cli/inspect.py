"""spa inspect: what can be pruned, what cannot, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.options import Dims, Json, Model, Verbose, read_dims, text_file

if TYPE_CHECKING:
    from spa.groups import Analysis

_SHOWN = 20
"""Rows of frozen axes without --verbose."""


def inspect(
    model: Model,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="PAGE.html", help="Draw what is coupled with what, for a browser, there."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Read external data; if not, it may be absent.")
    ] = True,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the groups of a model: what can be pruned, what is frozen and why."""
    from spa.explain import inspection
    from spa.graph import load
    from spa.pipeline import analyze

    with text_file(html, model) as write, output.stages(quiet=json) as progress:
        progress("analyze", 0, 1)
        analysis = analyze(load(model, weights=weights), dims=read_dims(dim))
        if html is not None:
            from spa.report import chart

            write(chart(analysis, model.name))
    if json:
        output.emit(inspection(analysis))
        return
    _show(analysis, verbose)
    if html is not None:
        output.console().print(f"drawing: {html}", soft_wrap=True)


def _show(analysis: Analysis, verbose: bool) -> None:
    from spa.explain import because, is_window

    screen = output.console()
    screen.print(
        output.table(
            ("group", "kind", "units", "parameters", "MACs/unit", "exact"),
            [
                (
                    g.name,
                    g.kind,
                    str(g.units),
                    output.count(g.parameters),
                    output.count(g.unit_macs),
                    "exact" if g.exact else f"statistic: {g.inexact}",
                )
                for g in analysis.groups
            ],
            right=("units", "parameters", "MACs/unit"),
        )
        if analysis.groups
        else "Nothing in this model can be pruned."
    )
    rows = analysis.frozen if verbose else [f for f in analysis.frozen if not is_window(f)]
    shown = rows if verbose else rows[:_SHOWN]
    if shown:
        screen.print()
        screen.print(
            output.table(
                ("frozen", "axis", "parameters", "because"),
                [(f.tensor, str(f.axis), output.count(f.parameters), because(f)) for f in shown],
                right=("axis", "parameters"),
            )
        )
    if len(rows) > len(shown):
        screen.print(f"... and {len(rows) - len(shown)} more; --verbose or --json lists all")
    exact = sum(g.exact for g in analysis.groups)
    screen.print()
    screen.print(
        f"{output.count(analysis.parameters)} parameters, "
        f"{output.share(analysis.prunable_parameters, analysis.parameters)} of them prunable; "
        f"{output.count(analysis.macs)} MACs; "
        f"{len(analysis.groups)} groups, {exact} exact"
    )
    if exact < len(analysis.groups):
        screen.print(
            "Groups that are not exact meet a statistic (mean, norm, softmax); `spa prune --scope all` takes them."
        )
