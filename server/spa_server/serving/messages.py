"""Requests and answers as the protocol writes them, and as the engine sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from spa_server._generated_inference import service_pb2
from spa_server.serving.codec import Array, datatype_of, from_raw, from_typed, to_raw, to_typed
from spa_server.serving.datatypes import Datatype
from spa_server.serving.engine import Answer
from spa_server.serving.errors import InvalidRequest, LimitReached
from spa_server.serving.wire import InferCall, InferReply

__all__ = ["decode", "encode", "timeout_of"]

_AT_ONCE = 1 << 16
"""Elements of text or lists up to this many are converted on the event loop; more would hold up other requests."""
# They would change what is computed or answered; all others are meant for servers that know them.
_REFUSED = {
    "sequence_id": "sequences of requests",
    "sequence_start": "sequences of requests",
    "sequence_end": "sequences of requests",
    "shared_memory_region": "shared memory",
    "shared_memory_byte_size": "shared memory",
    "shared_memory_offset": "shared memory",
    "classification": "answers as classes",
}


async def decode(call: InferCall) -> dict[str, Array]:
    """The inputs of a request. Raises: InvalidRequest naming the tensor that cannot be read."""
    request = call.message
    _refuse("the request", request.parameters)
    for tensor in request.inputs:
        _refuse(f"input {tensor.name!r}", tensor.parameters)
    for wanted in request.outputs:
        _refuse(f"output {wanted.name!r}", wanted.parameters)
    if call.raw and len(call.raw) != len(request.inputs):
        raise InvalidRequest(f"there are {len(request.inputs)} inputs, but {len(call.raw)} raw_input_contents.")
    convert = _from_raw if call.raw else _from_typed
    return await asyncio.to_thread(convert, call) if _is_long(call) else convert(call)


async def encode(answer: Answer, call: InferCall, most_bytes: int) -> InferReply:
    """The answer to a request: raw if its inputs were raw, else in lists if all types have them.

    Raises: LimitReached if it would take more than `most_bytes`.
    """
    size = sum(array.nbytes for _, array in answer.outputs)
    if size > most_bytes:
        raise LimitReached(f"the answer takes {size} bytes, more than the {most_bytes} that a message may have.")
    raw = bool(call.raw) or not call.message.inputs
    raw = raw or any(spec.datatype.field is None for spec, _ in answer.outputs)
    slow = sum(array.size for spec, array in answer.outputs if not raw or spec.datatype.name == "BYTES")
    return await asyncio.to_thread(_reply, answer, call, raw) if slow > _AT_ONCE else _reply(answer, call, raw)


def _reply(answer: Answer, call: InferCall, raw: bool) -> InferReply:
    message = service_pb2.ModelInferResponse(
        model_name=call.message.model_name, model_version=answer.version, id=call.message.id
    )
    for spec, array in answer.outputs:
        tensor = message.outputs.add(name=spec.name, datatype=spec.datatype.name, shape=array.shape)
        if not raw and spec.datatype.field is not None:
            getattr(tensor.contents, spec.datatype.field).extend(to_typed(array, spec.datatype))
    return InferReply(message, [to_raw(array, spec.datatype) for spec, array in answer.outputs] if raw else ())


def timeout_of(request: service_pb2.ModelInferRequest) -> float | None:
    """Seconds that the request may wait, from its parameter `timeout`, in microseconds; None without one.

    Raises: InvalidRequest if the parameter is no whole number.
    """
    if "timeout" not in request.parameters:
        return None
    parameter = request.parameters["timeout"]
    choice = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else -1
    if value < 0:
        raise InvalidRequest("parameter 'timeout' must be a whole number of microseconds.")
    return float(value) / 1e6 if value else None


def _refuse(what: str, parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name in _REFUSED:
            raise InvalidRequest(f"{what} has parameter {name!r}: {_REFUSED[name]} are not supported here.")


def _is_long(call: InferCall) -> bool:
    """Whether Python has to look at many single elements."""
    if not call.raw:
        size: int = call.message.ByteSize()
        return size > _AT_ONCE
    pairs = zip(call.message.inputs, call.raw, strict=True)
    return sum(len(data) for tensor, data in pairs if tensor.datatype == "BYTES") > _AT_ONCE


def _from_raw(call: InferCall) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for tensor, data in zip(call.message.inputs, call.raw, strict=True):
        datatype = _datatype(tensor, feeds)
        if tensor.HasField("contents"):
            raise InvalidRequest(f"input {tensor.name!r} has contents beside raw_input_contents: give one of them.")
        feeds[tensor.name] = from_raw(tensor.name, datatype, tensor.shape, data)
    return feeds


def _from_typed(call: InferCall) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for tensor in call.message.inputs:
        datatype = _datatype(tensor, feeds)
        if datatype.field is None:
            raise InvalidRequest(f"input {tensor.name!r} has datatype {datatype.name}, which needs raw_input_contents.")
        for field, _ in tensor.contents.ListFields():
            if field.name != datatype.field:
                raise InvalidRequest(
                    f"input {tensor.name!r} of datatype {datatype.name} must have its elements in {datatype.field}, "
                    f"not in {field.name}."
                )
        values = getattr(tensor.contents, datatype.field)
        feeds[tensor.name] = from_typed(tensor.name, datatype, tensor.shape, values)
    return feeds


def _datatype(tensor: service_pb2.ModelInferRequest.InferInputTensor, feeds: Mapping[str, Array]) -> Datatype:
    if tensor.name in feeds:
        raise InvalidRequest(f"input {tensor.name!r} is given twice.")
    return datatype_of(tensor.datatype, tensor.name)
