"""Messages of transfers without their bytes inside: the same bytes on the wire as protobuf's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

from spa_server._generated import artifacts_pb2, models_pb2, uploads_pb2
from spa_server.blobs import Blobs
from spa_server.client import Client
from spa_server.database import connect
from spa_server.pieces import reader, writer
from spa_server.uploads import Uploads
from tests.server.mutations import mutated, random_message
from tests.server.running import Running

KINDS = [uploads_pb2.UploadRequest, artifacts_pb2.DownloadResponse]


def as_protobuf(kind: Any, data: bytes) -> object:
    """What a reader must make of these bytes: data, a message that is none, or nothing."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return None
    return message.data if message.WhichOneof("part") == "data" else message


def as_ours(kind: Any, data: bytes) -> object:
    try:
        found = reader(kind)(data)
    except DecodeError:
        return None
    return bytes(found) if isinstance(found, memoryview) else found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 20, (1 << 21) + 1])
def test_bytes_are_written_and_read_as_protobuf_does(kind: Any, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    whole = kind(data=data).SerializeToString()
    assert writer(kind)(data) == writer(kind)(memoryview(data)) == whole
    assert reader(kind)(whole) == memoryview(data)


@pytest.mark.parametrize("kind", KINDS)
def test_all_else_is_left_to_protobuf(kind: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        message = random_message(kind, rng)
        assert writer(kind)(message) == message.SerializeToString()  # type: ignore[arg-type]  # of this kind
        data = message.SerializeToString()
        for text in (data, mutated(data, rng)):
            assert as_ours(kind, text) == as_protobuf(kind, text), text


def test_a_file_of_several_pieces_comes_back(server: Running, tmp_path: Path) -> None:
    data = np.random.default_rng(3).bytes(21_000_003)
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    told: list[int] = []
    with server.client() as client:
        sent = client.push_dataset(path)
        note = lambda stage, done, total: told.append(done)  # noqa: E731  # a callback
        client._transfers.download(sent.name, sent.files[0], tmp_path / "back", note)
    assert (tmp_path / "back").read_bytes() == data
    assert told == sorted(told)
    assert told[-1] == len(data)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["back", "data.bin"]


def test_an_upload_in_two_parts_is_stored_whole(tmp_path: Path) -> None:
    database = connect(f"sqlite:///{tmp_path / 'spa.db'}")
    store = Blobs(str(tmp_path / "blobs"))
    uploads = Uploads(database, store, tmp_path / "parts", limit=1 << 30, quota=0)
    pieces = [np.random.default_rng(k).bytes(1 << 20) for k in range(30)]
    sha256 = hashlib.sha256(b"".join(pieces)).hexdigest()
    with uploads.receive("me", sha256, 30 << 20, 0) as incoming:
        incoming.write(pieces[:10])
    assert uploads.offset("me", sha256) == (10 << 20, False)
    with uploads.receive("me", sha256, 30 << 20, 10 << 20) as incoming:
        for piece in pieces[10:]:
            incoming.write([piece])
        incoming.finish()
    database.close()
    with store.open(sha256) as file:
        assert file.read() == b"".join(pieces)


def test_a_download_goes_on_where_it_broke(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(4).bytes(9_000_000)
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with server.client() as client:
        sent = client.push_dataset(path)
        offsets = _broken(client, monkeypatch)
        client._transfers.download(sent.name, sent.files[0], tmp_path / "back", lambda *_: None)
    assert (tmp_path / "back").read_bytes() == data
    assert offsets == [0, 5 << 20]


def test_other_bytes_than_were_said_are_not_kept(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"as it is")
    with server.client() as client:
        sent = client.push_dataset(path)
        other = models_pb2.File(path=sent.files[0].path, size=sent.files[0].size, sha256="0" * 64)
        with pytest.raises(Exception, match="another sha256"):
            client._transfers.download(sent.name, other, tmp_path / "back", lambda *_: None)
    assert [found.name for found in tmp_path.iterdir()] == ["data.bin"]


class _Lost(grpc.RpcError):  # type: ignore[misc]  # no annotations
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def trailing_metadata(self) -> tuple[()]:
        return ()


def _broken(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first download breaks after five pieces; the offsets that are asked for."""
    offsets: list[int] = []
    whole = client._transfers._download

    def once(request: artifacts_pb2.DownloadRequest) -> Any:
        offsets.append(request.offset)
        for count, part in enumerate(whole(request)):
            if len(offsets) == 1 and count == 6:  # a header, and five pieces
                raise _Lost
            yield part

    monkeypatch.setattr(client._transfers, "_download", once)
    return offsets
