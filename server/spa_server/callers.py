"""Who calls, and what they may."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from spa_server.database import Database
from spa_server.database.tokens import SCOPES, Token, find
from spa_server.errors import Refusal

__all__ = ["LOCAL", "Caller", "Callers", "allow", "current"]

LOCAL = "local"
"""The owner of everything where callers need no token."""
_REMEMBERED = 5.0
"""Seconds for which a token is not looked up again: it is worthless so long after it was revoked."""
_MOST = 10_000


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    owner: str
    scopes: tuple[str, ...]
    token: str = ""
    """Id of the token; never its secret."""


_caller: ContextVar[Caller] = ContextVar("caller")


def current() -> Caller:
    """Who made the request that is handled now."""
    return _caller.get()


class Callers:
    """Tells callers by their tokens or certificates."""

    def __init__(self, database: Database, *, tokens: bool) -> None:
        """
        Args:
            database: where tokens are.
            tokens: whether callers need one.
        """
        self._database, self._tokens = database, tokens
        self._known: dict[str, tuple[float, Token]] = {}

    def remembered(self, metadata: Mapping[str, Any]) -> Caller | None:
        """The caller, if that can be told without asking the database. Raises: Refusal as `find`."""
        text = _bearer(metadata) if self._tokens else None
        at, token = self._known.get(text, (0.0, None)) if text else (0.0, None)
        return _checked(token) if token is not None and time.monotonic() < at + _REMEMBERED else None

    def find(self, metadata: Mapping[str, Any], certificate: str | None) -> Caller:
        """The caller; asks the database.

        Args:
            metadata: of the request.
            certificate: common name of the client's certificate, which was checked.

        Raises:
            Refusal: there is no token, it is unknown, expired or revoked.
        """
        if not self._tokens:
            return Caller(certificate or LOCAL, SCOPES)
        text = _bearer(metadata)
        token = find(self._database, text) if text else None
        if token is None:
            what = "this token is not known here" if text else "a token is needed (`spa remote login`)"
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "token", what)
        if len(self._known) >= _MOST:
            self._known.clear()
        assert text is not None
        self._known[text] = (time.monotonic(), token)
        return _checked(token)

    def become(self, caller: Caller) -> None:
        """`current` is this one from now on, in this request."""
        _caller.set(caller)


def allow(caller: Caller, scope: str | None) -> None:
    """Raises: Refusal if the caller may not do what needs this scope."""
    if scope is not None and scope not in caller.scopes:
        message = f"your token does not have the scope {scope!r}; it has {', '.join(caller.scopes)}"
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "scope", message, scope=scope)


def _checked(token: Token) -> Caller:
    if not token.valid(time.time()):
        what = "was revoked" if token.revoked is not None else "has expired"
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "token", f"this token {what}; ask for a new one")
    return Caller(token.owner, token.scopes, token.id)


def _bearer(metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get("authorization")
    kind, _, text = value.partition(" ") if isinstance(value, str) else ("", "", "")
    return text.strip() if kind.lower() == "bearer" and text.strip() else None
