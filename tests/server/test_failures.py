"""What dies, fills up or hangs: nothing that was accepted is lost, and every answer is a proper one."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest

import spa
from spa.jobs import BenchmarkSpec, InspectSpec, PruneSpec
from spa_server._generated import jobs_pb2, jobs_pb2_grpc, uploads_pb2, uploads_pb2_grpc
from spa_server.blobs import Blobs
from spa_server.client import Client
from spa_server.client.failures import reason_of
from spa_server.client.transfers import hashed
from spa_server.config import load
from spa_server.database import connect
from spa_server.database.tables import blobs, files
from tests.server.running import Running, until, workers_of

pytestmark = pytest.mark.slow  # each starts servers of its own, and waits for work that takes seconds
LONG = {"repeats": 100_000, "memory": False, "provider": "cpu"}


def begun(server: Running, client: Client, name: str, attempt: int) -> bool:
    """Whether a job is in this attempt, and has a worker."""
    return client.job(name).attempt == attempt and bool(workers_of(server))


def at_work(client: Client, name: str) -> None:
    """Wait until the worker itself said something."""
    for event in client.watch(name):
        if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
            return


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies(server: Running, model: Path, number: signal.Signals) -> None:
    """A kill may have had nothing to do with the job: it is begun again. A crash has: it fails. Others go on."""
    with server.client() as client:
        name = client.push_model(model).name
        job = client.submit(BenchmarkSpec((name,), seconds=1.5, **LONG))
        at_work(client, job.name)
        os.kill(workers_of(server)[-1], number)
        if number == signal.SIGKILL:
            assert client.wait(job.name).attempt == 2
        else:
            with pytest.raises(spa.SpaError, match="SIGSEGV"):
                client.wait(job.name)
            assert client.job(job.name).error.code == "crash"
            assert client.job(job.name).attempt == 1
        client.wait(client.submit(InspectSpec(name)).name)


def test_a_job_whose_worker_is_killed_again_and_again_fails(tmp_path: Path, model: Path) -> None:
    server = Running(tmp_path, workers={"attempts": 2}).start()
    with server.client() as client:
        job = client.submit(BenchmarkSpec((client.push_model(model).name,), seconds=30.0, **LONG))
        for attempt in (1, 2):
            until(partial(begun, server, client, job.name, attempt))
            time.sleep(0.3)
            os.kill(workers_of(server)[-1], signal.SIGKILL)
        with pytest.raises(spa.SpaError, match="begun 2 times"):
            client.wait(job.name)
    server.stop()


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"memory": "60MB"}, "memory"), ({"time": "1s"}, "time"), ({"cpu_time": "1s"}, "cpu-time")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worker_that_takes_too_much(tmp_path: Path, model: Path, limits: dict[str, str], code: str) -> None:
    server = Running(tmp_path, workers=limits).start()
    with server.client() as client:
        job = client.submit(BenchmarkSpec((client.push_model(model).name,), seconds=60.0, **LONG))
        with pytest.raises(spa.SpaError):
            client.wait(job.name)
        found = client.job(job.name)
        assert (found.error.code, found.attempt) == (code, 1)
        assert not workers_of(server)
    assert server.stop() == 0
    assert not list((server.data / "jobs").iterdir())


def test_a_killed_server_goes_on_with_its_jobs(tmp_path: Path, model: Path) -> None:
    """Watchers wait for it, the job is begun again, a job that waited is done, and the worker went with its server."""
    server = Running(tmp_path).start()
    with server.client() as client:
        name = client.push_model(model).name
        job = client.submit(BenchmarkSpec((name,), seconds=3.0, **LONG))
        waiting = client.submit(PruneSpec(name, ("macs=0.7",)))
        at_work(client, job.name)
        ended: list[jobs_pb2.Job] = []
        watcher = threading.Thread(target=lambda: ended.append(client.wait(job.name)))
        watcher.start()
        workers = workers_of(server)
        port = server.port
        server.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        server.start(port=port)
        watcher.join(60)
        assert ended[0].attempt == 2
        assert client.wait(waiting.name).attempt == 1
        events = [event for event in client.watch(job.name) if event.WhichOneof("event") == "state"]
        assert [event.state.error.code for event in events if event.state.HasField("error")] == ["lost"]
    server.stop()
    assert stored(server) == needed(server)


def stored(server: Running) -> set[str]:
    return set(Blobs(str(server.data / "blobs")).every())


def needed(server: Running) -> set[str]:
    database = connect(load(server.config).database_url)
    with database.read() as connection:
        rows = {row.sha256 for row in connection.execute(blobs.select())}
        used = {row.sha256 for row in connection.execute(files.select())}
    database.close()
    assert used <= rows
    return rows


def test_a_server_that_is_asked_to_stop_lets_jobs_end(tmp_path: Path, model: Path) -> None:
    server = Running(tmp_path).start()
    with server.client() as client:
        name = client.push_model(model).name
        short = client.submit(BenchmarkSpec((name,), seconds=1.0, **LONG))
        at_work(client, short.name)
        waiting = client.submit(InspectSpec(name))
    assert server.stop() == 0
    server.start()
    with server.client() as client:
        assert (client.job(short.name).state, client.job(short.name).attempt) == (jobs_pb2.JOB_STATE_SUCCEEDED, 1)
        assert client.wait(waiting.name).attempt == 1
    server.stop()


def test_a_server_that_cannot_wait_gives_jobs_back(tmp_path: Path, model: Path) -> None:
    server = Running(tmp_path, drain="0s").start()
    with server.client() as client:
        job = client.submit(BenchmarkSpec((client.push_model(model).name,), seconds=3.0, **LONG))
        at_work(client, job.name)
    start = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start < 3
    server.start()
    with server.client() as client:
        assert client.wait(job.name).attempt == 1  # that attempt was not the job's fault
    server.stop()


def test_watchers_that_go_away(tmp_path: Path, model: Path) -> None:
    """Callers that cancel or drop a stream, at any moment, do the server no harm, and leave nothing behind."""
    server = Running(tmp_path, workers={"count": 0}, limits={"requests": 20}).start()
    with server.client() as client:
        job = client.submit(InspectSpec(client.push_model(model).name)).name
        for number in range(60):
            with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = jobs_pb2_grpc.JobServiceStub(channel)
                stream = stub.WatchJob(jobs_pb2.WatchJobRequest(name=job))
                if number % 4:
                    next(stream)
                if number % 2:
                    stream.cancel()
        until(lambda: client.account().owner == "local")
    assert server.stop() == 0


def test_one_folder_is_for_one_server(server: Running) -> None:
    other = Running(server.folder)
    with pytest.raises(AssertionError, match="another server uses this folder"):
        other.start()


def test_a_locked_database_is_said_and_passes(tmp_path: Path, model: Path) -> None:
    server = Running(tmp_path, database=f"sqlite:///{tmp_path}/own.db?timeout=0.3").start()
    with server.client() as client:
        name = client.push_model(model).name
        with sqlite3.connect(tmp_path / "own.db", isolation_level=None) as locker:
            locker.execute("BEGIN IMMEDIATE")
            with pytest.raises(spa.SpaError, match="database does not answer"):
                client.delete(name)
            locker.execute("ROLLBACK")
        locker.close()
        client.wait(client.submit(InspectSpec(name)).name)
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_passes(small_disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(np.random.default_rng(0).bytes(12_000_000))
    sha256, size = hashed(path, lambda *_: None)
    server = Running(small_disk).start()

    def pieces() -> Iterator[uploads_pb2.UploadRequest]:
        yield uploads_pb2.UploadRequest(header=uploads_pb2.UploadHeader(sha256=sha256, size=size))
        data = path.read_bytes()
        for start in range(0, size, 1 << 20):
            yield uploads_pb2.UploadRequest(data=data[start : start + (1 << 20)])

    with grpc.insecure_channel(server.address) as channel, server.client() as client:
        stub = uploads_pb2_grpc.UploadServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(pieces())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value)[0] == "disk-full"
        subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
        assert stub.GetUpload(uploads_pb2.GetUploadRequest(sha256=sha256)).offset > 0
        found = client.push_dataset(path)
        target = tmp_path / "back"
        target.mkdir()
        assert found.files[0].sha256 == sha256
    server.stop()


def test_quotas(tmp_path: Path, model: Path) -> None:
    server = Running(tmp_path, quotas={"bytes": "1MB", "open": 2, "running": 1}, workers={"count": 2}).start()
    (tmp_path / "big").write_bytes(os.urandom(1_100_000))
    with server.client() as client:
        with pytest.raises(spa.SpaError, match="quota"):
            client.push_dataset(tmp_path / "big")
        name = client.push_model(model).name
        first = client.submit(BenchmarkSpec((name,), seconds=20.0, **LONG))
        second = client.submit(BenchmarkSpec((name,), seconds=20.0, **LONG))
        at_work(client, first.name)
        assert client.job(second.name).state == jobs_pb2.JOB_STATE_QUEUED  # one of an owner at a time
        with pytest.raises(spa.SpaError, match="come again later"):
            client.submit(InspectSpec(name))
        assert (client.account().open_jobs, client.account().quota_jobs) == (2, 2)
        for job in (second, first):
            client.cancel(job.name)
            assert list(client.watch(job.name))[-1].state.state == jobs_pb2.JOB_STATE_CANCELLED
        client.wait(client.submit(InspectSpec(name)).name)
    server.stop()


def test_what_nobody_needs_is_removed(tmp_path: Path, model: Path) -> None:
    keep = {"jobs": "1s", "uploads": "1s", "every": "1s"}
    server = Running(tmp_path, retention=keep).start()
    with server.client() as client:
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.7",)))
        client.wait(job.name)
        (tmp_path / "unused").write_bytes(b"unused")
        data = client.push_dataset(tmp_path / "unused").name
        client.delete(data)
        until(lambda: not list(client.jobs()))
        until(lambda: len(stored(server)) == 1)  # the model's
        assert [found.name for found in client.models()] == [name]
    server.stop()
