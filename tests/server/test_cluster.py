"""Jobs on a Ray cluster: as on this machine, whatever dies. Each test of the module uses one cluster of one node."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import spa
from spa.jobs import BenchmarkSpec, InspectSpec, JobSpec, PruneSpec
from spa_server._generated import jobs_pb2
from spa_server.blobs import digest_of
from spa_server.client import Client
from tests.server.postgres import Postgres
from tests.server.ray_cluster import RayCluster
from tests.server.running import Running, free_port, until
from tests.small_models import build

LONG = {"repeats": 100_000, "memory": False, "provider": "cpu"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    found = RayCluster()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def there(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose jobs are done by the cluster."""
    server = Running(tmp_path_factory.mktemp("there"), executor="ray", workers={"count": 2, "memory": "1GB"})
    yield server.start(environment=cluster.environment)
    server.stop()


def at_work(client: Client, spec: JobSpec) -> str:
    """A job whose worker has begun."""
    name = client.submit(spec).name
    for event in client.watch(name):
        if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
            return name
    raise AssertionError(client.job(name))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_said_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"executor: ray://local needs Ray; install spa-prune\[ray\]"):
        Running(tmp_path, executor="ray://local").start()


@pytest.mark.slow
def test_results_have_the_bytes_of_local_work(there: Running, model: Path, tmp_path: Path) -> None:
    """Files that jobs made are inputs of others, and a failure has the words of the local command."""
    with there.client() as client:
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.6",), output_name="small.onnx"))
        stages: list[str] = []
        client.wait(job.name, progress=lambda stage, done, total: stages.append(stage))
        client.pull(job.name, tmp_path / "far")
        spa.prune(model, target="macs=0.6", output=tmp_path / "small.onnx")
        assert digest_of(tmp_path / "far" / "small.onnx") == digest_of(tmp_path / "small.onnx")
        assert "cluster" in stages
        assert "load" in stages
        page = client.submit(InspectSpec(job.name, page=True))
        assert {file.path for file in client.wait(page.name).files} == {"report.json", "page.html"}
        with pytest.raises(spa.TargetError) as far:
            client.wait(client.submit(PruneSpec(name, ("macs=0.001",))).name)
        with pytest.raises(spa.TargetError) as here:
            spa.prune(model, target="macs=0.001", output=tmp_path / "no.onnx")
        assert str(far.value) == str(here.value)


