"""spa bench: measured speed and memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spa.cli import output
from spa.cli.options import Dims, Inputs, Json, Seed, Server, Verbose, read_dims
from spa.errors import UsageError

if TYPE_CHECKING:
    from spa.bench import BenchReport


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL [OUT ...]", help="ONNX files; each is compared with the first.", show_default=False
        ),
    ],
    provider: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto takes CUDA if it works, and reports it.")
    ] = "auto",
    threads: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Threads inside one operator; 0: ONNX Runtime's choice.")
    ] = "0",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Sizes of axis 0 of every input, where it is open.", show_default="the model's"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds at most, at each setting.")] = 50,
    warmup: Annotated[int, typer.Option(metavar="N", help="Untimed runs of each session before its first round.")] = 3,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Stop after about this time, at each setting.")
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Also profile: time per operator and of the slowest nodes (CPU only).")
    ] = False,
    copies: Annotated[
        Literal["included", "excluded"],
        typer.Option(help="Of inputs to a GPU and outputs from it: timed, or both stay on the GPU."),
    ] = "included",
    seed: Seed = 0,
    dim: Dims = None,
    inputs: Inputs = None,
    server: Server = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency, throughput and memory in ONNX Runtime: models take turns in one process, on the same inputs."""
    from spa.bench import operator_remarks, operator_tables, remarks, report_table
    from spa.runtime import check_installation

    counts, batches = numbers("--threads", threads), [None] if batch is None else numbers("--batch", batch)
    options: dict[str, Any] = {
        "provider": provider,
        "dims": read_dims(dim),
        "inputs": inputs,
        "repeats": repeats,
        "warmup": warmup,
        "seconds": seconds,
        "seed": seed,
    }
    if server is not None and (operators or copies != "included"):
        raise UsageError("--operators and --copies are not done by servers; leave them out, or measure here")
    output.warn(check_installation())
    reports: Sequence[BenchReport]
    with output.rounds("rounds", quiet=json) as progress:
        if server is not None:
            reports = _far(server, models, counts, batches, progress, options)
        else:
            from spa.bench import sweep

            reports = sweep(
                models,
                _names(models),
                threads=counts,
                batches=batches,
                operators=operators,
                copies=copies,
                progress=progress,
                **options,
            )
    if json:
        bodies = [report.to_json() for report in reports]
        output.emit(bodies[0] if len(bodies) == 1 else {"reports": bodies})
        return
    screen = output.console()
    screen.print(report_table(*reports))
    for text in remarks(*reports):
        screen.print(text, soft_wrap=True)
    for report in reports if operators else ():
        for table in operator_tables(report):
            screen.print()
            screen.print(table)
        for text in operator_remarks(report):
            screen.print(text, soft_wrap=True)


def _far(
    server: str,
    models: Sequence[Path],
    threads: Sequence[int],
    batches: Sequence[int | None],
    progress: Callable[[int, int], None],
    options: dict[str, Any],
) -> list[BenchReport]:
    """One job of the server for each setting."""
    from spa.cli.remote import measured_far

    run = measured_far(server)
    return [
        run(models, _names(models), threads=count, batch=batch, progress=progress, **options)
        for count, batch in itertools.product(threads, batches)
    ]


def numbers(option: str, text: str) -> list[int]:
    """Integers separated by commas. Raises: UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{option}: cannot read {text!r}; write numbers with commas between them, such as 1,8,32")
    return [int(part) for part in parts]


def _names(models: Sequence[Path]) -> list[str]:
    """File names, whole paths where these are equal, numbered where those are, too."""
    short = [path.name for path in models]
    names = short if len(set(short)) == len(short) else [str(path) for path in models]
    return [f"{name} #{names[:k].count(name) + 1}" if name in names[:k] else name for k, name in enumerate(names)]
