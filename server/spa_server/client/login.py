"""Where `spa remote` finds its server: given, in the environment, or remembered by `spa remote login`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from spa.errors import OutputError, UsageError
from spa.typed import read_record

__all__ = ["Login", "file", "find", "remember"]


@dataclass(frozen=True)
class Login:
    """A server, and how to get in."""

    server: str
    """HOST:PORT."""
    token: str | None = None
    ca: str | None = None
    """PEM file of certificates that the server's is signed by; `system` for those of the system. Without it the
    connection is not encrypted."""
    certificate: str | None = None
    """PEM file of the client's own certificate, where the server wants one."""
    key: str | None = None
    """Of that certificate."""


def file() -> Path:
    """Where it is remembered."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "spa" / "remote.json"


def remember(login: Login) -> Path:
    """Keep it for later, readable by this user only. Raises: OutputError if it cannot be written."""
    path = file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as opened:
            json.dump(asdict(login), opened)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def find(server: str | None) -> Login:
    """The server to talk to: `server`, else SPA_SERVER, else the remembered one; a token is taken from SPA_TOKEN, else
    from what is remembered of this server.

    Raises:
        UsageError: there is none, or what is remembered cannot be read.
    """
    known = _remembered()
    server = server or os.environ.get("SPA_SERVER")
    if server is None:
        if known is None:
            raise UsageError("which server? Say `spa remote login HOST:PORT` once, or give --server HOST:PORT")
        server = known.server
    login = known if known is not None and known.server == server else Login(server)
    token = os.environ.get("SPA_TOKEN") or login.token
    return Login(server, token, os.environ.get("SPA_SERVER_CA") or login.ca, login.certificate, login.key)


def _remembered() -> Login | None:
    path = file()
    try:
        return read_record(Login, json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); say `spa remote login` again") from error
