"""spa token: who may call a server. Run where the server's configuration and database are."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.extra import server_extra
from spa.cli.options import Json, read_list
from spa.cli.serve import Config

if TYPE_CHECKING:
    from pathlib import Path

    from spa_server.database import Database
    from spa_server.database.tokens import Token

app = typer.Typer(name="token", help="Tokens of a server: who may call it, and what they may do.")


@app.command()
def create(
    owner: Annotated[str, typer.Option(help="To whom belongs what its holder makes.", show_default=False)],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE,...",
            help="read, write, run (jobs), infer (ask models), operate (load models).",
            show_default="read,write,run,infer",
        ),
    ] = None,
    expires: Annotated[str, typer.Option(metavar="TIME", help="Such as 12h or 90d; 0 for never.")] = "90d",
    label: Annotated[str, typer.Option(help="For people.")] = "",
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a token; it is printed once, and only a digest is kept."""
    with server_extra():
        from spa_server.config import seconds
        from spa_server.database import tokens

    lifetime = seconds(expires, "--expires") or None
    scopes = read_list(scope) or ["read", "write", "run", "infer"]
    token, text = tokens.create(_database(config), owner, scopes, lifetime=lifetime, label=label)
    if json:
        output.emit({**_json(token), "token": text})
    else:
        output.console().print(text, soft_wrap=True)


@app.command("list")
def list_(config: Config = None, json: Json = False) -> None:
    """List all tokens, without their secrets."""
    with server_extra():
        from spa_server.database import tokens

    found = tokens.every(_database(config))
    if json:
        output.emit({"tokens": [_json(token) for token in found]})
        return
    now = time.time()
    rows = [
        (t.id, t.owner, " ".join(t.scopes), _day(t.created), _day(t.expires), "yes" if t.valid(now) else "no", t.label)
        for t in found
    ]
    output.console().print(output.table(("id", "owner", "scopes", "created", "expires", "valid", "label"), rows))


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="As `spa token list` shows it.", show_default=False)],
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a token worthless; servers forget it within five seconds."""
    with server_extra():
        from spa_server.database import tokens

    tokens.revoke(_database(config), token)
    output.emit({"revoked": token}) if json else output.console().print(f"revoked {token}", soft_wrap=True)


def _database(config: Path | None) -> Database:
    import os
    from pathlib import Path

    with server_extra():
        from spa_server.config import load
        from spa_server.database import connect

    named = os.environ.get("SPA_SERVER_CONFIG")
    return connect(load(config or (Path(named) if named else None)).database_url)


def _json(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "owner": token.owner,
        "label": token.label,
        "scopes": list(token.scopes),
        "created": token.created,
        "expires": token.expires,
        "revoked": token.revoked,
    }


def _day(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
