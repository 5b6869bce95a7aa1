"""Lengths in protobuf's wire format: a field of bytes is `tag, length, bytes`."""

from __future__ import annotations

from typing import TypeAlias

__all__ = ["Buffer", "bytes_tag", "prefix", "varint"]

Buffer: TypeAlias = "bytes | memoryview"


def bytes_tag(number: int) -> int:
    """What begins a field of bytes, texts or messages with this number (below 16: it takes one byte)."""
    return number << 3 | 2


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends: behind the data if it is cut off or too long."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return 0, len(data) + 1


def prefix(tag: int, length: int) -> bytes:
    """What stands before the bytes of a field."""
    out = bytearray((tag,))
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)
