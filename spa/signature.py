"""What a model says about its inputs: names, types, shapes, and how large an index may be."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from spa.errors import ModelError

__all__ = ["Dim", "InputSpec", "Model", "as_ir", "index_bounds", "inputs_of"]

# protobuf ships no types
_DecodeError: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError

Dim = int | str | None
Model = onnx.ModelProto | ir.Model | Path | bytes


@dataclass(frozen=True)
class InputSpec:
    """One graph input that the user must provide."""

    name: str
    """The tensor's name."""
    dtype: np.dtype[Any]
    """numpy's type, an `ml_dtypes` one for bfloat16 and the like, object for strings."""
    shape: tuple[Dim, ...] | None
    """A size, a symbol or None (unnamed and unknown) for each axis; None if the model does not even tell the rank."""


def inputs_of(model: Model) -> tuple[InputSpec, ...]:
    """The inputs a user must provide: initializers that are listed among the inputs (IR 3) are left out.

    Raises: ModelError if the file cannot be read or an input is no tensor.
    """
    if isinstance(model, ir.Model):
        initializers = set(model.graph.initializers)
        return tuple(_spec_of_value(value) for value in model.graph.inputs if value.name not in initializers)
    graph = _proto(model).graph
    given = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return tuple(_spec_of_info(info) for info in graph.input if info.name not in given)


def _proto(model: onnx.ModelProto | Path | bytes) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    what = "the given bytes" if isinstance(model, bytes) else str(model)
    try:
        data = model if isinstance(model, bytes) else model.read_bytes()
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
    except OSError as error:
        raise ModelError(f"{what} cannot be read ({error.strerror}): check the path.") from error
    except _DecodeError as error:
        raise ModelError(f"{what} is not an ONNX model: give a file written by an ONNX exporter.") from error
    return proto


def _numpy_type(code: int, name: str) -> np.dtype[Any]:
    try:
        return np.dtype(ir.DataType(code).numpy())
    except (ValueError, TypeError) as error:
        raise ModelError(f"input {name!r} has element type {code}, which numpy cannot hold.") from error


def _spec_of_info(info: onnx.ValueInfoProto) -> InputSpec:
    if info.type.WhichOneof("value") != "tensor_type":
        raise ModelError(f"input {info.name!r} is not a tensor: only models with tensor inputs can be run.")
    tensor = info.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
        )
    return InputSpec(info.name, _numpy_type(tensor.elem_type, info.name), shape)


def _spec_of_value(value: ir.Value) -> InputSpec:
    name = value.name or ""
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        raise ModelError(f"input {name!r} is not a tensor: only models with tensor inputs can be run.")
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return InputSpec(name, _numpy_type(int(value.dtype), name), shape)


def as_ir(model: Model) -> ir.Model:
    """`model` as `onnx_ir` sees it; external data is read only when asked for.

    Raises: ModelError if it cannot be read.
    """
    if isinstance(model, ir.Model):
        return model
    proto = _proto(model)
    try:
        loaded = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise ModelError(f"the model is damaged ({str(error).splitlines()[0]}): export it again.") from error
    if isinstance(model, Path):
        ir.external_data.set_base_dir(loaded.graph, model.parent)
    return loaded


# ---- bounds of indices ------------------------------------------------------------------------------------------

# which input of an operator is the same numbers, moved, selected or repeated
_MOVES: dict[str, tuple[int, ...]] = {
    "Cast": (0,),
    "CastLike": (0,),
    "Concat": tuple(range(64)),
    "Dropout": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0,),
    "ReduceMax": (0,),
    "ReduceMin": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
# operator -> input that holds indices -> input that is looked up in, along the attribute `axis`
_LOOKUPS: dict[tuple[str, str], dict[int, int]] = {
    ("", "Gather"): {1: 0},
    ("", "GatherElements"): {1: 0},
    ("", "GatherND"): {1: 0},
    ("com.microsoft", "GatherBlockQuantized"): {1: 0},
    ("com.microsoft", "EmbedLayerNormalization"): {0: 2, 1: 4},
}


def index_bounds(model: ir.Model) -> dict[str, int]:
    """For each integer input that is used as an index: one more than the largest index allowed.

    Follows the input through casts, reshapes and added constants to the tables it looks up in, in subgraphs and
    functions too, and takes the smallest table. An input without entry is not known to be an index.
    """
    if model.functions:
        inlined = common_passes.InlinePass()(model.clone())
        model = inlined.model
    bounds = {}
    for value in model.graph.inputs:
        if value.name and value.dtype is not None and value.dtype.is_integer() and not value.is_initializer():
            found = _bounds_from(value)
            if found:
                bounds[value.name] = max(min(found), 1)
    return bounds


def _bounds_from(start: ir.Value) -> list[int]:
    """Sizes of all tables that `start` reaches, less what is added to it on the way."""
    found: list[int] = []
    seen: set[tuple[int, int]] = set()
    todo: list[tuple[ir.Value, int]] = [(start, 0)]
    while todo:
        value, added = todo.pop()
        if (id(value), added) in seen:
            continue
        seen.add((id(value), added))
        for node, slot in value.uses():
            size = _lookup_size(node, slot)
            if size is not None:
                found.append(size - added)
            more = _added(node, slot)
            if more is not None:
                todo += [(output, added + more) for output in node.outputs]
    return found


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _lookup_size(node: ir.Node, slot: int) -> int | None:
    """How many entries the table has that `node` looks up in with its input `slot`."""
    if _domain(node) == "" and node.op_type == "OneHot" and slot == 0:
        depth = _constant(node.inputs[1])
        return None if depth is None else int(depth.reshape(-1)[0])
    table = _LOOKUPS.get((_domain(node), node.op_type), {}).get(slot)
    if table is None or table >= len(node.inputs):
        return None
    axis = node.attributes.get("axis") or node.attributes.get("gather_axis")
    return _length(node.inputs[table], 0 if axis is None else axis.as_int())


def _length(table: ir.Value | None, axis: int) -> int | None:
    """Size of an axis, if it is fixed; the shape of a constant counts more than a declared one."""
    if table is None:
        return None
    tensor = ir.convenience.get_const_tensor(table)
    shape = table.shape if tensor is None else tensor.shape
    producer = table.producer()
    if tensor is None and producer is not None and producer.op_type in ("Cast", "Identity", "DequantizeLinear"):
        return _length(producer.inputs[0], axis)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def _added(node: ir.Node, slot: int) -> int | None:
    """What `node` adds at most to the numbers in its input `slot`; None if its outputs are other numbers."""
    if _domain(node) != "":
        return None
    if slot in _MOVES.get(node.op_type, ()):
        return 0
    signs: dict[str, Callable[[Any], Any]] = {"Add": np.max, "Sub": lambda array: -np.min(array)}
    if node.op_type not in signs or (node.op_type == "Sub" and slot == 1):
        return None
    other = _constant(node.inputs[1 - slot])
    return None if other is None or other.size == 0 else int(signs[node.op_type](other))


def _constant(value: ir.Value | None) -> np.ndarray[Any, np.dtype[Any]] | None:
    """A small constant's values, if they are at hand."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 65536:
        return None
    try:
        return np.asarray(tensor.numpy())
    except (OSError, ValueError):  # external data that is not where the model says
        return None
