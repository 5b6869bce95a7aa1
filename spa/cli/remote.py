"""spa remote: work that a server does."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa.cli import output
from spa.cli.extra import server_extra
from spa.cli.options import Json, Server
from spa.cli.prune import prune
from spa.cli.served import bench, infer

if TYPE_CHECKING:
    from spa.bench import BenchReport
    from spa.pipeline import Result
    from spa_server.client import Client

app = typer.Typer(name="remote", help="Work that a server does: see `spa serve`.")
JobName = Annotated[str, typer.Argument(metavar="jobs/ID", help="The job.", show_default=False)]


@app.command()
def login(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server.", show_default=False)],
    token: Annotated[
        str | None,
        typer.Option(
            help="As `spa token create` printed it; `-` reads it from the standard input.", show_default=False
        ),
    ] = None,
    ca: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|system", help="Certificates that sign the server's; without it nothing is encrypted."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The client's own certificate, where the server wants one.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Of that certificate.")] = None,
    json: Json = False,
) -> None:
    """Remember a server, after it was asked who you are."""
    with server_extra():
        from spa_server.client.login import Login, remember

    text = sys.stdin.readline().strip() if token == "-" else token
    files = [None if path is None else str(path.resolve()) for path in (certificate, key)]
    place = ca if ca in (None, "system") else str(Path(ca).resolve())
    found = Login(server, text, place, *files)
    with _connected(found) as client:
        account = client.account()
    path = remember(found)
    if json:
        output.emit({"server": server, "owner": account.owner, "scopes": list(account.scopes), "file": str(path)})
    else:
        output.console().print(f"{server} knows you as {account.owner} ({', '.join(account.scopes)})", soft_wrap=True)


@app.command()
def push(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE ...", help="ONNX files, or samples: files and folders.", show_default=False),
    ],
    server: Server = None,
    json: Json = False,
) -> None:
    """Send models (*.onnx, with their external data) and datasets (anything else)."""
    names = {}
    with connected(server) as client, output.stages(quiet=json) as progress:
        for path in files:
            send = client.push_model if path.suffix == ".onnx" else client.push_dataset
            names[str(path)] = send(path, progress=progress).name
    if json:
        output.emit({"names": names})
        return
    for name in names.values():
        output.console().print(name, soft_wrap=True)


def _there(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with the same options, done by the server that `spa remote login` remembers."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with server_extra():
            from spa_server.client.login import find

        options["server"] = find(options["server"]).server
        command(*arguments, **options)

    return run


app.command()(_there(prune))
app.command()(infer)
app.command()(bench)


@app.command()
def submit(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.yaml", help="`kind`, and the options of that kind; files are sent.", show_default=False
        ),
    ],
    server: Server = None,
    json: Json = False,
) -> None:
    """Start a job of any kind: inspect, prune, frontier, finetune, profile, benchmark."""
    with server_extra():
        from spa_server.client.work import pushed, read_spec

    read = read_spec(spec)
    with connected(server) as client, output.stages(quiet=json) as progress:
        name = client.submit(pushed(client, read, progress)).name
    output.emit({"job": name}) if json else output.console().print(name, soft_wrap=True)


@app.command()
def watch(job: JobName, server: Server = None, json: Json = False) -> None:
    """Follow a job until it has ended."""
    with connected(server) as client, output.stages(quiet=json) as progress:
        found = client.wait(job, progress=progress)
    files = {file.path: file.size for file in found.files}
    if json:
        output.emit({"job": job, "state": "succeeded", "files": files})
        return
    output.console().print(f"{job} has succeeded: {', '.join(files)}", soft_wrap=True)


@app.command()
def pull(
    job: JobName,
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for its files; made if it is missing.")
    ] = Path(),
    only: Annotated[
        list[str] | None, typer.Option("--file", metavar="PATH", help="Only this file; repeatable.")
    ] = None,
    server: Server = None,
    json: Json = False,
) -> None:
    """Fetch what a job wrote."""
    with connected(server) as client, output.stages(quiet=json) as progress:
        paths = client.pull(job, out, only=only, progress=progress)
    if json:
        output.emit({"files": [str(path) for path in paths]})
        return
    for path in paths:
        output.console().print(f"wrote {path}", soft_wrap=True)


@app.command()
def jobs(server: Server = None, json: Json = False) -> None:
    """List your jobs, the newest first."""
    with server_extra():
        from spa_server._generated import jobs_pb2

    with connected(server) as client:
        found = list(client.jobs())
    rows = []
    for job in found:
        kind, state = job.spec.WhichOneof("kind"), jobs_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        rows.append((job.name, kind, state, job.create_time.seconds, job.error.code, job.error.message))
    if json:
        keys = ("name", "kind", "state", "created", "code", "message")
        output.emit({"jobs": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    cells = [(n, k, s, time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)), m) for n, k, s, at, _, m in rows]
    output.console().print(output.table(("job", "kind", "state", "created (UTC)", "because"), cells))


@app.command()
def cancel(job: JobName, server: Server = None, json: Json = False) -> None:
    """Stop a job."""
    with connected(server) as client:
        client.cancel(job)
    output.emit({"cancelled": job}) if json else output.console().print(f"cancelled {job}", soft_wrap=True)


@app.command()
def delete(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME ...", help="models/ID, datasets/ID or jobs/ID.", show_default=False)
    ],
    server: Server = None,
    json: Json = False,
) -> None:
    """Delete models, datasets, and jobs with what they wrote."""
    with connected(server) as client:
        for name in names:
            client.delete(name)
    output.emit({"deleted": names}) if json else output.console().print(f"deleted {', '.join(names)}", soft_wrap=True)


def connected(server: str | None) -> Client:
    """A connection to `server`, or to the remembered one. Raises: UsageError if there is none."""
    with server_extra():
        from spa_server.client.login import find

    return _connected(find(server))


def _connected(login: Any) -> Client:
    with server_extra():
        from spa_server.client import Client
        from spa_server.memory import keep_freed

    keep_freed()  # this process does nothing else: files come and go in pieces of a megabyte
    return Client(login.server, token=login.token, ca=login.ca, certificate=login.certificate, key=login.key)


def far(server: str, *, analysis: bool, quiet: bool) -> Callable[..., Result]:
    """A function that takes what `spa.prune` takes, and lets a server do it.

    Args:
        server: which one.
        analysis: whether the result needs the analysis of the model, which is then made here.
        quiet: do not say which job it is.
    """
    from dataclasses import replace

    with server_extra():
        from spa_server.client.work import prune as work

    def told(name: str) -> None:
        if not quiet:
            print(f"spa: {name} on {server}", file=sys.stderr)

    def run(model: Path, **options: Any) -> Result:
        from spa.pipeline import analyze

        with connected(server) as client:
            result = work(client, model, told=told, **options)
        if not analysis:
            return result
        again = analyze(model, dims=options.get("dims"), allow_io=options.get("allow_io", ()))
        return replace(result, analysis=again)

    return run


def measured_far(server: str) -> Callable[..., BenchReport]:
    """A function that takes what `spa.bench` takes, and lets a server measure."""
    with server_extra():
        from spa_server.client.work import bench as work

    def run(models: Sequence[Path], names: Sequence[str], **options: Any) -> BenchReport:
        with connected(server) as client:
            return work(client, models, names, **options)

    return run
