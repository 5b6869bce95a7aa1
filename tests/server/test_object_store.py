"""Files in an object store by URL: a real S3 server on the loopback interface."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import spa
from spa.jobs import PruneSpec
from spa_server._generated import artifacts_pb2, artifacts_pb2_grpc, uploads_pb2, uploads_pb2_grpc
from spa_server.blobs import Blobs, digest_of
from spa_server.client.failures import reason_of
from spa_server.config import load
from spa_server.database import connect
from spa_server.database.tables import blobs
from tests.server.running import Running, until
from tests.server.s3 import ObjectStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    found = ObjectStore()
    yield found
    found.stop()


@pytest.fixture
def bucket(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store.bucket()


def put(store: Blobs, folder: Path, data: bytes) -> str:
    (folder / "x").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    store.put(folder / "x", sha256)
    assert not (folder / "x").exists()
    return sha256


def test_contents(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    one, two = Blobs(f"s3://{bucket}/spa"), Blobs(f"s3://{bucket}/spa")
    assert one.every() == []
    data = np.random.default_rng(0).bytes(9_000_000)
    assert not two.has(hashlib.sha256(data).hexdigest())
    sha256, empty = put(one, tmp_path, data), put(one, tmp_path, b"")
    assert two.has(sha256)  # what another server has stored is there at once
    assert two.every() == sorted((sha256, empty))
    assert store.keys(bucket) == {f"spa/{name[:2]}/{name}" for name in (sha256, empty)}
    with two.open(sha256) as file:
        for offset, size in ((0, 10), (8_999_990, 10), (4_100_000, 3_000_000), (5, 1)):
            file.seek(offset)
            assert file.read(size) == data[offset : offset + size]
        assert file.read(0) == b""
    two.place(sha256, tmp_path / "deep" / "copy")
    assert digest_of(tmp_path / "deep" / "copy") == sha256
    two.remove(sha256)
    two.remove(sha256)
    assert not one.has(sha256)
    assert one.every() == [empty]
    with pytest.raises(FileNotFoundError), one.open(sha256) as file:
        file.read(1)


def test_a_file_is_there_as_a_whole_or_not_at_all(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of several parts, of which one does not arrive: nothing is left there, and the file stays here."""
    found = Blobs(f"s3://{bucket}/spa")
    data = np.random.default_rng(1).bytes(1_000_000) * 105  # above what goes in one part
    real, parts = found._fs._call_s3, []

    async def broken(method: str, *arguments: Any, **options: Any) -> Any:
        if method == "upload_part":
            parts.append(method)
            if len(parts) == 2:
                raise RuntimeError("the cable is out")
        return await real(method, *arguments, **options)

    monkeypatch.setattr(found._fs, "_call_s3", broken)
    (tmp_path / "x").write_bytes(data)
    sha256 = digest_of(tmp_path / "x")
    with pytest.raises(OSError, match="the cable is out"):
        found.put(tmp_path / "x", sha256)
    assert not found.has(sha256)
    assert store.keys(bucket) == set()
    assert not store.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
    monkeypatch.setattr(found._fs, "_call_s3", real)
    found.put(tmp_path / "x", sha256)
    found.place(sha256, tmp_path / "y")
    assert digest_of(tmp_path / "y") == sha256


def test_a_server_that_keeps_its_files_there(store: ObjectStore, bucket: str, model: Path, tmp_path: Path) -> None:
    """Uploads, jobs, ranged downloads; what is deleted leaves the bucket, and nothing else is in it."""
    keep = {"jobs": "1s", "uploads": "1s", "every": "1s"}
    server = Running(tmp_path / "s", blobs=f"s3://{bucket}/spa", retention=keep).start(environment=store.environment)
    with server.client() as client:
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.6",), output_name="small.onnx"))
        client.wait(job.name)
        client.pull(job.name, tmp_path / "far")
        spa.prune(model, target="macs=0.6", output=tmp_path / "small.onnx")
        assert digest_of(tmp_path / "far" / "small.onnx") == digest_of(tmp_path / "small.onnx")
        big = tmp_path / "big.bin"
        big.write_bytes(data := np.random.default_rng(2).bytes(12_000_000))
        kept = client.push_dataset(big).name
        with grpc.insecure_channel(server.address) as channel:
            stub = artifacts_pb2_grpc.ArtifactServiceStub(channel)
            for offset, limit in ((0, 0), (5_000_000, 6_500_000), (11_999_999, 0), (100, 50)):
                request = artifacts_pb2.DownloadRequest(parent=kept, path="big.bin", offset=offset, limit=limit)
                _, *parts = stub.Download(request)
                assert b"".join(part.data for part in parts) == data[offset : offset + limit if limit else None]
        client.delete(kept)
        until(lambda: not list(client.jobs()))
        until(lambda: len(store.keys(bucket)) == 1)  # the model's
        assert [found.name for found in client.models()] == [name]
    assert server.stop() == 0
    database = connect(load(server.config).database_url)
    with database.read() as connection:
        rows = {row.sha256 for row in connection.execute(blobs.select())}
    database.close()
    assert rows == set(Blobs(f"s3://{bucket}/spa").every())


def test_a_store_that_cannot_be_used_is_said(store: ObjectStore, bucket: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing can be stored at 's3://nowhere/spa'"):
        Running(tmp_path / "a", blobs="s3://nowhere/spa").start(environment=store.environment)
    own = ObjectStore()
    name = own.bucket()
    server = Running(tmp_path / "b", blobs=f"s3://{name}").start(environment=own.environment)
    with server.client() as client, grpc.insecure_channel(server.address) as channel:
        client.account()
        own.stop()
        header = uploads_pb2.UploadHeader(sha256=digest_of(model), size=model.stat().st_size)
        parts = [uploads_pb2.UploadRequest(header=header), uploads_pb2.UploadRequest(data=model.read_bytes())]
        with pytest.raises(grpc.RpcError) as caught:
            uploads_pb2_grpc.UploadServiceStub(channel).Upload(iter(parts))
        assert (caught.value.code(), reason_of(caught.value)[0]) == (grpc.StatusCode.UNAVAILABLE, "storage")
        client.account()
    assert "nobody foresaw" not in server.text()
    server.stop()
