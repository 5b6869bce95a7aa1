"""spa bench: measured speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spa.cli import output
from spa.cli.options import Dims, Inputs, Json, Seed, Server, Verbose, read_dims

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
        int, typer.Option(metavar="N", help="Threads inside one operator; 0: ONNX Runtime's choice.")
    ] = 0,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Size of axis 0 of every input, where it is open.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds at most.")] = 50,
    seconds: Annotated[float | None, typer.Option(metavar="S", help="Stop after about this time.")] = None,
    seed: Seed = 0,
    dim: Dims = None,
    inputs: Inputs = None,
    server: Server = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency, throughput and memory in ONNX Runtime: models take turns in one process, on the same inputs."""
    from spa.bench import bench as here
    from spa.bench import report_table
    from spa.runtime import check_installation

    run: Callable[..., BenchReport] = here
    if server is not None:
        from spa.cli.remote import measured_far

        run = measured_far(server)
    output.warn(check_installation())
    with output.rounds("rounds", quiet=json) as progress:
        report = run(
            models,
            _names(models),
            provider=provider,
            threads=threads,
            batch=batch,
            dims=read_dims(dim),
            inputs=inputs,
            repeats=repeats,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
    if json:
        output.emit(report.to_json())
        return
    screen = output.console()
    screen.print(report_table(report))
    screen.print(report.measured, soft_wrap=True)


def _names(models: Sequence[Path]) -> list[str]:
    """File names, whole paths where these are equal, numbered where those are, too."""
    short = [path.name for path in models]
    names = short if len(set(short)) == len(short) else [str(path) for path in models]
    return [f"{name} #{names[:k].count(name) + 1}" if name in names[:k] else name for k, name in enumerate(names)]
