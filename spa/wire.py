"""Weights of a `.onnx` file found and placed by walking protobuf's wire format, without parsing them.

Protobuf can neither read nor write a message in parts, so a model with its weights inside would be held as the file's
bytes and as the parsed message. But a message without its big payloads is light. `cut` swaps every big `raw_data` of a
message for a short random token; `splice` puts payloads where tokens are. Both rewrite nothing but the lengths of the
enclosing messages, so that protobuf itself decides about everything else (order, repetition, unknown fields).
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["LIMIT", "Irregular", "Span", "cut", "splice", "tokens"]

LIMIT = (1 << 31) - 1
"""Largest message that protobuf reads or writes."""
_DEPTH = 100
_PAYLOAD = "payload"
# message -> field number -> what is inside: where the weights of a model are
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 11: "graph"},
    "tensor": {9: _PAYLOAD},
}


class Irregular(Exception):
    """Not the wire format that ONNX writers produce; protobuf's own parser shall decide."""


@dataclass(frozen=True)
class Span:
    """A range of bytes."""

    offset: int
    length: int


Data: TypeAlias = "bytes | mmap.mmap"
Piece: TypeAlias = "bytes | Span"
_Swap: TypeAlias = Callable[[int, int], Piece]


def tokens() -> Iterator[bytes]:
    """Bytes that occur nowhere else."""
    salt = secrets.token_bytes(20)
    return (salt + index.to_bytes(4, "little") for index in itertools.count())


def cut(data: Data, small: int) -> tuple[bytes, dict[bytes, Span]]:
    """The message with a token for each `raw_data` of more than `small` bytes, and where those bytes are in `data`.

    Raises: Irregular.
    """
    fresh = tokens()
    found: dict[bytes, Span] = {}

    def swap(start: int, stop: int) -> bytes:
        token = next(fresh)
        found[token] = Span(start, stop - start)
        return token

    pieces = _Walk(data, lambda start, stop: stop - start > small, swap).message(0, len(data), "model", 0)
    light = b"".join(piece for piece in pieces if isinstance(piece, bytes))
    return light, found


def splice(light: bytes, lengths: Mapping[bytes, int]) -> tuple[int, Iterator[bytes | int]]:
    """The size of the message with payloads in place of all tokens, and its pieces: bytes, or a payload's number.

    Raises: Irregular when a token is not the `raw_data` of a weight.
    """
    order = {light.find(token): index for index, token in enumerate(lengths)}
    places, sizes = sorted(order), list(lengths.values())

    def within(start: int, stop: int) -> bool:
        at = bisect.bisect_left(places, start)
        return at < len(places) and places[at] < stop

    def swap(start: int, _: int) -> Span:
        if start not in order:
            raise Irregular
        return Span(order[start], sizes[order[start]])

    pieces = _Walk(light, within, swap).message(0, len(light), "model", 0)
    if sum(isinstance(piece, Span) for piece in pieces) < len(lengths):
        raise Irregular
    return _size(pieces), (piece.offset if isinstance(piece, Span) else piece for piece in pieces)


@dataclass(frozen=True)
class _Walk:
    """One pass over a message; `wanted` tells which parts to look into."""

    data: Data
    wanted: Callable[[int, int], bool]
    swap: _Swap

    def message(self, start: int, end: int, kind: str, depth: int) -> list[Piece]:
        """The message's pieces, with payloads swapped."""
        if depth > _DEPTH:
            raise Irregular
        pieces: list[Piece] = []
        inside, kept, at = _INSIDE[kind], start, start
        while at < end:
            field = at
            tag, at = self._varint(at, end)
            if tag >> 3 == 0 or tag > 0xFFFFFFFF:
                raise Irregular
            match tag & 7:
                case 0:
                    _, at = self._varint(at, end)
                case 1:
                    at += 8
                case 2:
                    length, body = self._varint(at, end)
                    at = body + length
                    content = inside.get(tag >> 3)
                    if at <= end and content is not None and self.wanted(body, at):
                        parts = self._content(body, at, content, depth)
                        pieces += (self.data[kept:field], _varint(tag), _varint(_size(parts)), *parts)
                        kept = at
                case 5:
                    at += 4
                case _:
                    raise Irregular
        if at != end:
            raise Irregular
        pieces.append(self.data[kept:end])
        return pieces

    def _content(self, start: int, end: int, content: str, depth: int) -> list[Piece]:
        return [self.swap(start, end)] if content == _PAYLOAD else self.message(start, end, content, depth + 1)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at a place, and where it ends."""
        value = 0
        for k in range(min(10, end - at)):
            byte = self.data[at + k]
            value |= (byte & 127) << 7 * k
            if byte < 128:
                return value, at + k + 1
        raise Irregular


def _size(pieces: list[Piece]) -> int:
    return sum(piece.length if isinstance(piece, Span) else len(piece) for piece in pieces)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
