"""Models and datasets: named sets of files."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from sqlalchemy import Connection, Row, delete, exists, insert, select

from spa_server.database import contents
from spa_server.database.engine import Database
from spa_server.database.pages import before, following, width
from spa_server.database.tables import blobs, collections, files, jobs, needs
from spa_server.errors import Refusal, invalid, not_found
from spa_server.held import StoredFile

__all__ = ["Collection", "Kind", "check_unneeded", "create", "files_of", "get", "listed", "remove"]

Kind = Literal["models", "datasets"]
LIVE = ("queued", "running")
"""States of jobs that have not ended."""


@dataclass(frozen=True)
class Collection:
    """A model or a dataset."""

    name: str
    """`models/{id}` or `datasets/{id}`."""
    display_name: str
    created: float
    files: tuple[StoredFile, ...]


def create(
    database: Database, owner: str, kind: Kind, display_name: str, wanted: Sequence[tuple[str, str]]
) -> Collection:
    """A model or dataset of contents that `owner` has; the same again is the same.

    Args:
        database: where it goes.
        owner: whose it is.
        kind: what it is.
        display_name: for people.
        wanted: (path, sha256) of its files; paths are checked by the caller.

    Raises:
        Refusal: `owner` does not have one of the contents.
    """
    digest = hashlib.sha256(json.dumps([display_name, list(wanted)]).encode()).hexdigest()
    with database.write() as connection:
        have = contents.sizes(connection, owner, [sha256 for _, sha256 in wanted])
        for path, sha256 in wanted:
            if sha256 not in have:
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "not-uploaded",
                    f"{path}: its bytes (sha256 {sha256}) are not here; upload them first",
                    sha256=sha256,
                )
        same = (collections.c.owner == owner, collections.c.kind == kind, collections.c.digest == digest)
        row = connection.execute(select(collections).where(*same)).first()
        if row is None:
            id_ = secrets.token_hex(8)
            values = {"id": id_, "kind": kind, "owner": owner, "display_name": display_name, "digest": digest}
            connection.execute(insert(collections).values(**values, created=time.time()))
            add_files(connection, owner, f"{kind}/{id_}", wanted)
            row = connection.execute(select(collections).where(collections.c.id == id_)).one()
        return _collection(connection, row)


def add_files(connection: Connection, owner: str, parent: str, wanted: Sequence[tuple[str, str]]) -> None:
    """Files of something new, in order."""
    rows = [
        {"parent": parent, "place": place, "path": path, "sha256": sha256, "owner": owner}
        for place, (path, sha256) in enumerate(wanted)
    ]
    if rows:
        connection.execute(insert(files), rows)


def get(database: Database, owner: str, kind: Kind, name: str) -> Collection:
    """One of `owner`'s. Raises: Refusal if there is none of this name."""
    with database.read() as connection:
        return _collection(connection, _row(connection, owner, kind, name))


def listed(database: Database, owner: str, kind: Kind, page_size: int, token: str) -> tuple[list[Collection], str]:
    """One page, and the token of the next. Raises: Refusal if size or token are wrong."""
    limit = width(page_size)
    query = select(collections).where(
        collections.c.owner == owner, collections.c.kind == kind, *before(collections, token)
    )
    ordered = query.order_by(collections.c.created.desc(), collections.c.id.desc()).limit(limit + 1)
    with database.read() as connection:
        rows = connection.execute(ordered).all()
        return [_collection(connection, row) for row in rows[:limit]], following(rows, limit)


def remove(database: Database, owner: str, kind: Kind, name: str) -> None:
    """Delete one. Raises: Refusal if there is none of this name, or a job that has not ended needs it."""
    with database.write() as connection:
        row = _row(connection, owner, kind, name, lock=True)
        check_unneeded(connection, name)
        digests = [file.sha256 for file in files_of(connection, name)]
        connection.execute(delete(files).where(files.c.parent == name))
        connection.execute(delete(collections).where(collections.c.id == row.id))
        contents.forget(connection, owner, digests)


def check_unneeded(connection: Connection, name: str) -> None:
    """Raises: Refusal if a job that has not ended needs it."""
    live = exists().where(jobs.c.id == needs.c.job, jobs.c.state.in_(LIVE))
    found = connection.execute(select(needs.c.job).where(needs.c.parent == name, live)).first()
    if found is not None:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "in-use",
            f"{name}: jobs/{found.job} needs it; wait for it to end, or cancel it",
            job=f"jobs/{found.job}",
        )


def files_of(connection: Connection, parent: str) -> tuple[StoredFile, ...]:
    """Files of a model, a dataset or a job, in order."""
    query = select(files.c.path, files.c.sha256, blobs.c.size).join(blobs, blobs.c.sha256 == files.c.sha256)
    rows = connection.execute(query.where(files.c.parent == parent).order_by(files.c.place))
    return tuple(StoredFile(row.path, row.sha256, row.size) for row in rows)


def _row(connection: Connection, owner: str, kind: Kind, name: str, *, lock: bool = False) -> Row[Any]:
    """With `lock` no job that needs it can be accepted before the transaction ends."""
    prefix, _, id_ = name.partition("/")
    if prefix != kind or not id_:
        raise invalid("name", f"name: {name!r} must be {kind}/ID")
    mine = (collections.c.id == id_, collections.c.owner == owner, collections.c.kind == kind)
    query = select(collections).where(*mine)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise not_found(name)
    return row


def _collection(connection: Connection, row: Row[Any]) -> Collection:
    name = f"{row.kind}/{row.id}"
    return Collection(name, row.display_name, row.created, files_of(connection, name))
