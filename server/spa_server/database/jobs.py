"""Jobs as callers see them: accepted, looked at, cancelled, deleted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from sqlalchemy import Connection, Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from spa.jobs import JobSpec, read, references, to_json
from spa_server.database import contents
from spa_server.database.collections import LIVE, check_unneeded, files_of
from spa_server.database.engine import Database
from spa_server.database.pages import before, following, width
from spa_server.database.tables import collections, events, files, jobs, needs
from spa_server.errors import Refusal, exhausted, invalid, not_found
from spa_server.held import StoredFile

__all__ = ["Event", "Job", "cancel", "create", "events_after", "get", "listed", "record", "remove", "remove_old"]

_RETRY = 10.0
"""Seconds after which a full queue may have room."""


@dataclass(frozen=True)
class Job:
    """A job."""

    id: str
    owner: str
    request_id: str
    spec: JobSpec
    state: str
    code: str | None
    message: str | None
    created: float
    started: float | None
    ended: float | None
    attempt: int
    cancel: bool
    files: tuple[StoredFile, ...]

    @property
    def name(self) -> str:
        """`jobs/{id}`."""
        return f"jobs/{self.id}"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    sequence: int
    time: float
    body: Mapping[str, Any]
    """One of `state`, `stage` and `metric`, with its fields."""


def create(database: Database, owner: str, spec: JobSpec, request_id: str, most: int) -> Job:
    """Accept a job; the same request again is the same job.

    Args:
        database: where it goes.
        owner: whose it is.
        spec: what to do.
        request_id: the caller's name for the request; empty for none.
        most: jobs of the owner that may wait or run; 0 for no limit.

    Raises:
        Refusal: something that the spec names is not the owner's or not there, the request id was used for another
            spec, or there are too many jobs.
    """
    body = to_json(spec)
    try:
        with database.write() as connection:
            old = _requested(connection, owner, request_id, body)
            if old is not None:
                return old
            parents = sorted({_parent(connection, owner, name, reference) for name, reference in references(spec)})
            mine = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(LIVE))
            if most and connection.execute(mine).scalar_one() >= most:
                raise exhausted("jobs", f"{most} of your jobs wait or run, which is the most; come again later", _RETRY)
            id_ = secrets.token_hex(8)
            values = {"id": id_, "owner": owner, "request_id": request_id or None, "spec": body, "state": "queued"}
            connection.execute(insert(jobs).values(**values, created=time.time(), attempt=0, cancel=False, sequence=0))
            if parents:
                connection.execute(insert(needs), [{"job": id_, "parent": parent} for parent in parents])
            record(connection, id_, [_state("queued")])
            return _job(connection, connection.execute(select(jobs).where(jobs.c.id == id_)).one())
    except IntegrityError:  # the same request at the same moment, on a database where writers do not take turns
        with database.read() as connection:
            old = _requested(connection, owner, request_id, body)
        if old is None:
            raise
        return old


def _requested(connection: Connection, owner: str, request_id: str, body: Mapping[str, Any]) -> Job | None:
    if not request_id:
        return None
    row = connection.execute(select(jobs).where(jobs.c.owner == owner, jobs.c.request_id == request_id)).first()
    if row is not None and row.spec != body:
        message = f"request_id: {request_id!r} was used for another job (jobs/{row.id}); choose a new one"
        raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "request-id", message, job=f"jobs/{row.id}")
    return None if row is None else _job(connection, row)


def _parent(connection: Connection, owner: str, field: str, reference: str) -> str:
    """The model, dataset or job that a reference is about. Raises: Refusal if it is not there, or somebody else's."""
    kind, id_, *rest = reference.split("/", 2)
    parent = f"{kind}/{id_}"
    if kind == "jobs":
        mine: tuple[Any, ...] = (jobs.c.id == id_, jobs.c.owner == owner)
        row = connection.execute(select(jobs.c.state).where(*mine).with_for_update(read=True)).first()
        if row is not None and row.state != "succeeded":
            message = f"{field}: {parent} has not succeeded ({row.state}); its files can be used when it has"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "not-ready", message, field=field)
    else:
        mine = (collections.c.id == id_, collections.c.owner == owner, collections.c.kind == kind)
        row = connection.execute(select(collections.c.id).where(*mine).with_for_update(read=True)).first()
    path = rest[0] if rest else None
    if row is None or (path and not any(file.path == path for file in files_of(connection, parent))):
        raise not_found(reference)
    return parent


def get(database: Database, owner: str, name: str) -> Job:
    """One of `owner`'s. Raises: Refusal if there is none of this name."""
    with database.read() as connection:
        return _job(connection, _row(connection, owner, name))


