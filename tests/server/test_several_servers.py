"""Two servers, one PostgreSQL, one store: jobs are spread, and what dies with one is done by the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spa.jobs import BenchmarkSpec, InspectSpec
from spa_server._generated import jobs_pb2
from tests.server.postgres import Postgres
from tests.server.running import Running

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    database = Postgres().start()
    common = {"database": database.url, "blobs": str(tmp_path / "blobs")}
    servers = Running(tmp_path / "a", **common).start(), Running(tmp_path / "b", **common).start()
    yield servers
    for server in servers:
        server.stop()
    database.remove()


def test_jobs_outlive_a_server(pair: tuple[Running, Running], model: Path) -> None:
    first, second = pair
    with first.client() as one, second.client() as two:
        name = one.push_model(model).name
        long = [BenchmarkSpec((name,), seconds=4.0, repeats=100_000, memory=False, provider="cpu") for _ in range(2)]
        names = [one.submit(spec).name for spec in long] + [two.submit(InspectSpec(name)).name for _ in range(6)]
        for job in names[:2]:
            for event in two.watch(job):  # through the server that need not run it
                if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
                    break
        first.kill()
        done = [two.wait(job) for job in names]
        assert {job.state for job in done} == {jobs_pb2.JOB_STATE_SUCCEEDED}
        assert sorted(job.attempt for job in done[:2]) == [1, 2]  # one ran on each server
        codes = [e.state.error.code for job in names[:2] for e in two.watch(job) if e.WhichOneof("event") == "state"]
        assert [code for code in codes if code] == ["lost"]
        two.pull(names[0], model.parent / "pulled")


def test_a_job_is_cancelled_through_another_server(pair: tuple[Running, Running], model: Path) -> None:
    import time

    first, second = pair
    with first.client() as one, second.client() as two:
        name = one.push_model(model).name
        spec = BenchmarkSpec((name,), seconds=60.0, repeats=100_000, memory=False, provider="cpu")
        jobs = [one.submit(spec).name for _ in range(2)]  # one for each server
        for job in jobs:
            for event in one.watch(job):
                if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
                    break
        for job in jobs:
            start = time.monotonic()
            two.cancel(job)
            assert list(two.watch(job))[-1].state.state == jobs_pb2.JOB_STATE_CANCELLED
            assert time.monotonic() - start < 2.5
