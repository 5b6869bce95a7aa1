"""spa run: a whole recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.edge import lines, missed, steps_table
from spa.cli.options import Json, Verbose, text_file
from spa.errors import GateError

if TYPE_CHECKING:
    from spa.edge import Outcome


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Stages and options.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="File to write.", show_default="the recipe's"),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep intermediate files there.", show_default="the recipe's, or removed"),
    ] = None,
    result: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write what was measured there.", show_default="the recipe's"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only read the recipe and say what is wrong with it.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe: prune, fine-tune, quantise, convert, measure; nothing is written unless every gate is reached."""
    from spa.edge import read_recipe
    from spa.edge import run as start
    from spa.runtime import check_installation

    read = read_recipe(recipe)
    if check:
        names = [stage.name for stage in read.stages]
        body = {"recipe": str(recipe), "model": str(read.model), "output": str(out or read.output), "stages": names}
        output.emit(body) if json else output.console().print(f"{recipe} is fine: {', '.join(names)}", soft_wrap=True)
        return
    output.warn(check_installation())
    with (
        text_file(result or read.settings.get("result"), recipe, read.model, out or read.output) as write,
        output.stages(quiet=json) as progress,
    ):
        done = start(read, output=out, work=work, progress=progress)
        write(output.as_json(body := done.to_json()))
    last = done.steps[-1]
    failure = "" if done.passed else missed(last)
    if json:
        output.emit({**body, **({"error": {"code": GateError.code, "message": failure}} if failure else {})})
    else:
        _show(done)
    if failure:
        output.complain(failure)
        raise typer.Exit(GateError.exit_status)


def _show(done: Outcome) -> None:
    screen = output.console()
    screen.print(steps_table(done.steps))
    for step in done.steps:
        for line in lines(step):
            screen.print(line, soft_wrap=True)
    screen.print(f"outputs compared on {done.compared_on}")
    if done.output is not None:
        after = done.steps[-1].bytes_after
        share = output.share(after, done.model_bytes)
        screen.print(f"{done.model} {output.size(done.model_bytes)} -> {output.size(after)} ({share})", soft_wrap=True)
        screen.print(f"wrote {done.output}", soft_wrap=True)