@pytest.mark.slow
def test_large_files_travel_in_pieces(there: Running, tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    nodes = [onnx.helper.make_node("MatMul", ["x", "a"], ["h"]), onnx.helper.make_node("MatMul", ["h", "b"], ["y"])]
    weights = {"a": rng.random((900, 4096), np.float32), "b": rng.random((4096, 900), np.float32)}
    net = build(nodes, weights, {"x": ["n", 900]}, {"y": ["n", 900]})
    onnx.save(net, folder / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with there.client() as client:
        name = client.push_model(folder / "big.onnx").name
        job = client.submit(PruneSpec(name, ("params=0.8",), output_name="o.onnx"))
        client.wait(job.name)
        client.pull(job.name, tmp_path / "far")
    spa.prune(folder / "big.onnx", target="params=0.8", output=tmp_path / "o.onnx")
    for name in ("o.onnx", "o.onnx.data"):
        assert digest_of(tmp_path / "far" / name) == digest_of(tmp_path / name)


@pytest.mark.slow
def test_cancelling_takes_less_than_two_seconds(cluster: RayCluster, there: Running, model: Path) -> None:
    with there.client() as client:
        name = at_work(client, BenchmarkSpec((client.push_model(model).name,), seconds=60.0, **LONG))
        start = time.monotonic()
        client.cancel(name)
        assert list(client.watch(name))[-1].state.state == jobs_pb2.JOB_STATE_CANCELLED
        assert time.monotonic() - start < 2
    until(lambda: not cluster.supervisors())


@pytest.mark.slow
def test_jobs_wait_for_room(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    """A job that takes all processors keeps others waiting, which can be cancelled as quickly; nodes are left clean."""
    workers = {"count": 2, "cpus": 2, "memory": "1GB", "folder": str(tmp_path / "nodes")}
    server = Running(tmp_path / "s", executor="ray", workers=workers).start(environment=cluster.environment)
    with server.client() as client:
        name = client.push_model(model).name
        first = at_work(client, BenchmarkSpec((name,), seconds=60.0, **LONG))
        second = client.submit(InspectSpec(name)).name
        for event in client.watch(second):
            if event.WhichOneof("event") == "stage":
                assert event.stage.stage == "cluster"
                break
        time.sleep(2)
        assert len(cluster.supervisors()) == 1
        for job in (second, first):
            start = time.monotonic()
            client.cancel(job)
            assert list(client.watch(job))[-1].state.state == jobs_pb2.JOB_STATE_CANCELLED
            assert time.monotonic() - start < 2
        client.wait(client.submit(InspectSpec(name)).name)
    assert server.stop() == 0
    assert not list((tmp_path / "nodes" / "jobs").iterdir())


@pytest.mark.slow
def test_a_killed_process_of_ray_is_as_a_killed_worker(cluster: RayCluster, there: Running, model: Path) -> None:
    """The job is begun again; the worker inside went with it."""
    with there.client() as client:
        name = at_work(client, BenchmarkSpec((client.push_model(model).name,), seconds=2.0, **LONG))
        (pid,) = cluster.supervisors()
        os.kill(pid, signal.SIGKILL)
        done = client.wait(name)
        assert done.attempt == 2
        codes = [e.state.error.code for e in client.watch(name) if e.WhichOneof("event") == "state"]
        assert [code for code in codes if code] == ["crash"]


@pytest.mark.slow
def test_a_job_that_takes_too_much_fails(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    server = Running(tmp_path, executor="ray", workers={"time": "1s", "memory": "1GB"})
    server.start(environment=cluster.environment)
    with server.client() as client:
        job = client.submit(BenchmarkSpec((client.push_model(model).name,), seconds=60.0, **LONG))
        with pytest.raises(spa.SpaError, match="longer than 1 seconds"):
            client.wait(job.name)
        assert (client.job(job.name).error.code, client.job(job.name).attempt) == ("time", 1)
    assert server.stop() == 0


@pytest.mark.slow
def test_a_lost_cluster_is_connected_again(there: Running, model: Path) -> None:
    """The process that talks to Ray dies, which is what Ray makes of it when a cluster is lost; the server does not."""
    with there.client() as client:
        name = at_work(client, BenchmarkSpec((client.push_model(model).name,), seconds=2.0, **LONG))
        os.kill(agent_of(there), signal.SIGKILL)
        assert client.wait(name).attempt == 2
        client.account()
    assert "the connection to the cluster is lost" in there.text()


def agent_of(server: Running) -> int:
    assert server.process is not None
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            if b"spa_server.cluster.agent" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("there is no agent")


@pytest.mark.slow
def test_two_servers_one_is_killed(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    """Jobs of both, on one cluster, with one queue: all end once, and well. benchmarks/server_cluster.py does it with
    a hundred."""
    database = Postgres().start()
    common = {"database": database.url, "blobs": str(tmp_path / "blobs"), "executor": "ray"}
    workers = {"memory": "1GB", "cpus": 0.5}
    first, second = [
        Running(tmp_path / name, workers=workers, **common).start(environment=cluster.environment) for name in "ab"
    ]
    with second.client() as client:
        name = client.push_model(model).name
        names = [client.submit(InspectSpec(name)).name for _ in range(6)]
        until(lambda: sum(client.job(job).state == jobs_pb2.JOB_STATE_SUCCEEDED for job in names) >= 2, 300)
        first.kill()
        done = [client.wait(job) for job in names]
        assert {job.files[0].sha256 for job in done} == {done[0].files[0].sha256}
        for job in names:
            states = [e.state.state for e in client.watch(job) if e.WhichOneof("event") == "state"]
            assert sum(state > jobs_pb2.JOB_STATE_RUNNING for state in states) == 1
    second.stop()
    database.remove()


@pytest.mark.slow
def test_through_rays_client_server(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    """Ray does not end this client when the way there is lost; jobs are begun again all the same, once it is back."""
    port = free_port()
    server = Running(tmp_path / "s", executor=f"ray://127.0.0.1:{port}", workers={"memory": "1GB"})
    with cluster.client_server(port):
        server.start(environment=cluster.environment)
        client = server.client()
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.6",), output_name="small.onnx"))
        client.wait(job.name)
        client.pull(job.name, tmp_path / "far")
        spa.prune(model, target="macs=0.6", output=tmp_path / "small.onnx")
        assert digest_of(tmp_path / "far" / "small.onnx") == digest_of(tmp_path / "small.onnx")
        long = at_work(client, BenchmarkSpec((name,), seconds=60.0, **LONG))
        start = time.monotonic()
        client.cancel(long)
        assert list(client.watch(long))[-1].state.state == jobs_pb2.JOB_STATE_CANCELLED
        assert time.monotonic() - start < 2
        cut = at_work(client, BenchmarkSpec((name,), seconds=4.0, **LONG))
    until(lambda: "the connection to the cluster is lost" in server.text(), 90)
    with cluster.client_server(port):
        assert client.wait(cut).attempt == 2
        client.close()
        assert server.stop() == 0


@pytest.mark.slow
def test_there_is_no_such_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    nowhere = {**cluster.environment, "RAY_ADDRESS": "127.0.0.1:1"}
    with pytest.raises(AssertionError, match="no connection to a Ray cluster"):
        Running(tmp_path, executor="ray").start(environment=nowhere)


@pytest.mark.slow
def test_a_cluster_of_the_servers_own(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in cluster.environment.items() if key != "RAY_ADDRESS"}
    server = Running(tmp_path, executor="ray://local", workers={"memory": "1GB"}).start(environment=environment)
    with server.client() as client:
        client.wait(client.submit(InspectSpec(client.push_model(model).name)).name)
    assert server.stop() == 0
