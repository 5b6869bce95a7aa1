"""Bytes in and out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import BinaryIO, TypeAlias

import grpc

from spa_server._generated import artifacts_pb2 as out_pb
from spa_server._generated import uploads_pb2 as in_pb
from spa_server.blobs import PIECE, Blobs
from spa_server.callers import current
from spa_server.database import Database, collections, jobs
from spa_server.errors import invalid, not_found
from spa_server.held import StoredFile
from spa_server.messages import file_message
from spa_server.pieces import reader, writer
from spa_server.uploads import Uploads
from spa_server.varints import Buffer

__all__ = ["Artifacts", "Incomings", "add_to_server"]

Context: TypeAlias = grpc.aio.ServicerContext
_AT_ONCE = 4 * PIECE
"""Bytes that are written or read by one call of a thread: calling it takes time, too."""
_MOST_PIECES = 256


def add_to_server(server: grpc.aio.Server, incomings: Incomings, artifacts: Artifacts) -> None:
    """Let `server` take and send files: as the generated functions would, but pieces are no messages."""
    taking = {
        "GetUpload": grpc.unary_unary_rpc_method_handler(
            incomings.GetUpload, in_pb.GetUploadRequest.FromString, in_pb.GetUploadResponse.SerializeToString
        ),
        "Upload": grpc.stream_unary_rpc_method_handler(
            incomings.Upload, reader(in_pb.UploadRequest), in_pb.UploadResponse.SerializeToString
        ),
    }
    sending = {
        "Download": grpc.unary_stream_rpc_method_handler(
            artifacts.Download, out_pb.DownloadRequest.FromString, writer(out_pb.DownloadResponse)
        )
    }
    for file, handlers in ((in_pb, taking), (out_pb, sending)):
        (service,) = file.DESCRIPTOR.services_by_name.values()
        assert set(handlers) == set(service.methods_by_name)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


class Incomings:
    """spa.v1.UploadService."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    async def GetUpload(self, request: in_pb.GetUploadRequest, context: Context) -> in_pb.GetUploadResponse:
        """See the proto."""
        offset, complete = await asyncio.to_thread(self._uploads.offset, current().owner, request.sha256)
        return in_pb.GetUploadResponse(offset=offset, complete=complete)

    async def Upload(
        self, requests: AsyncIterator[in_pb.UploadRequest | memoryview], context: Context
    ) -> in_pb.UploadResponse:
        """See the proto."""
        first = await anext(requests, None)
        if not isinstance(first, in_pb.UploadRequest) or first.WhichOneof("part") != "header":
            raise invalid("header", "header: must be the first message")
        header = first.header
        with ExitStack() as stack:
            receive = self._uploads.receive(current().owner, header.sha256, header.size, header.offset)
            incoming = await asyncio.to_thread(stack.enter_context, receive)
            writing: asyncio.Task[None] | None = None  # of some pieces, while the next ones come
            pieces, gathered = list[memoryview](), 0
            try:
                async for data in requests:
                    if not isinstance(data, memoryview):
                        raise invalid("data", "data: must be in all messages but the first")
                    if not data:  # nothing but a place in memory
                        continue
                    pieces.append(data)
                    gathered += len(data)
                    if gathered >= _AT_ONCE or len(pieces) >= _MOST_PIECES:
                        if writing is not None:
                            await writing
                        writing = asyncio.create_task(asyncio.to_thread(incoming.write, pieces))
                        pieces, gathered = [], 0
            finally:
                if writing is not None:
                    await asyncio.shield(writing)
                incoming.write(pieces)  # at once: whoever comes back asks how much is here
            await asyncio.to_thread(incoming.finish)
        return in_pb.UploadResponse(sha256=header.sha256, size=header.size)


class Artifacts:
    """spa.v1.ArtifactService."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database, self._blobs = database, blobs

    async def Download(
        self, request: out_pb.DownloadRequest, context: Context
    ) -> AsyncIterator[out_pb.DownloadResponse | Buffer]:
        """See the proto."""
        file = await asyncio.to_thread(self._file, current().owner, request.parent, request.path)
        if not 0 <= request.offset <= file.size or request.limit < 0:
            raise invalid("offset", f"offset: {request.offset} is not within the {file.size} bytes of {request.path}")
        yield out_pb.DownloadResponse(header=file_message(file))
        left = min(request.limit or file.size, file.size - request.offset)
        with ExitStack() as stack:
            source = await asyncio.to_thread(self._open, stack, file.sha256, request.offset)
            reading = asyncio.create_task(asyncio.to_thread(source.read, min(_AT_ONCE, left)))
            try:
                while data := await reading:
                    left -= len(data)
                    reading = asyncio.create_task(asyncio.to_thread(source.read, min(_AT_ONCE, left)))
                    view = memoryview(data)
                    for start in range(0, len(data), PIECE):
                        yield view[start : start + PIECE]
            finally:
                await asyncio.shield(reading)

    def _file(self, owner: str, parent: str, path: str) -> StoredFile:
        kind = parent.partition("/")[0]
        if kind == "jobs":
            files = jobs.get(self._database, owner, parent).files
        elif kind == "models":
            files = collections.get(self._database, owner, "models", parent).files
        elif kind == "datasets":
            files = collections.get(self._database, owner, "datasets", parent).files
        else:
            raise invalid("parent", f"parent: {parent!r} must be jobs/ID, models/ID or datasets/ID")
        for file in files:
            if file.path == path:
                return file
        raise not_found(f"{parent}/{path}")

    def _open(self, stack: ExitStack, sha256: str, offset: int) -> BinaryIO:
        source = stack.enter_context(self._blobs.open(sha256))
        source.seek(offset)
        return source
