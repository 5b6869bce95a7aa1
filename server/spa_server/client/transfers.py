"""Files to and from a server, gone on with where a connection broke."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from spa.errors import OutputError, SpaError, UsageError
from spa.progress import Progress
from spa_server._generated import artifacts_pb2, artifacts_pb2_grpc, models_pb2, uploads_pb2, uploads_pb2_grpc
from spa_server.client.failures import is_passing

__all__ = ["download", "hashed", "upload"]

_PIECE = 1 << 20
_TRIES = 8
"""Breaks in a row without a byte of progress that are put up with."""


def hashed(path: Path, progress: Progress) -> tuple[str, int]:
    """sha256 and size of a file. Raises: UsageError if it cannot be read."""
    try:
        digest, size, done = hashlib.sha256(), path.stat().st_size, 0
        progress("hash", 0, size)
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                done += len(piece)
                progress("hash", done, size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest(), done


def upload(
    stub: uploads_pb2_grpc.UploadServiceStub, path: Path, sha256: str, size: int, piece: int, progress: Progress
) -> None:
    """Send a file, unless the server has it.

    Raises:
        UsageError: it was changed meanwhile.
        grpc.RpcError: the server refuses, or the connection breaks again and again.
    """
    tries, reached = 0, -1
    while True:
        try:
            state = stub.GetUpload(uploads_pb2.GetUploadRequest(sha256=sha256))
            if state.complete:
                return
            if state.offset > reached:
                tries, reached = 0, state.offset
            stub.Upload(_pieces(path, sha256, size, state.offset, piece, progress))
            return
        except grpc.RpcError as error:
            if path.stat().st_size != size or error.code() is grpc.StatusCode.DATA_LOSS:
                raise UsageError(f"{path}: was changed while it was sent; do it again") from error
            tries = _again(error, tries)


def _pieces(
    path: Path, sha256: str, size: int, offset: int, piece: int, progress: Progress
) -> Iterator[uploads_pb2.UploadRequest]:
    yield uploads_pb2.UploadRequest(header=uploads_pb2.UploadHeader(sha256=sha256, size=size, offset=offset))
    progress("upload", offset, size)
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(piece):
            yield uploads_pb2.UploadRequest(data=data)
            offset += len(data)
            progress("upload", offset, size)


def download(
    stub: artifacts_pb2_grpc.ArtifactServiceStub,
    parent: str,
    file: models_pb2.File,
    target: Path,
    progress: Progress,
) -> None:
    """Get a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
        SpaError: what came is something else.
        grpc.RpcError: the server refuses, or the connection breaks again and again.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        digest, done, tries = hashlib.sha256(), 0, 0
        with open(temporary, "xb") as opened:
            while done < file.size or not file.size:
                before = done
                request = artifacts_pb2.DownloadRequest(parent=parent, path=file.path, offset=done)
                try:
                    for part in stub.Download(request):
                        opened.write(part.data)
                        digest.update(part.data)
                        done += len(part.data)
                        progress("download", done, file.size)
                    break
                except grpc.RpcError as error:
                    tries = _again(error, 0 if done > before else tries)
        if digest.hexdigest() != file.sha256:
            raise SpaError(f"{parent}/{file.path}: what came has another sha256 than the server said; get it again")
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); check the folder and its space") from error
    finally:
        temporary.unlink(missing_ok=True)


def _again(error: grpc.RpcError, tries: int, sleep: Callable[[float], None] = time.sleep) -> int:
    """Wait before the next try. Raises: `error` if it will not pass, or there were too many."""
    if not is_passing(error) or tries >= _TRIES:
        raise error
    sleep(min(0.1 * 2**tries, 5.0))
    return tries + 1
