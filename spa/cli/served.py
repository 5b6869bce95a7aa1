"""spa remote infer, spa remote bench: models that a server has loaded, asked over its inference protocol."""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from spa.cli import output
from spa.cli.bench import numbers
from spa.cli.extra import server_extra
from spa.cli.options import Dims, Inputs, Json, Seed, read_dims
from spa.errors import OutputError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spa_server.client.inference import Load, Served, Target

_MODEL = "ONNX files (which are sent), models/ID, jobs/ID for what a job made, or NAME[@VERSION]."
Beside = Annotated[
    bool,
    typer.Option(
        "--load", help="Also load where other versions of the model are loaded, all with default options then."
    ),
]
Server = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="Another server than the remembered one.", show_default=False),
]


def infer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.npz", help="Write the outputs there.", show_default=False),
    ] = None,
    inputs: Inputs = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Size of axis 0 of made-up inputs, where it is open.", min=1, show_default="2"),
    ] = None,
    dim: Dims = None,
    seed: Seed = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="Give up after so long.", show_default="never")
    ] = None,
    load: Beside = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Ask a model once, which is loaded if nothing of it is."""
    if out is not None and not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {str(out.parent)!r} does not exist; create it first")
    if out is not None and inputs is not None and out.resolve() == inputs.resolve():
        raise UsageError(f"{out}: is the input; write to another file")
    with _served([model], server, beside=load, quiet=json) as (served, targets):
        feeds = served.feeds(targets, inputs, read_dims(dim), batch, seed)
        answered = served.infer(targets[0], feeds, timeout)
    rows = [(name, str(array.dtype), list(array.shape)) for name, array in answered.outputs.items()]
    if out is not None:
        _write(out, answered.outputs)
    if json:
        keys = ("name", "type", "shape")
        output.emit(
            {
                "model": model,
                "version": answered.version,
                "seconds": answered.seconds,
                "outputs": [dict(zip(keys, row, strict=True)) for row in rows],
                "output": None if out is None else str(out),
            }
        )
        return
    screen = output.console()
    screen.print(output.table(("output", "type", "shape"), [(n, t, "x".join(map(str, s))) for n, t, s in rows]))
    screen.print(f"version {answered.version} answered in {answered.seconds * 1e3:.1f} ms", soft_wrap=True)
    if out is not None:
        screen.print(f"wrote {out}", soft_wrap=True)


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [OUT ...]", help=_MODEL, show_default=False)],
    callers: Annotated[str, typer.Option(metavar="N[,N...]", help="Requests that wait at the same time.")] = "1",
    seconds: Annotated[float, typer.Option(metavar="S", help="Ask each model for so long, at each setting.")] = 5.0,
    warmup: Annotated[int, typer.Option(metavar="N", help="Untimed requests to each model.", min=0)] = 3,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Size of axis 0 of made-up inputs, where it is open.", min=1, show_default="2"),
    ] = None,
    inputs: Inputs = None,
    dim: Dims = None,
    seed: Seed = 0,
    load: Beside = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Measure requests to served models from here: they take turns; `spa bench --server` measures on the server."""
    counts = numbers("--callers", callers)
    if min(counts) < 1 or seconds <= 0:
        raise UsageError("--callers must be 1 or more, --seconds above 0")
    loads: list[Load] = []
    with _served(models, server, beside=load, quiet=json) as (served, targets):
        feeds = served.feeds(targets, inputs, read_dims(dim), batch, seed)
        for count in counts:
            with output.rounds(f"{count} callers", quiet=json) as progress:
                loads += served.measure(
                    targets, feeds, callers=count, seconds=seconds, warmup=warmup, progress=progress
                )
    if json:
        output.emit({"seconds": seconds, "models": [_body(load) for load in loads]})
        return
    columns = ("model", "callers", "requests/s", "times", "median ms", "90 %", "99 %")
    first = {found.callers: found.per_second for found in reversed(loads)}
    rows = [_row(found, first[found.callers]) for found in loads]
    output.console().print(output.table(columns, rows, columns[1:]))


@contextmanager
def _served(
    models: Sequence[str], server: str | None, *, beside: bool, quiet: bool
) -> Iterator[tuple[Served, list[Target]]]:
    """The service, and what is meant, loaded. Raises: SpaError."""
    from spa.cli.remote import connected

    with server_extra():
        from spa_server.client.inference import Served, target_of

    with connected(server) as client:
        with output.stages(quiet=quiet) as progress:

            def push(path: Path) -> str:
                return client.push_model(path, progress=progress).name

            targets = [target_of(client, text, push) for text in models]
            progress("load", 0, 1)
            served = Served(client)
            served.prepare(targets, beside=beside)
        yield served, targets


def _write(path: Path, outputs: Mapping[str, NDArray[Any]]) -> None:
    """All or nothing. Texts are written as numpy's, as `--inputs` reads them. Raises: OutputError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with zipfile.ZipFile(temporary, "x") as file:  # numpy.savez cannot write arrays of some names
            for name, array in outputs.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as part:
                    text = array.dtype == object
                    np.lib.format.write_array(part, array.astype(np.str_) if text else array, allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); check the folder and its space") from error
    finally:
        temporary.unlink(missing_ok=True)


def _body(load: Load) -> dict[str, object]:
    figures = load.milliseconds
    return {
        "name": load.target,
        "callers": load.callers,
        "requests": load.requests,
        "requests_per_second": load.per_second,
        "median_ms": figures.p50_ms,
        "p90_ms": figures.p90_ms,
        "p99_ms": figures.p99_ms,
        "max_ms": figures.max_ms,
    }


def _row(load: Load, first: float) -> tuple[str, ...]:
    figures = load.milliseconds
    shown = [f"{value:.2f}" if value is not None else "-" for value in (figures.p50_ms, figures.p90_ms, figures.p99_ms)]
    return (load.target, str(load.callers), f"{load.per_second:.1f}", f"{load.per_second / first:.2f}", *shown)
