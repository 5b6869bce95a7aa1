"""Write a model: streamed, deterministic, and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from spa.errors import OutputError
from spa.external import Weights, copy_field, lighten, root_cause, weight_index
from spa.inference import children, infer

__all__ = ["save", "to_proto"]

PAGE = 4096
ALIGN_ABOVE = 64 * 1024
"""External tensors above this many bytes start on a page, so that runtimes can map them."""
SINGLE_FILE_LIMIT = 1_800_000_000
"""Above this many bytes the weights go to a second file: protobuf ends at 2 GiB."""

Message = TypeVar("Message", onnx.ModelProto, onnx.GraphProto, onnx.TensorProto)


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool) -> int:
    """Write `model`, with freshly inferred `value_info`; returns how many bytes were written.

    One file, or with `external` (and always above 1.8 GB of weights) a second one beside it, named
    `<name>.data`. Weights are evaluated and written one at a time. The same model gives the
    same bytes. Either everything is written or nothing is changed; the target may be the source.
    While it runs the model's tensors are swapped for placeholders: let no other thread use the model.

    Raises:
        OutputError: the folder is missing or not writable, the path is a directory, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name the output file.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder '{path.parent}' does not exist; create it first.")
    data_path = path.with_name(path.name + ".data")
    proto, weights = _light(model)
    outside = bool(weights) and (external or sum(weight.nbytes for weight in weights) > SINGLE_FILE_LIMIT)
    token = secrets.token_hex(8)
    temporary = {target: target.with_name(f".{target.name}.{token}.tmp") for target in (data_path, path)}
    try:
        written = 0
        if outside:
            with open(temporary[data_path], "xb") as file:
                written = _stream_data(proto, weights, file, data_path.name)
        else:
            del temporary[data_path]
        with open(temporary[path], "xb") as file:
            if outside:
                file.write(proto.SerializeToString(deterministic=True))
            else:
                _stream_model(proto, weights, file)
            written += file.tell()
        publish(temporary)
    except EncodeError as error:
        raise OutputError(f"{path}: the constants inside the nodes exceed 2 GB; store them as initializers.") from error
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "check the folder's permissions and free space"
        raise OutputError(f"{path}: cannot be written ({root_cause(error)}); {advice}.") from error
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)
    return written


def publish(temporary: dict[Path, Path]) -> None:
    """Rename all files into place, or none: what stood there comes back when a rename fails."""
    backups: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for target, source in temporary.items():
            if len(temporary) > 1 and target.exists():
                backups[target] = source.with_suffix(".old")
                with contextlib.suppress(OSError):  # a file system without hard links
                    os.link(target, backups[target])
        for target, source in temporary.items():
            os.replace(source, target)
            done.append(target)
    except OSError:
        for target in done:
            if target in backups and backups[target].exists():
                os.replace(backups[target], target)
            elif target not in backups:
                target.unlink(missing_ok=True)
        raise
    finally:
        for backup in backups.values():
            backup.unlink(missing_ok=True)


def _light(model: ir.Model) -> tuple[onnx.ModelProto, Weights]:
    proto, weights = lighten(model)
    infer(proto, None)
    return proto, weights


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Self-contained message with all weights inside, evaluated, and freshly inferred `value_info`."""
    proto, weights = _light(model)
    _fill(proto.graph, weights)
    return proto


def _placeholders(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, int]]:
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, weight_index(tensor.external_data[0].value)
    for node in graph.node:
        for child in children(node):
            yield from _placeholders(child)


def _fill(graph: onnx.GraphProto, weights: Weights) -> None:
    """Put the data of all placeholders into the proto."""
    for tensor, index in _placeholders(graph):
        tensor.raw_data = weights[index].tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _stream_data(proto: onnx.ModelProto, weights: Weights, file: BinaryIO, location: str) -> int:
    """Write all weights to `file`, one at a time, and point the placeholders to `location`."""
    offset = 0
    for tensor, index in _placeholders(proto.graph):
        weight = weights[index]
        padding = -offset % PAGE if weight.nbytes > ALIGN_ABOVE else 0
        file.write(b"\0" * padding)
        offset += padding
        _write(weight, file)
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        offset += weight.nbytes
    return offset


def _stream_model(proto: onnx.ModelProto, weights: Weights, file: BinaryIO) -> None:
    """Write one file with all weights inside, one weight in memory at a time.

    Protobuf cannot stream, so the two enclosing messages are written by hand, in protobuf's own
    order: the result is what `SerializeToString` would give, without ever holding it.
    """
    for node in proto.graph.node:
        for child in children(node):
            _fill(child, weights)
    model_head, model_tail = _around(proto, 7)  # ModelProto.graph
    graph_head, graph_tail = _around(proto.graph, 5)  # GraphProto.initializer
    parts: list[tuple[bytes, ir.TensorProtocol | None, bytes]] = []
    size = len(graph_head) + len(graph_tail)
    for tensor in proto.graph.initializer:
        weight, tail = None, b""
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            weight = weights[weight_index(tensor.external_data[0].value)]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            head, tail = _around(tensor, 9)  # TensorProto.raw_data
            head += _tag(9, weight.nbytes)
        else:
            head = tensor.SerializeToString(deterministic=True)
        length = len(head) + len(tail) + (weight.nbytes if weight is not None else 0)
        head = _tag(5, length) + head
        parts.append((head, weight, tail))
        size += len(head) + len(tail) + (weight.nbytes if weight is not None else 0)
    file.write(model_head + _tag(7, size) + graph_head)
    for head, weight, tail in parts:
        file.write(head)
        if weight is not None:
            _write(weight, file)
        file.write(tail)
    file.write(graph_tail + model_tail)


def _write(weight: ir.TensorProtocol, file: BinaryIO) -> None:
    file.flush()  # numpy writes to the descriptor, past the buffer
    start = file.tell()
    cast(ir.Tensor[Any], weight).tofile(file)  # every tensor class has it, the protocol does not say so
    file.flush()
    if (written := file.tell() - start) != weight.nbytes:
        raise OutputError(
            f"Tensor '{weight.name}' gave {written} bytes but its shape {weight.shape} needs {weight.nbytes}."
        )


def _around(message: Message, number: int) -> tuple[bytes, bytes]:
    """Serialized fields of `message` below and above the field `number`."""
    head, tail = type(message)(), type(message)()
    for field, value in message.ListFields():
        if field.number != number:
            copy_field(head if field.number < number else tail, field.name, value)
    return head.SerializeToString(deterministic=True), tail.SerializeToString(deterministic=True)


def _tag(number: int, length: int) -> bytes:
    """Protobuf's header of a length-delimited field."""
    out = bytearray([number << 3 | 2])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)
