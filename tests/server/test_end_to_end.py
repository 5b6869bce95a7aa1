"""Models in, jobs, results out: against a real server."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest

import spa
from spa.jobs import BenchmarkSpec, InspectSpec, PruneSpec
from spa_server._generated import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    uploads_pb2,
    uploads_pb2_grpc,
)
from spa_server.client import Client
from spa_server.client.failures import reason_of
from spa_server.client.transfers import hashed
from tests.server.running import Running
from tests.small_models import build, cnn


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def sent(client: Client, model: Path) -> str:
    return client.push_model(model).name


def refused(call: Callable[..., object], *arguments: object) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), *reason_of(caught.value)


def test_a_pruned_model_has_the_bytes_of_local_pruning(client: Client, sent: str, model: Path, tmp_path: Path) -> None:
    local = spa.prune(model, target="macs=0.6", output=tmp_path / "small.onnx")
    job = client.submit(PruneSpec(sent, ("macs=0.6",), output_name="small.onnx"))
    stages: list[str] = []
    done = client.wait(job.name, progress=lambda stage, done, total: stages.append(stage))
    assert [file.path for file in done.files] == ["small.onnx", "plan.json", "report.json"]
    client.pull(job.name, tmp_path / "far")
    assert (tmp_path / "far" / "small.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()
    assert (tmp_path / "far" / "plan.json").read_text() == local.plan.to_json()
    assert "load" in stages


def test_external_data_travel_along(client: Client, tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    nodes = [onnx.helper.make_node("MatMul", ["x", "a"], ["h"]), onnx.helper.make_node("MatMul", ["h", "b"], ["y"])]
    weights = {"a": rng.random((64, 256), np.float32), "b": rng.random((256, 64), np.float32)}
    net = build(nodes, weights, {"x": ["n", 64]}, {"y": ["n", 64]})
    onnx.save(net, folder / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    found = client.push_model(folder / "big.onnx")
    assert [file.path for file in found.files] == ["big.onnx", "weights.bin"]
    job = client.submit(PruneSpec(found.name, ("params=0.8",), output_name="out.onnx"))
    client.wait(job.name)
    client.pull(job.name, tmp_path / "far")
    spa.prune(folder / "big.onnx", target="params=0.8", output=tmp_path / "out.onnx")
    for name in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_results_are_inputs_of_further_jobs(client: Client, sent: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
    pruned = client.submit(PruneSpec(sent, ("macs=0.7",)))
    client.wait(pruned.name)
    again = client.submit(InspectSpec(pruned.name, page=True))
    done = client.wait(again.name)
    assert {file.path for file in done.files} == {"report.json", "page.html"}
    bench = client.submit(BenchmarkSpec((sent, pruned.name), repeats=5, seconds=0.1, memory=False, provider="cpu"))
    assert [file.path for file in client.wait(bench.name).files] == ["report.json"]


def test_a_failed_job_says_what_the_local_command_says(client: Client, sent: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(spa.TargetError) as local:
        spa.prune(model, target="macs=0.001", output=tmp_path / "no.onnx")
    job = client.submit(PruneSpec(sent, ("macs=0.001",)))
    with pytest.raises(spa.TargetError) as far:
        client.wait(job.name)
    assert str(far.value) == str(local.value)


def test_a_damaged_model_fails_in_the_worker_only(client: Client, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"\x08\x96\x01" + b"no model" * 100)
    found = client.push_dataset(tmp_path / "bad.bin")
    stub = client._models
    made = stub.CreateModel(models_pb2.CreateModelRequest(files=found.files)).model
    job = client.submit(InspectSpec(made.name))
    with pytest.raises(spa.ModelError) as caught:
        client.wait(job.name)
    assert made.name in str(caught.value)
    assert "/data/jobs" not in str(caught.value)
    client.account()


def test_uploads_go_on_where_they_broke(channel: grpc.Channel, client: Client, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(3_500_000)
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    sha256, size = hashed(path, lambda *_: None)
    stub = uploads_pb2_grpc.UploadServiceStub(channel)

    def broken() -> Iterator[uploads_pb2.UploadRequest]:
        yield uploads_pb2.UploadRequest(header=uploads_pb2.UploadHeader(sha256=sha256, size=size))
        yield uploads_pb2.UploadRequest(data=data[:1_000_000])
        yield uploads_pb2.UploadRequest(data=data[1_000_000:1_500_000])
        time.sleep(0.3)
        raise ConnectionError

    with pytest.raises(grpc.RpcError):
        stub.Upload(broken())
    time.sleep(0.3)
    state = stub.GetUpload(uploads_pb2.GetUploadRequest(sha256=sha256))
    assert (state.offset, state.complete) == (1_500_000, False)

    header = uploads_pb2.UploadRequest(header=uploads_pb2.UploadHeader(sha256=sha256, size=size, offset=7))
    code, reason, info = refused(stub.Upload, iter([header]))
    assert (code, reason, info["offset"]) == (grpc.StatusCode.OUT_OF_RANGE, "offset", "1500000")

    told: list[int] = []
    client.push_dataset(path, progress=lambda stage, done, total: told.append(done) if stage == "upload" else None)
    assert told[0] == 1_500_000
    assert stub.GetUpload(uploads_pb2.GetUploadRequest(sha256=sha256)).complete

    again: list[str] = []
    client.push_dataset(path, progress=lambda stage, done, total: again.append(stage))
    assert "upload" not in again


def test_wrong_bytes_are_refused(channel: grpc.Channel) -> None:
    stub = uploads_pb2_grpc.UploadServiceStub(channel)
    header = uploads_pb2.UploadHeader(sha256=hashlib.sha256(b"right").hexdigest(), size=5)
    parts = [uploads_pb2.UploadRequest(header=header), uploads_pb2.UploadRequest(data=b"wrong")]
    assert refused(stub.Upload, iter(parts))[:2] == (grpc.StatusCode.DATA_LOSS, "digest")
    assert stub.GetUpload(uploads_pb2.GetUploadRequest(sha256=header.sha256)).offset == 0
    parts[1] = uploads_pb2.UploadRequest(data=b"too much")
    assert refused(stub.Upload, iter(parts))[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a//b", "a/./b", "c:/x", "a\\b", "", "x" * 501, "a\0b"])
def test_paths_stay_inside(channel: grpc.Channel, client: Client, path: str, model: Path) -> None:
    client.push_model(model)
    file = models_pb2.File(path=path, sha256=hashlib.sha256(model.read_bytes()).hexdigest())
    stub = models_pb2_grpc.ModelServiceStub(channel)
    code, reason, _ = refused(stub.CreateModel, models_pb2.CreateModelRequest(files=[file]))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "usage")


def test_external_data_cannot_leave_the_folder(client: Client, tmp_path: Path) -> None:
    net = cnn()
    tensor = net.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../server.id")
    (tmp_path / "evil.bin").write_bytes(net.SerializeToString())
    found = client.push_dataset(tmp_path / "evil.bin")
    made = client._models.CreateModel(models_pb2.CreateModelRequest(files=found.files)).model
    with pytest.raises(spa.ExternalDataError, match="outside of the model's folder"):
        client.wait(client.submit(InspectSpec(made.name)).name)


def test_lists_come_in_pages(channel: grpc.Channel, client: Client, model: Path) -> None:
    names = {client.push_model(model, name=f"page {k}").name for k in range(5)}
    stub, token, seen = models_pb2_grpc.ModelServiceStub(channel), "", []
    while True:
        page = stub.ListModels(models_pb2.ListModelsRequest(page_size=2, page_token=token))
        assert len(page.models) <= 2
        seen += [found.name for found in page.models]
        token = page.next_page_token
        if not token:
            break
    assert len(seen) == len(set(seen))
    assert names <= set(seen)
    assert set(seen) == {found.name for found in client.models()}
    bad = models_pb2.ListModelsRequest(page_token="nonsense")
    assert refused(stub.ListModels, bad)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_the_same_model_again_is_the_same(client: Client, model: Path) -> None:
    assert client.push_model(model, name="twice").name == client.push_model(model, name="twice").name
    assert client.push_model(model, name="twice").name != client.push_model(model, name="thrice").name


def test_what_a_job_needs_is_not_deleted(client: Client, channel: grpc.Channel, model: Path) -> None:
    name = client.push_model(model, name="needed").name
    job = client.submit(BenchmarkSpec((name,), repeats=100_000, seconds=30.0, memory=False))
    delete = models_pb2_grpc.ModelServiceStub(channel).DeleteModel
    code, reason, info = refused(delete, models_pb2.DeleteModelRequest(name=name))
    assert (code, reason, info["job"]) == (grpc.StatusCode.FAILED_PRECONDITION, "in-use", job.name)
    client.cancel(job.name)
    with pytest.raises(spa.SpaError, match="was cancelled"):
        client.wait(job.name)
    client.delete(name)
    with pytest.raises(spa.SpaError, match="no such thing"):
        client.delete(name)
    client.delete(job.name)


def test_cancelling_takes_less_than_two_seconds(client: Client, sent: str) -> None:
    job = client.submit(BenchmarkSpec((sent,), repeats=100_000, seconds=60.0, memory=False))
    for event in client.watch(job.name):
        if event.WhichOneof("event") == "stage" and event.stage.stage == "bench":
            break
    start = time.monotonic()
    client.cancel(job.name)
    last = list(client.watch(job.name))[-1]
    assert last.state.state == jobs_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - start < 2


def test_the_same_request_makes_one_job(channel: grpc.Channel, client: Client, sent: str) -> None:
    first = client.submit(InspectSpec(sent), request_id="one")
    assert client.submit(InspectSpec(sent), request_id="one").name == first.name
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    other = jobs_pb2.CreateJobRequest(request_id="one")
    other.spec.inspect.model = sent
    other.spec.inspect.page = True
    assert refused(stub.CreateJob, other)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "request-id")
    client.wait(first.name)
    assert client.submit(InspectSpec(sent), request_id="one").state == jobs_pb2.JOB_STATE_SUCCEEDED


def test_a_watcher_goes_on_where_it_was(client: Client, sent: str) -> None:
    job = client.submit(PruneSpec(sent, ("macs=0.9",)))
    everything = list(client.watch(job.name))
    assert [event.sequence for event in everything] == list(range(1, len(everything) + 1))
    assert everything[-1].state.state == jobs_pb2.JOB_STATE_SUCCEEDED
    for cut in (1, len(everything) - 1, len(everything)):
        assert list(client.watch(job.name, after=cut)) == everything[cut:]


def test_downloads_in_parts(channel: grpc.Channel, client: Client, sent: str, model: Path) -> None:
    stub, data = artifacts_pb2_grpc.ArtifactServiceStub(channel), model.read_bytes()
    for offset, limit in ((0, 0), (100, 50), (len(data) - 1, 0), (len(data), 0), (5, 1 << 30)):
        request = artifacts_pb2.DownloadRequest(parent=sent, path="net.onnx", offset=offset, limit=limit)
        header, *parts = stub.Download(request)
        assert header.header.sha256 == hashlib.sha256(data).hexdigest()
        assert b"".join(part.data for part in parts) == data[offset : offset + limit if limit else None]
    wrong = artifacts_pb2.DownloadRequest(parent=sent, path="net.onnx", offset=len(data) + 1)
    assert refused(lambda: list(stub.Download(wrong)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    wrong = artifacts_pb2.DownloadRequest(parent=sent, path="../spa.db")
    assert refused(lambda: list(stub.Download(wrong)))[0] is grpc.StatusCode.NOT_FOUND


def test_errors_name_the_field(channel: grpc.Channel) -> None:
    from google.rpc import error_details_pb2, status_pb2

    stub = jobs_pb2_grpc.JobServiceStub(channel)
    request = jobs_pb2.CreateJobRequest()
    request.spec.prune.model = "/etc/passwd"
    request.spec.prune.target.append("macs=0.5")
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateJob(request)
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status_pb2.Status.FromString(details).details)
    assert bad.field_violations[0].field == "model"
    assert "/etc/passwd" in bad.field_violations[0].description


def test_health_and_reflection(channel: grpc.Channel) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "spa.v1.JobService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    found = ProtoReflectionDescriptorDatabase(channel)
    assert {"spa.v1.JobService", "spa.v1.ModelService"} <= set(found.get_services())
    assert "CreateJob" in {m.name for m in found.FindFileContainingSymbol("spa.v1.JobService").service[0].method}
