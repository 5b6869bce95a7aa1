"""Weights that live outside of a model's protobuf message: found on load, streamed on save.

A `ModelProto` is cheap to copy, infer and deserialize once its weights are gone. So every big
tensor is swapped for a *placeholder* (same name, type and dims; location `spa:<index>`), and the
`Weights` list holds the data. Arrays map a file only while they are alive, and an open
descriptor keeps the bytes reachable after the file's name was replaced by a new model.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no types are shipped
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from spa.blocks import Blocked, divisible
from spa.errors import ExternalDataError, ModelError, UnsupportedModelError
from spa.inference import children
from spa.wire import LIMIT, Irregular, Span, cut

__all__ = [
    "Detached",
    "File",
    "Weights",
    "adopt",
    "attach",
    "detach",
    "lighten",
    "map_model",
    "placeholder",
    "root_cause",
    "weight_index",
]

SMALL = 4096
"""Tensors up to this many bytes stay in the protobuf message: shape inference reads them."""
SPARSE_LIMIT = 64 << 20

Weights: TypeAlias = list[ir.TensorProtocol]
"""Placeholder index -> the tensor it stands for."""
Detached: TypeAlias = tuple[onnx.ModelProto, Weights, list[int]]
"""Light message, the weights, bytes of each file with external data (if it is not opened: that are used)."""
_MARK = "spa:"
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


class File:
    """An open file, closed when the last tensor inside it is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.state = self._state()
        self.size = self.state[0]
        weakref.finalize(self, os.close, self.descriptor)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Bytes that are mapped for as long as the array is alive.

        Raises: ModelError if the file was overwritten in place since it was opened.
        """
        if self._state() != self.state:
            raise ModelError(f"{self.path}: the file was overwritten while it was in use; start again.")
        if not length:
            return np.empty(0, np.uint8)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(self.descriptor, length + skip, access=mmap.ACCESS_READ, offset=offset - skip)
        return np.frombuffer(view, np.uint8, offset=skip)


def _mapped(file: File, offset: int, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.LazyTensor:
    """A tensor inside an open file; each array maps only its own bytes, for as long as it is alive."""
    dims = shape.numpy()

    def read() -> ir.TensorProtocol:
        return _tensor(file.read(offset, tensor.nbytes), name, dtype, shape)

    def rows(start: int, stop: int) -> NDArray[Any]:
        width = math.prod(dims[1:]) * dtype.bitwidth // 8
        raw = file.read(offset + start * width, (stop - start) * width)
        return _array(raw, dtype, (stop - start, *dims[1:]))

    if divisible(dtype, shape):
        return Blocked(rows, dtype, shape, name)
    tensor = ir.LazyTensor(read, dtype, shape, name=name)
    return tensor


def _absent(what: str, location: str, dtype: ir.DataType, shape: ir.Shape, name: str) -> ir.LazyTensor:
    """A tensor in a file that nobody looked for."""

    def read() -> ir.TensorProtocol:
        raise ExternalDataError(
            f"{what}: its numbers are needed, but external data ('{location}') was left out; read the weights, too."
        )

    return ir.LazyTensor(read, dtype, shape, name=name)


def _tensor(raw: NDArray[np.uint8], name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
    """The bytes of a tensor as stored, without a copy."""
    if dtype.bitwidth < 8:
        return ir.PackedTensor(raw, dtype, shape=shape, name=name)
    return ir.Tensor(_array(raw, dtype, shape.numpy()), dtype, shape=shape, name=name)


def _array(raw: NDArray[np.uint8], dtype: ir.DataType, dims: Sequence[int]) -> NDArray[Any]:
    return raw.view(np.dtype(dtype.numpy()).newbyteorder("<")).reshape(dims)


# --- load: out of the proto ------------------------------------------------------------------------------------------


class _Detacher:
    """Checks every tensor of a model once and moves the big ones out; state: `weights` and open files.

    The payload of a tensor whose `raw_data` is a token in `spans` stands in `file`.
    """

    def __init__(self, label: str, folder: Path | None, read: bool = True) -> None:
        self.label, self.folder, self.read = label, folder, read
        self.weights: Weights = []
        self.files: dict[str, File] = {}
        self.absent: dict[str, int] = {}
        self.file: File | None = None
        self.spans: dict[bytes, Span] = {}

    def model(self, source: onnx.ModelProto) -> Detached:
        target = onnx.ModelProto()
        for field, value in source.ListFields():
            if field.name != "graph":
                copy_field(target, field.name, value)
        self.graph(source.graph, target.graph)
        for function in target.functions:
            self.nodes(function.node)
        return target, self.weights, [*(file.size for file in self.files.values()), *self.absent.values()]

    def graph(self, source: onnx.GraphProto, target: onnx.GraphProto) -> None:
        for field, value in source.ListFields():
            if field.name not in ("initializer", "sparse_initializer"):
                copy_field(target, field.name, value)
        for tensor in source.initializer:
            if not tensor.name:
                raise ModelError(f"{self.label}: an initializer has no name; export the model again.")
            self.tensor(tensor, target.initializer.add())
        for sparse in source.sparse_initializer:
            self.dense(sparse, target.initializer.add())
        self.nodes(target.node)

    def nodes(self, nodes: Any) -> None:
        """Move the tensors of attributes out, in place."""
        for node in nodes:
            for attribute in node.attribute:
                match attribute.type:
                    case onnx.AttributeProto.TENSOR:
                        self.in_place(attribute.t)
                    case onnx.AttributeProto.SPARSE_TENSOR if node.op_type == "Constant":
                        self.dense(attribute.sparse_tensor, attribute.t)
                        attribute.ClearField("sparse_tensor")
                        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
            for graph in children(node):
                self.subgraph(graph)

    def subgraph(self, graph: onnx.GraphProto) -> None:
        source = onnx.GraphProto()
        source.CopyFrom(graph)
        graph.Clear()
        self.graph(source, graph)

    def in_place(self, tensor: onnx.TensorProto) -> None:
        source = onnx.TensorProto()
        source.CopyFrom(tensor)
        tensor.Clear()
        self.tensor(source, tensor)

    def tensor(self, source: onnx.TensorProto, target: onnx.TensorProto) -> None:
        """Copy `source` into `target`, or move its data to `weights` and make `target` a placeholder."""
        what = f"{self.label}: tensor '{source.name}'"
        if source.data_type not in set(ir.DataType) or source.data_type == 0:
            raise ModelError(f"{what} has the unknown element type {source.data_type}; export the model again.")
        dtype = ir.DataType(source.data_type)
        if any(dim < 0 for dim in source.dims):
            raise ModelError(f"{what} has the negative shape {list(source.dims)}; export the model again.")
        shape = ir.Shape(source.dims)
        tensor: ir.TensorProtocol
        if source.data_location == onnx.TensorProto.EXTERNAL:
            tensor = self.external(what, source, dtype, shape)
        else:
            count = math.prod(source.dims)
            raw = source.raw_data if source.HasField("raw_data") else None
            span = self.spans.get(raw) if raw is not None and dtype != ir.DataType.STRING else None
            have = span.length if span is not None else None if raw is None else len(raw)
            _check_length(what, source, have, dtype, count)
            if dtype == ir.DataType.STRING or count * dtype.bitwidth <= 8 * SMALL:
                target.CopyFrom(source)
                return
            if span is not None and raw is not None and self.file is not None:
                del self.spans[raw]
                tensor = _mapped(self.file, span.offset, source.name, dtype, shape)
            else:
                data = raw if raw is not None else ir.TensorProtoTensor(source).tobytes()
                tensor = _tensor(np.frombuffer(data, np.uint8), source.name, dtype, shape)
        tensor.doc_string = source.doc_string or None
        tensor.metadata_props.update({entry.key: entry.value for entry in source.metadata_props})
        placeholder(target, tensor, len(self.weights), tensor.name or "")
        self.weights.append(tensor)

    def external(self, what: str, source: onnx.TensorProto, dtype: ir.DataType, shape: ir.Shape) -> ir.LazyTensor:
        try:
            info = ExternalDataInfo(source)
        except ValueError as error:
            raise ExternalDataError(f"{what} has a malformed external data entry; export the model again.") from error
        offset = cast("int | None", info.offset) or 0
        return self.mapped(what, info.location, offset, info.length, source.name, dtype, shape)

    def mapped(
        self, what: str, location: str, offset: int, length: int | None, name: str, dtype: ir.DataType, shape: ir.Shape
    ) -> ir.LazyTensor:
        """The tensor at `location`; refuses what is missing, too short or outside of the model's folder."""
        if dtype == ir.DataType.STRING:
            raise UnsupportedModelError(f"{what} keeps strings as external data; store them in the model file.")
        if not self.read:
            tensor = _absent(what, location, dtype, shape, name)
            self.absent[location] = max(self.absent.get(location, 0), offset + tensor.nbytes)
            return tensor
        if location not in self.files:
            self.files[location] = self._open(what, location)
        file = self.files[location]
        tensor = _mapped(file, offset, name, dtype, shape)
        if length not in (None, tensor.nbytes):
            raise ExternalDataError(
                f"{what} needs {tensor.nbytes} bytes for {list(shape.numpy())}, but its external data "
                f"entry has {length}; export the model again."
            )
        if offset + tensor.nbytes > file.size:
            raise ExternalDataError(
                f"{what} needs bytes {offset} to {offset + tensor.nbytes} of '{location}', which has only {file.size}; "
                "copy or download the file again."
            )
        return tensor

    def _open(self, what: str, location: str) -> File:
        if self.folder is None:
            raise ExternalDataError(f"{what} is external data of an in-memory model; pass the model's path instead.")
        absolute = os.path.isabs(location) or location[:1] in ("/", "\\") or location[1:2] == ":"
        folder = Path(os.path.realpath(self.folder))
        path = Path(os.path.realpath(folder / location)) if "\0" not in location else folder
        if absolute or folder not in path.parents:
            raise ExternalDataError(
                f"{what} points to '{location}' outside of the model's folder, which is refused as an attack; "
                "copy the real files into one folder and use a relative location."
            )
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ExternalDataError(f"{what}: external data '{location}' is not a regular file.")
            return File(path)
        except OSError as error:
            raise ExternalDataError(
                f"{what}: external data file '{location}' cannot be opened ({error.strerror}); "
                "put it next to the model."
            ) from error

    def dense(self, sparse: onnx.SparseTensorProto, target: onnx.TensorProto) -> None:
        what = f"{self.label}: sparse tensor '{sparse.values.name}'"
        dims, size = list(sparse.dims), math.prod(sparse.dims)
        dtype = ir.DataType(sparse.values.data_type)
        if size * dtype.bitwidth > 8 * SPARSE_LIMIT:
            raise UnsupportedModelError(f"{what} is too large to be stored densely; make it dense and smaller first.")
        try:
            values = ir.TensorProtoTensor(sparse.values).numpy()
            index = ir.TensorProtoTensor(sparse.indices).numpy()
            dense = np.zeros(dims, values.dtype)
            if index.ndim == 2:
                dense[tuple(index.T)] = values
            else:
                dense.reshape(-1)[index] = values
        except Exception as error:  # onnx-ir and numpy raise anything on malformed tensors
            raise ModelError(f"{what} has malformed values or indices; export the model again.") from error
        raw = ir.Tensor(dense, dtype, name=sparse.values.name).tobytes()
        self.tensor(onnx.TensorProto(name=sparse.values.name, dims=dims, data_type=int(dtype), raw_data=raw), target)


