"""spa serve: pruning as a service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from spa.cli import output
from spa.cli.extra import server_extra
from spa.cli.options import Json, Verbose

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="server.yaml", help="What the server is told.", show_default="$SPA_SERVER_CONFIG"),
]


def serve(
    config: Config = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to listen.", show_default="127.0.0.1:50051")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of all that is kept.", show_default="spa-server")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            metavar="process|ray|ray://...",
            help="Where jobs are done; ray://local starts a cluster.",
            show_default="process",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only read the configuration.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take models and jobs from others over gRPC, until SIGTERM or Ctrl-C."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said by us
    with server_extra():
        from spa_server import logs
        from spa_server.app import run
        from spa_server.config import load

    given = {
        "SPA_SERVER_LISTEN": listen,
        "SPA_SERVER_DATA": None if data is None else str(data.resolve()),
        "SPA_SERVER_EXECUTOR": executor,
    }
    path = config or (Path(os.environ["SPA_SERVER_CONFIG"]) if os.environ.get("SPA_SERVER_CONFIG") else None)
    read = load(path, {**os.environ, **{name: value for name, value in given.items() if value is not None}})
    if check:
        body = {"listen": read.listen, "data": str(read.data), "tokens": read.tokens, "tls": read.secure}
        output.emit(body) if json else output.console().print(f"{path or 'the environment'} is fine", soft_wrap=True)
        return
    logs.start(verbose=verbose)

    def told(address: str) -> None:
        if json:
            output.emit({"listening": address})
        else:
            output.console().print(f"listening on {address}", soft_wrap=True)

    run(read, told)
