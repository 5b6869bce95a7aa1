"""Write a model: streamed, deterministic, and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]  # no types are shipped

from spa.blocks import Blocked, blocks
from spa.errors import OutputError
from spa.external import File, Weights, lighten, map_model, root_cause, weight_index
from spa.inference import children, infer
from spa.wire import LIMIT, splice, tokens

__all__ = ["fill", "heavy", "light", "outline", "publish", "save", "to_proto", "unpack"]

PAGE = 4096
ALIGN_ABOVE = 64 * 1024
"""External tensors above this many bytes start on a page, so that runtimes can map them."""
SINGLE_FILE_LIMIT = 1_800_000_000
"""Above this many bytes the weights go to a second file: protobuf ends at 2 GiB."""


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool, shard: int | None = None) -> int:
    """Write `model`, with freshly inferred `value_info`; returns how many bytes were written.

    One file, or with `external` (and always above 1.8 GB of weights) a second one beside it, named
    `<name>.data`; with `shard` as many of at most so many bytes as it takes, `<name>.data`, `<name>.data_1` and so
    on (a weight is never divided). Weights are evaluated and written one at a time. The same model gives the
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
    proto, weights = light(model)
    return _write_files(proto, weights, path, external=external, shard=shard)


def unpack(source: ir.Model | Path, target: Path) -> Path:
    """Write a model with its weights, those of `Constant` nodes too, in a second file, where runtimes can map them.

    Returns the new file, or `source` if that is a file which cannot be taken apart.
    """
    if isinstance(source, Path):
        found = map_model(File(source), str(source))
        if found is None:
            return source
        proto, weights, _ = found
    else:
        proto, weights = light(source)
    if proto.ir_version >= 4:  # before, initializers had to be inputs
        _lift(proto.graph)
    _write_files(proto, weights, target, external=True)
    return target


