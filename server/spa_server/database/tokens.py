"""Tokens: random secrets, of which only a digest is kept.

A secret has 256 random bits, so that nobody can guess it from its sha256, however fast that is: slow hashes are for
passwords, which people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Row, insert, select, update

from spa.errors import UsageError
from spa_server.database.engine import Database
from spa_server.database.tables import tokens

__all__ = ["SCOPES", "Token", "create", "every", "find", "revoke"]

SCOPES = ("read", "write", "run", "infer", "operate")
"""What a token may allow; the last two are of the inference service: ask models, and load or unload them."""
_PREFIX = "spa"


@dataclass(frozen=True)
class Token:
    """A token, without its secret."""

    id: str
    owner: str
    label: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None

    def valid(self, now: float) -> bool:
        """Whether it opens anything."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def create(
    database: Database, owner: str, scopes: Sequence[str], *, lifetime: float | None = None, label: str = ""
) -> tuple[Token, str]:
    """A new token, and its text, which is not kept.

    Args:
        database: where its digest goes.
        owner: to whom belongs what its holder makes.
        scopes: what it allows.
        lifetime: seconds until it expires; None for never.
        label: for people.

    Raises:
        UsageError: an owner or scope that cannot be.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        what = f"{unknown[0]!r} is no scope" if unknown else "a token needs scopes"
        raise UsageError(f"--scope: {what}; there are {', '.join(SCOPES)}")
    if not owner or len(owner) > 128 or not owner.isprintable() or owner != owner.strip():
        raise UsageError(f"--owner: {owner!r} must be a name of 1 to 128 characters")
    if lifetime is not None and lifetime <= 0:
        raise UsageError("--expires: must be above 0, such as 90d")
    now, secret = time.time(), secrets.token_urlsafe(32)
    ordered = tuple(scope for scope in SCOPES if scope in scopes)
    token = Token(secrets.token_hex(6), owner, label, ordered, now, None if lifetime is None else now + lifetime, None)
    with database.write() as connection:
        connection.execute(
            insert(tokens).values(
                id=token.id,
                owner=owner,
                label=label[:200],
                scopes=" ".join(ordered),
                digest=_digest(secret),
                created=now,
                expires=token.expires,
            )
        )
    return token, f"{_PREFIX}_{token.id}_{secret}"


def find(database: Database, text: str) -> Token | None:
    """The token of a text; None if there is none, or the secret is another one."""
    parts = text.split("_", 2)
    if len(parts) != 3 or parts[0] != _PREFIX or len(text) > 200:
        return None
    with database.read() as connection:
        row = connection.execute(select(tokens).where(tokens.c.id == parts[1])).first()
    if row is None or not hmac.compare_digest(row.digest, _digest(parts[2])):
        return None
    return _token(row)


def every(database: Database) -> list[Token]:
    """All tokens, the newest first."""
    with database.read() as connection:
        return [_token(row) for row in connection.execute(select(tokens).order_by(tokens.c.created.desc()))]


def revoke(database: Database, id_: str) -> None:
    """Make a token worthless.

    Raises:
        UsageError: there is no such token.
    """
    with database.write() as connection:
        known = connection.execute(select(tokens.c.id).where(tokens.c.id == id_)).first()
        if known is None:
            raise UsageError(f"{id_}: there is no such token; `spa token list` shows all")
        fresh = (tokens.c.id == id_) & tokens.c.revoked.is_(None)
        connection.execute(update(tokens).where(fresh).values(revoked=time.time()))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _token(row: Row[tuple[object, ...]]) -> Token:
    return Token(row.id, row.owner, row.label, tuple(row.scopes.split()), row.created, row.expires, row.revoked)
