"""ModelInfer's messages with the tensors beside them instead of inside, so that a megabyte is not copied four times.

In the wire format a repeated field is a sequence of pieces `tag, length, bytes`, anywhere in the message. The pieces
of raw tensors are cut out of a request before protobuf parses what is left, and put behind an answer that protobuf
wrote without them; the bytes on the wire are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spa_server._generated_inference import service_pb2
from spa_server.varints import Buffer, bytes_tag, prefix, varint

__all__ = ["InferCall", "InferReply", "parse_call", "write_reply", "write_stream_reply"]

_RAW_INPUT = bytes_tag(service_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER)
_RAW_OUTPUT = bytes_tag(service_pb2.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER)
_INFER_RESPONSE = bytes_tag(service_pb2.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER)
_MOST_FIELDS = 256
"""A message of more fields is left to protobuf, which is faster at many small ones."""


@dataclass(frozen=True)
class InferCall:
    """A ModelInferRequest."""

    message: service_pb2.ModelInferRequest
    """All of it but the raw tensors."""
    raw: Sequence[Buffer]
    """Its raw_input_contents."""


@dataclass(frozen=True)
class InferReply:
    """A ModelInferResponse."""

    message: service_pb2.ModelInferResponse
    """All of it but the raw tensors."""
    raw: Sequence[Buffer] = field(default=())
    """Its raw_output_contents."""


def parse_call(data: bytes) -> InferCall:
    """Read a request; raw tensors are views of `data`. Raises: google.protobuf.message.DecodeError."""
    pieces = _cut(data)
    if pieces is None:
        message = service_pb2.ModelInferRequest.FromString(data)
        raw = list(message.raw_input_contents)
        message.ClearField("raw_input_contents")
        return InferCall(message, raw)
    rest, tensors = pieces
    return InferCall(service_pb2.ModelInferRequest.FromString(rest), tensors)


def write_reply(reply: InferReply) -> bytes:
    """The bytes of a ModelInferResponse."""
    return b"".join(_pieces(reply))


def write_stream_reply(reply: InferReply | service_pb2.ModelStreamInferResponse) -> bytes:
    """The bytes of a ModelStreamInferResponse that holds the reply."""
    if isinstance(reply, service_pb2.ModelStreamInferResponse):
        whole: bytes = reply.SerializeToString()
        return whole
    pieces = _pieces(reply)
    return b"".join((prefix(_INFER_RESPONSE, sum(map(len, pieces))), *pieces))


def _pieces(reply: InferReply) -> list[Buffer]:
    pieces: list[Buffer] = [reply.message.SerializeToString()]
    for buffer in reply.raw:
        pieces += (prefix(_RAW_OUTPUT, len(buffer)), buffer)
    return pieces


def _cut(data: bytes) -> tuple[bytes, list[memoryview]] | None:
    """What is not raw tensors, and the raw tensors; None if protobuf's own parser shall decide."""
    view, end = memoryview(data), len(data)
    rest: list[memoryview] = []
    tensors: list[memoryview] = []
    at = kept = 0
    for _ in range(_MOST_FIELDS):
        if at == end:
            rest.append(view[kept:])
            return b"".join(rest), tensors
        start = at
        tag, at = varint(data, at)
        if tag & 7 == 0:
            _, at = varint(data, at)
        elif tag & 7 == 2:
            length, at = varint(data, at)
            if tag == _RAW_INPUT:
                rest.append(view[kept:start])
                tensors.append(view[at : at + length])
                kept = at + length
            at += length
        else:
            return None
        if at > end:
            return None
    return None
