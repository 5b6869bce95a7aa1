"""spa profile: how long a model's operators take at other widths."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spa.cli import output
from spa.cli.options import Dims, Inputs, Json, Model, Verbose, read_dims
from spa.errors import OutputError, SpaError, UsageError

if TYPE_CHECKING:
    from spa.latency.predict import Fitness
    from spa.latency.table import Table


def profile(
    model: Model,
    table: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="TABLE.json",
            help="Table to write, or to add to if it exists.",
            show_default=False,
        ),
    ] = None,
    provider: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    threads: Annotated[
        int, typer.Option(metavar="N", help="Threads inside one operator; 0: ONNX Runtime's choice.", min=0)
    ] = 0,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Size of axis 0 of every input, where it is open.", min=1)
    ] = None,
    models: Annotated[int, typer.Option(metavar="N", help="Models with random widths that are measured.", min=4)] = 40,
    passes: Annotated[int, typer.Option(metavar="N", help="How often each is measured.", min=1)] = 2,
    seconds: Annotated[float, typer.Option(metavar="S", help="Of running each of them in one pass.", min=0.01)] = 0.1,
    emit_kit: Annotated[
        Path | None,
        typer.Option(
            "--emit-kit",
            metavar="DIR",
            help="Measure nothing; write a folder for another machine, which needs only onnxruntime and numpy.",
        ),
    ] = None,
    import_result: Annotated[
        Path | None,
        typer.Option("--import", metavar="RESULT.json", help="Read what a kit's script wrote on another machine."),
    ] = None,
    dim: Dims = None,
    inputs: Inputs = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model's operators at many widths, for latency targets; a run that was stopped goes on where it was."""
    from spa.graph import load
    from spa.latency.design import configurations
    from spa.latency.device import machine
    from spa.latency.kit import emit
    from spa.latency.predict import predicted
    from spa.latency.profile import imported
    from spa.latency.profile import profile as run
    from spa.pipeline import analyze

    if emit_kit is not None and (table is not None or import_result is not None):
        raise UsageError("--emit-kit writes a kit and no table: leave --output and --import out")
    if emit_kit is None and table is None:
        raise UsageError("name the table to write with --output TABLE.json, or a folder with --emit-kit DIR")
    dims = read_dims(dim)
    old = _old(table, model)
    if old is not None and import_result is None:
        _same_place(old, machine(provider, threads), table)
    with output.stages(quiet=json) as progress:
        graph = load(model)
        analysis = analyze(graph, dims=dims)
        if emit_kit is not None:
            emit(
                emit_kit,
                graph,
                analysis,
                configurations(analysis.groups, models),
                batch=batch,
                dims=dims,
                inputs=inputs,
                progress=progress,
            )
        elif import_result is not None:
            new = imported(import_result, graph, analysis)
        else:
            assert table is not None
            work = table.with_name(f".{table.name}.{graph.sha256[:12]}.work")
            try:
                new = run(
                    graph,
                    analysis,
                    work,
                    provider=provider,
                    threads=threads,
                    batch=batch,
                    dims=dims,
                    inputs=inputs,
                    models=models,
                    passes=passes,
                    seconds=seconds,
                    progress=progress,
                )
            except SpaError:  # nothing to go on with; a run that is stopped leaves its journal
                shutil.rmtree(work, ignore_errors=True)
                raise
    if emit_kit is not None:
        _kit(emit_kit, json)
        return
    assert table is not None
    whole = new if old is None else old.joined(new)
    whole.write(table)
    if import_result is None:
        shutil.rmtree(work, ignore_errors=True)
    fitness = predicted(whole, graph.sha256, analysis).fitness
    _show(whole, new, graph.sha256, fitness, table, json)


def _old(path: Path | None, model: Path) -> Table | None:
    """The table that is added to."""
    from spa.latency.table import read

    if path is None:
        return None
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if path.exists() and path.resolve() == model.resolve():
        raise UsageError(f"{path}: is the model; write the table to another file")
    return read(path) if path.exists() else None


def _same_place(old: Table, here: Mapping[str, Any], path: Path | None) -> None:
    """Refuse before the measurement what could not be added after it."""
    for name, value in here.items():
        if (was := getattr(old.key, name)) != value:
            raise UsageError(f"{path}: was measured with {name} {was!r} instead of {value!r}; write to another file")


def _kit(folder: Path, json: bool) -> None:
    command = "python measure.py --provider cpu --threads 0 -o result.json"
    if json:
        output.emit({"kit": str(folder), "command": command})
        return
    screen = output.console()
    screen.print(f"wrote {folder}: take it to the other machine and run there", soft_wrap=True)
    screen.print(f"  {command}", soft_wrap=True)
    screen.print("then give result.json to `spa profile MODEL --import result.json -o TABLE.json`", soft_wrap=True)


def _show(whole: Table, new: Table, sha256: str, fitness: Fitness, path: Path, json: bool) -> None:
    found = new.models[sha256]
    known = sum(name in new.operators for name in whole.operators)
    body: dict[str, Any] = {
        "output": str(path),
        "key": {name: getattr(whole.key, name) for name in ("device", "runtime", "provider", "threads", "batch")},
        "latency_ms": found.milliseconds[0],
        "operators": known,
        "models": len(found.configurations),
        "explained": fitness.operators,
        "error": fitness.error,
        "worst": fitness.worst,
        "alignments": {str(step): ms / max(macs, 1) * 1e9 for step, (ms, macs) in found.alignments.items()},
    }
    if json:
        output.emit(body)
        return
    screen = output.console()
    key = whole.key
    screen.print(f"{key.device}, {key.runtime}, {key.provider}, threads {key.threads or 'auto'}, batch {key.batch}")
    screen.print(f"{found.name}: {found.milliseconds[0]:.3g} ms, {known} operators, {body['models']} models measured")
    screen.print(
        f"the table gives the latency of these models within {100 * fitness.error:.1f}% (median; at worst "
        f"{100 * fitness.worst:.0f}%)",
        soft_wrap=True,
    )
    rows = [(str(step), f"{ms:.3g}", f"{ms / max(macs, 1) * 1e9:.3g}") for step, (ms, macs) in found.alignments.items()]
    screen.print(output.table(("widths a multiple of", "ms", "ms per GMAC"), rows, right=("ms", "ms per GMAC")))
    screen.print(f"wrote {path}", soft_wrap=True)
