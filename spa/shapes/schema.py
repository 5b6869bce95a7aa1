"""What ONNX's own operator schemas tell: types of outputs, and shapes where we have no rule."""

from __future__ import annotations

import re
from typing import Any

import onnx
import onnx.defs
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
from numpy.typing import NDArray

from spa.shapes.op import Op, Shape
from spa.symbols import Size

_FIXED = re.compile(r"tensor\((\w+)\)")
_NAMES = {"float": "FLOAT", "double": "DOUBLE"}
_TYPED = {
    "DequantizeLinear": 1,
    "EmbedLayerNormalization": 2,
    "GatherBlockQuantized": 2,
    "MatMulIntegerToFloat": 2,
    "QAttention": 3,
    "QEmbedLayerNormalization": 8,
    "QGemm": 8,
    "QLinearConcat": 2,
    "QLinearWhere": 1,
    "QuantizeLinear": 2,
}
"""Operators of ONNX Runtime whose output is not of the first input's type: the input whose type it shares."""


def output_types(domain: str, operator: str, version: int) -> list[int | ir.DataType | None]:
    """For each output: the input slot whose element type it shares, its fixed type, or None."""
    try:
        schema = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return [_TYPED.get(operator, 0)]
    constraints = {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints}
    slots: dict[str, int] = {}
    for k, formal in enumerate(schema.inputs):
        slots.setdefault(formal.type_str, k)
    found: list[int | ir.DataType | None] = []
    for formal in schema.outputs:
        kinds = constraints.get(formal.type_str, [formal.type_str])
        fixed = _FIXED.fullmatch(kinds[0]) if len(kinds) == 1 else None
        if fixed is not None:
            name = fixed.group(1)
            found.append(getattr(ir.DataType, _NAMES.get(name, name.upper()), None))
        else:
            found.append(slots.get(formal.type_str))
    if schema.outputs and schema.outputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        found.extend([found[-1]] * 255)
    return found


def output_shapes(op: Op, domain: str, tensors: dict[str, NDArray[Any]]) -> list[Shape | None]:
    """Shapes by the schema's inference function; raises where it cannot tell."""
    node = op.node
    schema = onnx.defs.get_schema(node.op_type, op.version, domain)
    symbols: dict[str, Size] = {}
    types: dict[str, onnx.TypeProto] = {}
    for slot, value in enumerate(op.inputs):
        if value is not None and value.name:
            types[value.name] = _type_proto(op.shape(slot), op.dtype(slot), symbols)
    data = {name: onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()}
    opsets = [onnx.OperatorSetIdProto(domain=domain, version=op.version)]
    found = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data, opset_imports=opsets)
    out: list[Shape | None] = []
    for value in node.outputs:
        kind = found.get(value.name or "")
        tensor = None if kind is None or not kind.HasField("tensor_type") else kind.tensor_type
        if tensor is None or not tensor.HasField("shape"):
            out.append(None)
            continue
        out.append(tuple(_size(op, dim, symbols) for dim in tensor.shape.dim))
    return out


def _type_proto(shape: Shape | None, dtype: ir.DataType | None, symbols: dict[str, Size]) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = 0 if dtype is None else int(dtype)
    if shape is not None:
        proto.tensor_type.shape.SetInParent()
        for size in shape:
            dim = proto.tensor_type.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = repr(size)
                symbols[dim.dim_param] = size
    return proto


def _size(op: Op, dim: onnx.TensorShapeProto.Dimension, symbols: dict[str, Size]) -> Size:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return symbols.get(dim.dim_param) or op.fresh()
