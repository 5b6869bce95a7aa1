"""Messages of uploads and downloads with their bytes beside them, not inside: a megabyte is copied once, not thrice.

UploadRequest and DownloadResponse are a header or `data`. What is on the wire is what protobuf would write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from spa_server.varints import Buffer, bytes_tag, prefix, varint

__all__ = ["reader", "writer"]

Message = TypeVar("Message")


def reader(kind: type[Message]) -> Callable[[bytes], Message | memoryview]:
    """A function that reads a message of `kind`; of one that is `data`, a view of these bytes.

    It raises google.protobuf.message.DecodeError as protobuf does.
    """
    message: Any = kind
    tag = bytes_tag(message.DATA_FIELD_NUMBER)

    def read(data: bytes) -> Message | memoryview:
        if data and data[0] == tag:
            length, start = varint(data, 1)
            if start + length == len(data):
                return memoryview(data)[start:]
        found = message.FromString(data)
        return memoryview(found.data) if found.WhichOneof("part") == "data" else found

    return read


def writer(kind: type[Message]) -> Callable[[Message | Buffer], bytes]:
    """A function that writes a message of `kind`; bytes stand for one that is `data`."""
    message: Any = kind
    tag = bytes_tag(message.DATA_FIELD_NUMBER)

    def write(part: Message | Buffer) -> bytes:
        if isinstance(part, bytes | memoryview):
            return b"".join((prefix(tag, len(part)), part))
        whole: bytes = message.SerializeToString(part)
        return whole

    return write