def _check_length(what: str, source: onnx.TensorProto, raw: int | None, dtype: ir.DataType, count: int) -> None:
    """Compare the bytes of `raw_data`, or the values of another field, with the shape."""
    if raw is not None and dtype != ir.DataType.STRING:
        have, need = raw, {-(-count * dtype.bitwidth // 8)}
    elif dtype == ir.DataType.STRING:
        have, need = len(source.string_data), {count}
    else:
        have = max(len(getattr(source, field)) for field in _TYPED_FIELDS)
        complex_ = dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
        need = {2 * count} if complex_ else {count, -(-count * min(dtype.bitwidth, 8) // 8)}
    if have not in need:
        raise ModelError(
            f"{what} of shape {list(source.dims)} needs {max(need)} {'values' if raw is None else 'bytes'} but has "
            f"{have}; the file is truncated or damaged, copy or export it again."
        )


def copy_field(target: Any, name: str, value: Any) -> None:
    """Copy one field, as given by `ListFields`."""
    if hasattr(value, "extend"):
        getattr(target, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(target, name).CopyFrom(value)
    else:
        setattr(target, name, value)


def detach(source: onnx.ModelProto, label: str, folder: Path | None, *, read: bool = True) -> Detached:
    """Light copy of `source` without its big weights; `read=False` does not open files with external data.

    Raises: `ModelError` for a damaged tensor, `ExternalDataError`, `UnsupportedModelError`.
    """
    return _Detacher(label, folder, read).model(source)


def map_model(file: File, label: str, *, read: bool = True) -> Detached | None:
    """As `detach`, for a model file whose own weights are never held; None if only protobuf's parser can tell.

    Raises: as `detach`.
    """
    if not 0 < file.size <= LIMIT:
        return None
    detacher, proto = _Detacher(label, file.path.parent, read), onnx.ModelProto()
    try:
        with mmap.mmap(file.descriptor, file.size, access=mmap.ACCESS_READ) as view:
            light, detacher.spans = cut(view, SMALL)
        detacher.file = file
        proto.ParseFromString(light)
    except (Irregular, DecodeError):
        return None
    if not proto.HasField("graph"):
        return None
    result = detacher.model(proto)
    return None if detacher.spans else result  # a payload where no weight is expected


# --- between IR and proto --------------------------------------------------------------------------------------------


def _slots(
    model: ir.Model, attributes: bool
) -> Iterator[tuple[ir.TensorProtocol, Callable[[Any], None], Callable[[], None]]]:
    """Every tensor, how to replace it, and how to undo that."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                assign = partial(setattr, value, "const_value")
                yield value.const_value, assign, partial(assign, value.const_value)
        for node in graph if attributes else ():
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    assign = partial(_set_attribute, node, name, attribute.doc_string)
                    yield attribute.as_tensor(), assign, partial(node.attributes.add, attribute)


def _set_attribute(node: ir.Node, name: str, doc_string: str | None, tensor: ir.TensorProtocol) -> None:
    node.attributes.add(ir.AttrTensor(name, tensor, doc_string))


def _is_heavy(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and (tensor.nbytes > SMALL or isinstance(tensor, ir.ExternalTensor))


def lighten(model: ir.Model, *, attributes: bool = False) -> tuple[onnx.ModelProto, Weights]:
    """`model` as a proto with placeholders, and the tensors they stand for; the model is left as it was."""
    weights: Weights = []
    undo: list[Callable[[], None]] = []
    try:
        for tensor, assign, reset in _slots(model, attributes):
            if _is_heavy(tensor):
                undo.append(reset)
                mark, name, shape = f"{_MARK}{len(weights)}", tensor.name or "", ir.Shape(tensor.shape.numpy())
                assign(
                    ir.ExternalTensor(
                        mark,
                        None,
                        None,
                        tensor.dtype,
                        shape=shape,
                        name=name,
                        doc_string=tensor.doc_string,
                        metadata_props=dict(tensor.metadata_props),
                    )
                )
                weights.append(tensor)
        proto = ir.to_proto(model)
    finally:
        for reset in undo:
            reset()
    _tidy(proto.graph)
    return proto, weights


def _tidy(graph: onnx.GraphProto) -> None:
    """Undo two habits of onnx-ir: metadata of initializers written twice, and `value_info` for initializers."""
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.metadata_props}
        if len(entries) < len(tensor.metadata_props):
            del tensor.metadata_props[:]
            for key, value in entries.items():
                tensor.metadata_props.add(key=key, value=value)
    for node in graph.node:
        for child in children(node):
            _tidy(child)
    names = {tensor.name for tensor in graph.initializer}
    kept = [info for info in graph.value_info if info.name not in names or info.metadata_props or info.doc_string]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)


def adopt(weights: Weights, label: str) -> tuple[Weights, bool]:
    """Tensors of a caller's IR model under own wrappers, external ones checked and opened; whether there are any."""
    adopted: Weights = []
    openers: dict[str, _Detacher] = {}
    for tensor in weights:
        new: ir.TensorProtocol
        if isinstance(tensor, ir.ExternalTensor):
            folder = os.fspath(tensor.base_dir) or "."
            opener = openers.setdefault(folder, _Detacher(label, Path(folder)))
            what = f"{label}: tensor '{tensor.name}'"
            place = os.fspath(tensor.location), tensor.offset or 0, tensor.length
            new = opener.mapped(what, *place, tensor.name or "", tensor.dtype, tensor.shape)
        elif isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
            new = ir.Tensor(tensor.raw, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
        else:
            shape = ir.Shape(tensor.shape.numpy())
            new = ir.LazyTensor(partial(_same, tensor), tensor.dtype, shape, name=tensor.name)
        new.doc_string = tensor.doc_string
        new.metadata_props.update(tensor.metadata_props)
        adopted.append(new)
    return adopted, bool(openers)


def _same(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor


def attach(model: ir.Model, weights: Weights) -> None:
    """Put the tensors back where their placeholders are."""
    for tensor, assign, _ in list(_slots(model, attributes=True)):
        if isinstance(tensor, ir.ExternalTensor):
            assign(weights[weight_index(os.fspath(tensor.location))])


def placeholder(target: onnx.TensorProto, tensor: ir.TensorProtocol, index: int, name: str) -> None:
    """Make `target` stand for `tensor`, the one at `index` of a list of weights."""
    target.name, target.data_type = name, int(tensor.dtype)
    target.dims.extend(tensor.shape.numpy())
    target.data_location = onnx.TensorProto.EXTERNAL
    target.external_data.add(key="location", value=f"{_MARK}{index}")


def weight_index(location: str) -> int:
    """Index of the tensor that a placeholder stands for."""
    return int(location.removeprefix(_MARK))


def root_cause(error: BaseException) -> str:
    """The first cause of an exception, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
