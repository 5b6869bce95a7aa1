"""Jobs as servers see them: taken, kept alive, ended, and taken over from servers that died.

A server holds a job under a name that says which attempt it is. Whatever it writes names that holder, so that one that
lost the job (it was too slow, and another took it over) cannot write any more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, select, update

from spa.jobs import read, references
from spa_server.database import contents
from spa_server.database.collections import LIVE, add_files, files_of
from spa_server.database.engine import Database
from spa_server.database.jobs import record
from spa_server.database.tables import jobs
from spa_server.held import Held, StoredFile

__all__ = ["append", "asked_to_stop", "claim", "expire", "fail", "finish", "give_back", "live", "renew", "stop"]

_LOOKED_AT = 500
"""Waiting jobs that one look considers; more only matter if that many belong to owners at their limit."""


def claim(database: Database, server: str, lease: float, running: int) -> Held | None:
    """Take the oldest job that waits, of an owner with fewer than `running` at work (0 for no limit); None if none."""
    with database.write() as connection:
        waiting = select(jobs.c.id, jobs.c.owner).where(jobs.c.state == "queued").order_by(jobs.c.created, jobs.c.id)
        rows = connection.execute(waiting.limit(_LOOKED_AT).with_for_update(skip_locked=True)).all()
        if not rows:
            return None
        counts = select(jobs.c.owner, func.count().label("number")).group_by(jobs.c.owner)
        counts = counts.where(jobs.c.state == "running")
        busy = Counter({row.owner: row.number for row in connection.execute(counts)}) if running else Counter[str]()
        id_ = next((row.id for row in rows if not running or busy[row.owner] < running), None)
        if id_ is None:
            return None
        row = connection.execute(select(jobs).where(jobs.c.id == id_)).one()
        attempt, now = row.attempt + 1, time.time()
        holder = f"{server}/{attempt}"
        values = {"state": "running", "attempt": attempt, "started": now, "holder": holder, "lease": now + lease}
        connection.execute(update(jobs).where(jobs.c.id == id_).values(**values))
        record(connection, id_, [{"state": {"state": "running", "attempt": attempt}}])
        spec = read(row.spec)
        named = {reference: _files(connection, reference) for _, reference in references(spec)}
        return Held(id_, row.owner, spec, attempt, holder, named)


def _files(connection: Connection, reference: str) -> tuple[StoredFile, ...]:
    kind, id_, *rest = reference.split("/", 2)
    found = files_of(connection, f"{kind}/{id_}")
    return tuple(file for file in found if file.path == rest[0]) if rest else found


def renew(database: Database, held: Sequence[Held], lease: float) -> tuple[set[str], set[str]]:
    """Say that their server is alive; ids of jobs that should stop, and of those that are not held any more."""
    until, stop, lost = time.time() + lease, set[str](), set[str]()
    with database.write() as connection:
        for job in held:
            mine = (jobs.c.id == job.id, jobs.c.holder == job.holder)
            if not connection.execute(update(jobs).where(*mine).values(lease=until)).rowcount:
                lost.add(job.id)
            elif connection.execute(select(jobs.c.cancel).where(*mine)).scalar_one():
                stop.add(job.id)
    return stop, lost


def asked_to_stop(database: Database, ids: Sequence[str]) -> set[str]:
    """Those among the jobs that somebody cancelled."""
    with database.read() as connection:
        query = select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.cancel)
        return {row.id for row in connection.execute(query)}


def live(database: Database) -> set[str]:
    """Ids of all jobs that have not ended."""
    with database.read() as connection:
        return {row.id for row in connection.execute(select(jobs.c.id).where(jobs.c.state.in_(LIVE)))}


def append(database: Database, job: Held, bodies: Sequence[Mapping[str, Any]]) -> None:
    """Add events to a job, if it is still held."""
    with database.write() as connection:
        if connection.execute(update(jobs).where(*_mine(job)).values(holder=job.holder)).rowcount:
            record(connection, job.id, bodies)


def finish(database: Database, job: Held, files: Sequence[StoredFile]) -> bool:
    """The job has succeeded, with these files, whose bytes are stored; False if it was not held any more."""
    with database.write() as connection:
        if not _end(connection, job, "succeeded", None, None):
            return False
        for file in files:
            contents.hold(connection, job.owner, file.sha256)
        add_files(connection, job.owner, f"jobs/{job.id}", [(file.path, file.sha256) for file in files])
        return True


def fail(database: Database, job: Held, code: str, message: str) -> bool:
    """The job has failed; False if it was not held any more."""
    with database.write() as connection:
        return _end(connection, job, "failed", code, message)


def stop(database: Database, job: Held) -> bool:
    """The job was cancelled; False if it was not held any more."""
    with database.write() as connection:
        return _end(connection, job, "cancelled", None, None)


def give_back(database: Database, job: Held, code: str, message: str, *, counts: bool, attempts: int) -> None:
    """Let the job be begun again; one that was begun often enough fails.

    Args:
        database: where it is.
        job: the job.
        code: stable text for what happened to the worker.
        message: a sentence about it.
        counts: whether this attempt counts; it does not if the server stops in an orderly way.
        attempts: how many there may be.
    """
    with database.write() as connection:
        _again(connection, job.id, job.holder, job.attempt, code, message, counts=counts, attempts=attempts)


def expire(database: Database, attempts: int, server: str | None = None, *, alive: Collection[str] = ()) -> list[str]:
    """Take jobs from servers that gave no sign of life for too long; their ids.

    Args:
        database: where jobs are.
        attempts: how often a job may be begun.
        server: take all jobs of this server, which has died for sure.
        alive: but not these, which the caller has at work: a database that was away let their leases pass.
    """
    late = jobs.c.lease < time.time() if server is None else jobs.c.holder.startswith(f"{server}/", autoescape=True)
    with database.write() as connection:
        query = (
            select(jobs)
            .where(jobs.c.state == "running", late, jobs.c.id.not_in(alive))
            .with_for_update(skip_locked=True)
        )
        rows = connection.execute(query).all()
        for row in rows:
            message = f"the server that ran it in attempt {row.attempt} died"
            _again(connection, row.id, row.holder, row.attempt, "lost", message, counts=True, attempts=attempts)
    return [row.id for row in rows]


def _mine(job: Held) -> tuple[Any, ...]:
    return jobs.c.id == job.id, jobs.c.holder == job.holder, jobs.c.state == "running"


def _end(connection: Connection, job: Held, state: str, code: str | None, message: str | None) -> bool:
    values = {"state": state, "code": code, "message": message, "ended": time.time(), "holder": None, "lease": None}
    if not connection.execute(update(jobs).where(*_mine(job)).values(**values)).rowcount:
        return False
    record(connection, job.id, [{"state": {"state": state, "attempt": job.attempt, **_error(code, message)}}])
    return True


def _again(
    connection: Connection, id_: str, holder: str, attempt: int, code: str, message: str, *, counts: bool, attempts: int
) -> None:
    mine = (jobs.c.id == id_, jobs.c.holder == holder, jobs.c.state == "running")
    row = connection.execute(select(jobs.c.cancel).where(*mine).with_for_update()).first()
    if row is None:
        return
    body: dict[str, Any] = {"attempt": attempt}
    values: dict[str, Any] = {"holder": None, "lease": None}
    if row.cancel:
        values |= {"state": "cancelled", "ended": time.time()}
    elif counts and attempt >= attempts:
        message = f"{message}; it was begun {attempt} times, which is the most"
        values |= {"state": "failed", "ended": time.time(), "code": code, "message": message}
        body |= _error(code, message)
    else:
        values |= {"state": "queued", **({} if counts else {"attempt": attempt - 1})}
        body |= _error(code, message)
    connection.execute(update(jobs).where(*mine).values(**values))
    record(connection, id_, [{"state": {"state": values["state"], **body}}])


def _error(code: str | None, message: str | None) -> dict[str, Any]:
    return {} if code is None else {"error": {"code": code, "message": message}}
