"""PostgreSQL that is stopped, as by a crash, and started again below a server at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import spa
from spa.jobs import BenchmarkSpec, PruneSpec
from spa_server._generated import jobs_pb2
from spa_server.blobs import Blobs, digest_of
from spa_server.database import connect
from spa_server.database.tables import blobs, files
from tests.server.postgres import Postgres
from tests.server.running import Running, until

pytestmark = pytest.mark.slow


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    found = Postgres().start()
    yield found
    found.remove()


def test_nothing_is_lost_when_the_database_is_restarted(postgres: Postgres, model: Path, tmp_path: Path) -> None:
    """Longer than a lease the first time, then shortly, at whatever the server does just then. Jobs at work go on,
    those that wait are done, watchers wait, and what was refused meanwhile was refused with a reason."""
    workers = {"count": 2, "lease": "2s"}
    server = Running(tmp_path, database=postgres.url, blobs=str(tmp_path / "blobs"), workers=workers).start()
    with server.client() as client:
        name = client.push_model(model).name
        spec = BenchmarkSpec((name,), seconds=6.0, repeats=100_000, memory=False, provider="cpu")
        long = [client.submit(spec).name for _ in range(2)]
        short = [client.submit(PruneSpec(name, ("macs=0.6",))).name for _ in range(3)]
        for job in long:
            for event in client.watch(job):
                if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
                    break
        watched = iter(client.watch(short[-1]))
        next(watched)
        postgres.stop()
        with pytest.raises(spa.SpaError, match="database does not answer"):
            client.delete(name)
        time.sleep(3)
        postgres.start()
        # the leases have passed; the server has the jobs all the same
        assert [client.wait(job).attempt for job in long] == [1, 1]
        for _ in range(3):
            postgres.stop()
            postgres.start()
            time.sleep(0.5)
        assert list(watched)[-1].state.state == jobs_pb2.JOB_STATE_SUCCEEDED
        done = [client.wait(job) for job in short]
        assert client.submit(PruneSpec(name, ("macs=0.6",)), request_id="after").name
        until(lambda: not any(job.state < jobs_pb2.JOB_STATE_SUCCEEDED for job in client.jobs()))
        assert len(list(client.jobs())) == 6
        spa.prune(model, target="macs=0.6", output=tmp_path / "local.onnx")
        for job in done:
            assert job.files[0].sha256 == digest_of(tmp_path / "local.onnx")
            states = [e.state.state for e in client.watch(job.name) if e.WhichOneof("event") == "state"]
            assert sum(state > jobs_pb2.JOB_STATE_RUNNING for state in states) == 1
    assert server.stop() == 0
    assert "nobody foresaw" not in server.text()
    database = connect(postgres.url)
    with database.read() as connection:
        rows = {row.sha256 for row in connection.execute(blobs.select())}
        used = {row.sha256 for row in connection.execute(files.select())}
    database.close()
    assert used <= rows == set(Blobs(str(tmp_path / "blobs")).every())
