"""The commands and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from spa.cli.bench import bench
from spa.cli.convert import convert
from spa.cli.explain import explain
from spa.cli.export import export
from spa.cli.export_torch import export_torch
from spa.cli.finetune import finetune
from spa.cli.frontier import frontier
from spa.cli.implant import implant
from spa.cli.import_weights import import_weights
from spa.cli.inspect import inspect
from spa.cli.methods import methods
from spa.cli.pick import pick
from spa.cli.profile import profile
from spa.cli.prune import apply, prune, verify
from spa.cli.remote import app as remote
from spa.cli.rules import rules
from spa.cli.run import run
from spa.cli.serve import serve
from spa.cli.stages import float16, opset, ort, quantize
from spa.cli.token import app as token
from spa.version import __version__

_STATUSES = (
    "Exit status: 0 success, 1 error, 2 usage, 3 not a valid model, 4 unsupported model, 5 external data, 6 plan, "
    "7 target cannot be reached, 8 verification failed, 9 ONNX Runtime cannot run the model, 10 output cannot be "
    "written, 11 a gate was missed, 70 internal error, 130 interrupted."
)

app = typer.Typer(
    name="spa",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact structured pruning of any neural network at the ONNX level.",
    epilog=_STATUSES,
)
_COMMANDS = (
    export,
    inspect,
    explain,
    prune,
    convert,
    apply,
    verify,
    frontier,
    pick,
    implant,
    finetune,
    export_torch,
    import_weights,
    quantize,
    float16,
    opset,
    ort,
    run,
    profile,
    bench,
    rules,
    methods,
    serve,
)
for command in _COMMANDS:
    app.command(epilog=_STATUSES)(command)
for group in (remote, token):
    app.add_typer(group, epilog=_STATUSES)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spa {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