def outline(model: ir.Model, path: Path, shared: Callable[[str], str | None], least: int = 4096) -> dict[str, int]:
    """Write a model whose large weights all lie at the beginning of files that they share, which are not written.

    Args:
        model: left as it is.
        path: file to write; the shared ones belong beside it.
        shared: the file for weights of a type, such as `FLOAT`; None where the numbers themselves are needed.
        least: bytes from which on a weight is large.

    Returns:
        File -> bytes that it must have.

    Raises:
        OutputError: the file cannot be written.
    """
    proto, weights = light(model)
    if proto.ir_version >= 4:  # before, initializers had to be inputs
        _lift(proto.graph)
    needed: dict[str, int] = {}
    for tensor, index in list(_initializers(proto.graph)):
        weight = weights[index]
        file = shared(weight.dtype.name) if weight.nbytes >= least else None
        if file is None:
            _fill(tensor, weight.tobytes())
            continue
        del tensor.external_data[:]
        for key, value in (("location", file), ("offset", 0), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        needed[file] = max(weight.nbytes, needed.get(file, 0))
    for tensor, index in list(_constants(proto.graph)):
        _fill(tensor, weights[index].tobytes())
    try:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({root_cause(error)}); check the folder's free space.") from error
    return needed


def _lift(graph: onnx.GraphProto) -> None:
    """Turn `Constant` nodes with big tensors into initializers, as runtimes do on load."""
    kept: list[onnx.NodeProto] = []
    outputs = {info.name for info in graph.output}
    for node in graph.node:
        for child in children(node):
            _lift(child)
        constant = node.op_type == "Constant" and node.domain in ("", "ai.onnx") and len(node.attribute) == 1
        value = node.attribute[0].t if constant else None
        if value is None or value.data_location != onnx.TensorProto.EXTERNAL or node.output[0] in outputs:
            kept.append(node)
            continue
        graph.initializer.add().CopyFrom(value)
        graph.initializer[-1].name = node.output[0]
    if len(kept) < len(graph.node):
        copies = onnx.GraphProto(node=kept)
        del graph.node[:]
        graph.node.extend(copies.node)


def _write_files(
    proto: onnx.ModelProto, weights: Weights, path: Path, *, external: bool, shard: int | None = None
) -> int:
    """Write a light message and its weights to `path`, or beside it."""
    sizes = [weights[index].nbytes for _, index in _initializers(proto.graph)]
    outside = bool(sizes) and (external or sum(sizes) > SINGLE_FILE_LIMIT)
    parts = list(_shards(proto, weights, shard)) if outside else []
    data = [path.with_name(f"{path.name}.data" + (f"_{k}" if k else "")) for k in range(len(parts))]
    token = secrets.token_hex(8)
    temporary = {target: target.with_name(f".{target.name}.{token}.tmp") for target in (*data, path)}
    try:
        written = 0
        for target, part in zip(data, parts, strict=True):
            with open(temporary[target], "xb") as file:
                written += _stream_data(part, weights, file, target.name)
        with open(temporary[path], "xb") as file:
            inside = _constants(proto.graph) if outside else (*_initializers(proto.graph), *_constants(proto.graph))
            _stream_model(proto, inside, weights, file)
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


def light(model: ir.Model) -> tuple[onnx.ModelProto, Weights]:
    """A message with freshly inferred `value_info` whose large tensors are placeholders, and the tensors themselves."""
    proto, weights = lighten(model, attributes=True)
    infer(proto, None, names=True)
    return proto, weights


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Self-contained message with all weights inside, evaluated, and freshly inferred `value_info`."""
    proto, weights = light(model)
    fill(proto.graph, weights)
    return proto


def fill(graph: onnx.GraphProto, weights: Weights, leave: Container[str] = ()) -> None:
    """Put the data into the placeholders of a light message's graph, but for those named `leave`, as they are."""
    for tensor, index in (*_initializers(graph), *_constants(graph)):
        if tensor.name not in leave:
            _fill(tensor, weights[index].tobytes())


def heavy(graph: onnx.GraphProto, weights: Weights) -> dict[str, ir.TensorProtocol]:
    """What the placeholders among the initializers of the graph itself stand for, where numpy has the type."""
    found = {tensor.name: weights[index] for tensor, index in _indexed(graph.initializer)}
    return {name: tensor for name, tensor in found.items() if tensor.dtype.numpy().kind in "fiub"}


def _initializers(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, int]]:
    """Placeholders that may point to another file."""
    yield from _indexed(graph.initializer)
    for node in graph.node:
        for child in children(node):
            yield from _initializers(child)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, int]]:
    """Placeholders in attributes, whose data must be inside."""
    for node in graph.node:
        yield from _indexed(a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
        for child in children(node):
            yield from _constants(child)


def _indexed(tensors: Iterable[onnx.TensorProto]) -> Iterator[tuple[onnx.TensorProto, int]]:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, weight_index(tensor.external_data[0].value)


def _fill(tensor: onnx.TensorProto, raw: bytes) -> None:
    """Put data into a placeholder."""
    tensor.raw_data = raw
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


Placeholder: TypeAlias = "tuple[onnx.TensorProto, int]"
"""A tensor without its data, and the index of the weight it stands for."""


def _shards(proto: onnx.ModelProto, weights: Weights, most: int | None) -> Iterator[list[Placeholder]]:
    """All initializers in their order, cut where a file would have more than `most` bytes."""
    part: list[Placeholder] = []
    size = 0
    for tensor, index in _initializers(proto.graph):
        length = weights[index].nbytes
        if part and most is not None and size + _padding(size, length) + length > most:
            yield part
            part, size = [], 0
        part.append((tensor, index))
        size += _padding(size, length) + length
    yield part


def _padding(offset: int, length: int) -> int:
    """Bytes to skip before a tensor."""
    return -offset % PAGE if length > ALIGN_ABOVE else 0


def _stream_data(part: list[Placeholder], weights: Weights, file: BinaryIO, location: str) -> int:
    """Write initializers to `file`, one at a time, and point the placeholders to `location`."""
    offset = 0
    for tensor, index in part:
        weight = weights[index]
        padding = _padding(offset, weight.nbytes)
        file.write(b"\0" * padding)
        offset += padding
        _write(weight, file)
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        offset += weight.nbytes
    return offset


def _stream_model(
    proto: onnx.ModelProto, inside: Iterable[tuple[onnx.TensorProto, int]], weights: Weights, file: BinaryIO
) -> None:
    """Write the message with the weights of the placeholders `inside`: the bytes that protobuf would write.

    Raises: EncodeError above what protobuf can read.
    """
    fresh, placed = tokens(), dict[bytes, ir.TensorProtocol]()
    for tensor, index in list(inside):
        token = next(fresh)
        placed[token] = weights[index]
        _fill(tensor, token)
    light = proto.SerializeToString(deterministic=True)
    size, pieces = splice(light, {token: weight.nbytes for token, weight in placed.items()})
    if size > LIMIT:
        raise EncodeError
    ordered = list(placed.values())
    for piece in pieces:
        if isinstance(piece, bytes):
            file.write(piece)
        else:
            _write(ordered[piece], file)


def _write(weight: ir.TensorProtocol, file: BinaryIO) -> None:
    """Write a tensor's bytes, block by block if it can be read so."""
    file.flush()  # numpy writes to the descriptor, past the buffer
    start = file.tell()
    if isinstance(weight, Blocked):
        for block in blocks(weight):
            ir.Tensor(block, weight.dtype).tofile(file)
    else:
        cast(ir.Tensor[Any], weight).tofile(file)  # every tensor class has it, the protocol does not say so
    file.flush()
    if (written := file.tell() - start) != weight.nbytes:
        raise OutputError(
            f"Tensor '{weight.name}' gave {written} bytes but its shape {weight.shape} needs {weight.nbytes}."
        )