def listed(database: Database, owner: str, states: Sequence[str], page_size: int, token: str) -> tuple[list[Job], str]:
    """One page, and the token of the next. Raises: Refusal if size or token are wrong."""
    limit = width(page_size)
    conditions = [jobs.c.owner == owner, *before(jobs, token)]
    if states:
        conditions.append(jobs.c.state.in_(states))
    query = select(jobs).where(*conditions).order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(limit + 1)
    with database.read() as connection:
        rows = connection.execute(query).all()
        return [_job(connection, row) for row in rows[:limit]], following(rows, limit)


def cancel(database: Database, owner: str, name: str) -> Job:
    """Ask a job to stop; one that waits has ended with this. Raises: Refusal if there is none of this name."""
    with database.write() as connection:
        row = _row(connection, owner, name)
        waiting = (jobs.c.id == row.id, jobs.c.state == "queued")
        ended = {"state": "cancelled", "ended": time.time(), "cancel": True}
        if connection.execute(update(jobs).where(*waiting).values(**ended)).rowcount:
            record(connection, row.id, [_state("cancelled", attempt=row.attempt)])
        else:
            connection.execute(update(jobs).where(jobs.c.id == row.id, jobs.c.state == "running").values(cancel=True))
        return _job(connection, _row(connection, owner, name))


def remove(database: Database, owner: str, name: str) -> None:
    """Delete a job that has ended, and its files. Raises: Refusal if there is none, it runs, or another needs it."""
    with database.write() as connection:
        row = _row(connection, owner, name, lock=True)
        if row.state in LIVE:
            message = f"{name}: has not ended ({row.state}); cancel it first"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "in-use", message)
        check_unneeded(connection, name)
        _delete(connection, row)


def remove_old(database: Database, age: float) -> int:
    """Delete jobs that ended more than `age` seconds ago and that no other needs; how many."""
    with database.read() as connection:
        old = select(jobs.c.owner, jobs.c.id).where(jobs.c.ended < time.time() - age, jobs.c.state.not_in(LIVE))
        found = connection.execute(old).all()
    count = 0
    for row in found:
        try:
            remove(database, row.owner, f"jobs/{row.id}")
            count += 1
        except Refusal:  # needed, or deleted by its owner by now
            continue
    return count


def _delete(connection: Connection, row: Row[Any]) -> None:
    name = f"jobs/{row.id}"
    digests = [file.sha256 for file in files_of(connection, name)]
    connection.execute(delete(files).where(files.c.parent == name))
    connection.execute(delete(events).where(events.c.job == row.id))
    connection.execute(delete(needs).where(needs.c.job == row.id))
    connection.execute(delete(jobs).where(jobs.c.id == row.id))
    contents.forget(connection, row.owner, digests)


def events_after(database: Database, owner: str, name: str, sequence: int) -> tuple[list[Event], bool]:
    """Events behind a number, and whether no more will come. Raises: Refusal if there is no such job."""
    with database.read() as connection:
        row = _row(connection, owner, name)
        query = select(events).where(events.c.job == row.id, events.c.sequence > sequence)
        found = connection.execute(query.order_by(events.c.sequence).limit(1000)).all()
    last = found[-1].sequence if found else sequence
    return [Event(e.sequence, e.time, e.body) for e in found], row.state not in LIVE and last >= row.sequence


def record(connection: Connection, id_: str, bodies: Sequence[Mapping[str, Any]]) -> None:
    """Add events to a job. The row is locked by the caller's update, or by this one."""
    if not bodies:
        return
    more = update(jobs).where(jobs.c.id == id_).values(sequence=jobs.c.sequence + len(bodies))
    connection.execute(more)
    last = connection.execute(select(jobs.c.sequence).where(jobs.c.id == id_)).scalar_one()
    now, first = time.time(), last - len(bodies) + 1
    rows = [{"job": id_, "sequence": first + k, "time": now, "body": dict(body)} for k, body in enumerate(bodies)]
    connection.execute(insert(events), rows)


def _state(state: str, **more: Any) -> dict[str, Any]:
    return {"state": {"state": state, **more}}


def _row(connection: Connection, owner: str, name: str, *, lock: bool = False) -> Row[Any]:
    """With `lock` no job that needs it can be accepted before the transaction ends."""
    prefix, _, id_ = name.partition("/")
    if prefix != "jobs" or not id_:
        raise invalid("name", f"name: {name!r} must be jobs/ID")
    query = select(jobs).where(jobs.c.id == id_, jobs.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise not_found(name)
    return row


def _job(connection: Connection, row: Row[Any]) -> Job:
    return Job(
        row.id,
        row.owner,
        row.request_id or "",
        read(row.spec),
        row.state,
        row.code,
        row.message,
        row.created,
        row.started,
        row.ended,
        row.attempt,
        row.cancel,
        files_of(connection, f"jobs/{row.id}"),
    )
