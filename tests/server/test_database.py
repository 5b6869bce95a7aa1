"""The database layer, on SQLite and, where there is one, on PostgreSQL."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import spa
from spa.jobs import InspectSpec
from spa_server.blobs import Blobs
from spa_server.database import Database, collections, connect, contents, jobs, queue
from spa_server.database.tables import metadata
from spa_server.errors import Refusal
from spa_server.held import StoredFile
from tests.server.postgres import Postgres

SHA = "a" * 64


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    found = Postgres().start()
    yield found
    found.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    here = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/spa.db" if here else request.getfixturevalue("postgres").url
    found = connect(url)
    yield found
    metadata.drop_all(found.engine)
    with found.write() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    found.close()


def have(database: Database, owner: str = "alice", sha256: str = SHA, size: int = 10) -> None:
    contents.announce(database, sha256, size)
    contents.confirm(database, owner, sha256)


@pytest.fixture
def model(database: Database) -> str:
    have(database)
    return collections.create(database, "alice", "models", "net", [("net.onnx", SHA)]).name


def test_migrations_give_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    connect(database.engine.url.render_as_string(hide_password=False)).close()  # again changes nothing


def test_only_the_holder_of_a_job_can_end_it(database: Database, model: str) -> None:
    job = jobs.create(database, "alice", InspectSpec(model), "", 0)
    slow = queue.claim(database, "one/x", 0.0, 0)
    assert slow is not None
    assert queue.claim(database, "two/x", 30.0, 0) is None
    assert queue.expire(database, attempts=3, alive=[job.id]) == []
    assert queue.expire(database, attempts=3) == [job.id]
    fast = queue.claim(database, "two/x", 30.0, 0)
    assert fast is not None
    assert fast.attempt == 2
    assert not queue.finish(database, slow, [StoredFile("slow", SHA, 10)])
    assert not queue.fail(database, slow, "x", "y")
    queue.append(database, slow, [{"stage": {"stage": "slow", "done": 0, "total": 1}}])
    assert queue.renew(database, [slow, fast], 30.0)[1] == {job.id}
    assert queue.finish(database, fast, [StoredFile("fast", SHA, 10)])
    assert not queue.finish(database, fast, [StoredFile("again", SHA, 10)])
    done = jobs.get(database, "alice", job.name)
    assert (done.state, [file.path for file in done.files]) == ("succeeded", ["fast"])
    events, ended = jobs.events_after(database, "alice", job.name, 0)
    assert ended
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert not any(event.body.get("stage", {}).get("stage") == "slow" for event in events)


def test_a_job_is_begun_so_often_and_no_more(database: Database, model: str) -> None:
    job = jobs.create(database, "alice", InspectSpec(model), "", 0)
    for attempt in (1, 2, 3):
        held = queue.claim(database, f"s/{attempt}", 30.0, 0)
        assert held is not None
        assert held.attempt == attempt
        queue.give_back(database, held, "crash", "it died", counts=True, attempts=3)
    done = jobs.get(database, "alice", job.name)
    assert (done.state, done.code) == ("failed", "crash")
    assert "begun 3 times" in str(done.message)
    assert queue.claim(database, "s/4", 30.0, 0) is None


def test_servers_never_take_the_same_job(database: Database, model: str) -> None:
    wanted = {jobs.create(database, "alice", InspectSpec(model), "", 0).id for _ in range(24)}
    taken: list[str] = []

    def take(server: str) -> None:
        empty = 0
        while empty < 3:  # a job that another transaction looks at is skipped
            held = queue.claim(database, server, 30.0, 0)
            if held is None:
                empty += 1
                time.sleep(0.05)
            else:
                taken.append(held.id)

    threads = [threading.Thread(target=take, args=(f"s{k}/x",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(wanted)


def test_the_same_request_at_the_same_moment_is_one_job(database: Database, model: str) -> None:
    made: list[str] = []
    barrier = threading.Barrier(6)

    def ask() -> None:
        barrier.wait()
        made.append(jobs.create(database, "alice", InspectSpec(model), "same", 0).id)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len(set(made)) == 1


def test_owners_take_turns_at_their_limit(database: Database, model: str) -> None:
    have(database, "bob")
    other = collections.create(database, "bob", "models", "net", [("net.onnx", SHA)]).name
    for _ in range(2):
        jobs.create(database, "alice", InspectSpec(model), "", 0)
    jobs.create(database, "bob", InspectSpec(other), "", 0)
    owners = []
    while (held := queue.claim(database, "s/x", 30.0, 1)) is not None:
        owners.append(held.owner)
    assert owners == ["alice", "bob"]


def test_contents_go_when_nobody_has_them(database: Database, model: str, tmp_path: Path) -> None:
    gone: list[str] = []
    have(database, "bob")
    assert contents.has(database, "bob", SHA)
    assert not contents.has(database, "carol", SHA)
    assert contents.sweep(database, gone.append, 0, -1) == 0
    collections.remove(database, "alice", "models", model)
    assert not contents.has(database, "alice", SHA)
    assert contents.sweep(database, gone.append, 0, -1) == 0  # bob has it
    assert contents.sweep(database, gone.append, 1e-9, 3600) == 0  # bob made nothing of it, but it was just touched
    assert contents.sweep(database, gone.append, 0, -1) == 1
    assert gone == [SHA]
    assert contents.announce(database, SHA, 10) is False


def test_bytes_that_could_not_be_removed_are_not_relied_on(database: Database) -> None:
    contents.announce(database, SHA, 10)
    contents.confirm(database, "alice", SHA)

    def broken(sha256: str) -> None:
        raise OSError("the store is away")

    with pytest.raises(OSError, match="away"):
        contents.sweep(database, broken, 1e-9, -1)
    assert contents.announce(database, SHA, 10) is False  # is sent again
    contents.confirm(database, "alice", SHA)
    assert contents.announce(database, SHA, 10) is True


def test_jobs_of_others_are_not_there(database: Database, model: str) -> None:
    job = jobs.create(database, "alice", InspectSpec(model), "", 0)
    for call in (jobs.get, jobs.cancel, jobs.remove):
        with pytest.raises(Refusal, match="no such thing"):
            call(database, "bob", job.name)
    with pytest.raises(Refusal, match="no such thing"):
        jobs.create(database, "bob", InspectSpec(model), "", 0)


@pytest.mark.slow
def test_a_restarted_database_is_used_again() -> None:
    server = Postgres().start()
    database = connect(server.url)
    have(database)
    server.stop()
    with pytest.raises(Exception, match=r"connection|server"):
        contents.has(database, "alice", SHA)
    server.start()
    assert contents.has(database, "alice", SHA)
    database.close()
    server.remove()


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "nonsense", "sqlite:////proc/no/spa.db", "postgresql+psycopg://127.0.0.1:1/x"]
)
def test_a_database_that_cannot_be_used_is_said(url: str) -> None:
    with pytest.raises(spa.SpaError, match="database"):
        connect(url)


def test_blobs(tmp_path: Path) -> None:
    store = Blobs(str(tmp_path / "blobs"))
    (tmp_path / "x").write_bytes(b"0123456789")
    store.put(tmp_path / "x", SHA)
    assert not (tmp_path / "x").exists()
    assert store.every() == [SHA]
    with store.open(SHA) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    store.place(SHA, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"0123456789"
    store.remove(SHA)
    store.remove(SHA)
    assert not store.has(SHA)
    with pytest.raises(FileNotFoundError), store.open(SHA):
        pass
    assert (tmp_path / "deep" / "copy").read_bytes() == b"0123456789"


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_without_a_client_of_s3_it_is_said_how_to_install_it() -> None:
    with pytest.raises(spa.UsageError, match=r"install spa-prune\[s3\]"):
        Blobs("s3://bucket/spa")


def test_blobs_of_an_object_store(tmp_path: Path) -> None:
    """fsspec's store in memory stands for any other that is no folder."""
    store = Blobs("memory://bucket/spa")
    (tmp_path / "x").write_bytes(b"0123456789")
    store.put(tmp_path / "x", SHA)
    assert store.every() == [SHA]
    with store.open(SHA) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    store.place(SHA, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    store.remove(SHA)
    assert not store.has(SHA)
    with pytest.raises(spa.UsageError, match="blobs"):
        Blobs("nosuch://bucket")
