"""Files to and from a server, gone on with where a connection broke."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc

from spa.errors import OutputError, SpaError, UsageError
from spa.progress import Progress
from spa_server._generated import artifacts_pb2, models_pb2, uploads_pb2
from spa_server.client.failures import is_passing
from spa_server.disk import Appender
from spa_server.pieces import reader, writer
from spa_server.varints import Buffer

__all__ = ["Transfers", "hashed"]

_HASHED = 1 << 18
"""Bytes that are read and hashed at a time: they stay in a processor's cache."""
_WRITTEN = 4 << 20
"""Bytes that are written by one call of a thread."""
_TRIES = 8
"""Breaks in a row without a byte of progress that are put up with."""


def hashed(path: Path, progress: Progress) -> tuple[str, int]:
    """sha256 and size of a file. Raises: UsageError if it cannot be read."""
    try:
        digest, size, done = hashlib.sha256(), path.stat().st_size, 0
        buffer = memoryview(bytearray(_HASHED))
        progress("hash", 0, size)
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                progress("hash", done, size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest(), done


class Transfers:
    """Both directions, on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        (uploading,) = uploads_pb2.DESCRIPTOR.services_by_name
        (sending,) = artifacts_pb2.DESCRIPTOR.services_by_name
        # as the generated stubs would make them, but pieces are no messages
        self._state = channel.unary_unary(
            f"/spa.v1.{uploading}/GetUpload",
            uploads_pb2.GetUploadRequest.SerializeToString,
            uploads_pb2.GetUploadResponse.FromString,
        )
        self._upload = channel.stream_unary(
            f"/spa.v1.{uploading}/Upload", writer(uploads_pb2.UploadRequest), uploads_pb2.UploadResponse.FromString
        )
        self._download = channel.unary_stream(
            f"/spa.v1.{sending}/Download",
            artifacts_pb2.DownloadRequest.SerializeToString,
            reader(artifacts_pb2.DownloadResponse),
        )

    def upload(self, path: Path, sha256: str, size: int, piece: int, progress: Progress) -> None:
        """Send a file, unless the server has it.

        Args:
            path: the file.
            sha256: of it.
            size: of it, in bytes.
            piece: bytes of one message.
            progress: told about `upload`.

        Raises:
            UsageError: it was changed meanwhile.
            grpc.RpcError: the server refuses, or the connection breaks again and again.
        """
        tries, reached = 0, -1
        while True:
            try:
                state = self._state(uploads_pb2.GetUploadRequest(sha256=sha256))
                if state.complete:
                    return
                if state.offset > reached:
                    tries, reached = 0, state.offset
                self._upload(_pieces(path, sha256, size, state.offset, piece, progress))
                return
            except grpc.RpcError as error:
                if path.stat().st_size != size or error.code() is grpc.StatusCode.DATA_LOSS:
                    raise UsageError(f"{path}: was changed while it was sent; do it again") from error
                tries = _again(error, tries)

    def download(self, parent: str, file: models_pb2.File, target: Path, progress: Progress) -> None:
        """Get a file, whole or not at all.

        Args:
            parent: `jobs/{id}`, `models/{id}` or `datasets/{id}`.
            file: one of its files.
            target: where it goes.
            progress: told about `download`.

        Raises:
            OutputError: it cannot be written.
            SpaError: what came is something else.
            grpc.RpcError: the server refuses, or the connection breaks again and again.
        """
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            with Appender(temporary, new=True) as opened, ThreadPoolExecutor(1) as thread:
                written = _Written(opened, thread)
                self._fetch(parent, file, written, progress)
                digest = written.digest()
            if digest != file.sha256:
                raise SpaError(f"{parent}/{file.path}: what came has another sha256 than the server said; get it again")
            os.replace(temporary, target)
        except OSError as error:
            message = f"{target}: cannot be written ({error.strerror}); check the folder and its space"
            raise OutputError(message) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, parent: str, file: models_pb2.File, written: _Written, progress: Progress) -> None:
        tries = 0
        while written.size < file.size or not file.size:
            before = written.size
            request = artifacts_pb2.DownloadRequest(parent=parent, path=file.path, offset=before)
            try:
                for part in self._download(request):
                    if isinstance(part, memoryview):
                        written.add(part)
                        progress("download", written.size, file.size)
                return
            except grpc.RpcError as error:
                tries = _again(error, 0 if written.size > before else tries)


class _Written:
    """Bytes that a thread writes while the next ones come."""

    def __init__(self, file: Appender, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self._parts: list[memoryview] = []
        self._gathered = 0
        self._writing: Future[None] | None = None
        self.size = 0
        """Bytes that have come."""

    def add(self, part: memoryview) -> None:
        """The next bytes. Raises: OSError if some before could not be written."""
        self._parts.append(part)
        self._gathered += len(part)
        self.size += len(part)
        if self._gathered >= _WRITTEN:
            self._settle()
            self._writing = self._thread.submit(self._write, self._parts)
            self._parts, self._gathered = [], 0

    def digest(self) -> str:
        """sha256 of all that came, when it is written. Raises: OSError."""
        self._settle()
        self._write(self._parts)
        self._file.flush()
        return self._file.digest()

    def _settle(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, parts: list[memoryview]) -> None:
        for part in parts:
            self._file.write(part)


def _pieces(
    path: Path, sha256: str, size: int, offset: int, piece: int, progress: Progress
) -> Iterator[uploads_pb2.UploadRequest | Buffer]:
    yield uploads_pb2.UploadRequest(header=uploads_pb2.UploadHeader(sha256=sha256, size=size, offset=offset))
    progress("upload", offset, size)
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(piece):
            yield data
            offset += len(data)
            progress("upload", offset, size)


def _again(error: grpc.RpcError, tries: int, sleep: Callable[[float], None] = time.sleep) -> int:
    """Wait before the next try. Raises: `error` if it will not pass, or there were too many."""
    if not is_passing(error) or tries >= _TRIES:
        raise error
    sleep(min(0.1 * 2**tries, 5.0))
    return tries + 1
