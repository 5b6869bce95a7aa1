"""Integer products whose weights are signed, with unsigned ones that stand for the same numbers.

Processors of the x86 family without VNNI multiply uint8 by int8 in pairs whose sum is cut off at 16 bits (Intel, oneDNN
developer guide, "Nuances of int8 computations"), so that what a product yields depends on which channel stands beside
which: a pruned model could not equal its reference. Products of uint8 by uint8 are computed exactly.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spa.sites import constant_of
from spa.twin import Twin

_PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "QLinearConv": ((3, 5),),
    "QLinearMatMul": ((3, 5),),
    "MatMulInteger": ((1, 3),),
    "ConvInteger": ((1, 3),),
    "MatMulIntegerToFloat": ((1, 5),),
    "DynamicQuantizeMatMul": ((1, 3),),
    "QGemm": ((3, 5),),
    "QAttention": ((1, 7),),
    "DynamicQuantizeLSTM": ((1, 9), (2, 11)),
}
"""Operator -> slots of weights and of their zero points; the other factor is the first input."""
_SHIFT = 128


def has_signed(model: ir.Model) -> bool:
    """Whether `unsigned` changes anything."""
    return any(_signed(node) for node in model.graph.all_nodes())


def unsigned(model: ir.Model) -> ir.Model:
    """A copy in which int8 weights and their zero points are uint8, both 128 higher: their differences stay."""
    twin = Twin(model)
    made: dict[ir.Value | None, ir.Value] = {}

    def raised(value: ir.Value | None) -> ir.Value:
        if value not in made:
            tensor = _tensor(value)
            numbers = np.zeros((), np.int16) if tensor is None else tensor.numpy().astype(np.int16)
            name = "zero" if value is None else value.name or ""
            made[value] = twin.constant(ir.tensor((numbers + _SHIFT).astype(np.uint8)), f"{name}_unsigned")
        return made[value]

    for node in twin.model.graph.all_nodes():
        for weight, zero in _signed(node):
            node.resize_inputs(max(len(node.inputs), zero + 1))
            for slot in (weight, zero):
                node.replace_input_with(slot, raised(node.inputs[slot]))
    return twin.model


def _signed(node: ir.Node) -> list[tuple[int, int]]:
    """The weights that can be made unsigned."""
    slots = _PRODUCTS.get(node.op_type, ())
    if not slots or _kind(node.inputs[0]) not in (ir.DataType.UINT8, ir.DataType.FLOAT):
        return []
    return [(weight, zero) for weight, zero in slots if _is_int8(node, weight) and _may_rise(node, zero)]


def _kind(value: ir.Value | None) -> ir.DataType | None:
    """The type of the other factor, also where only what it was made from says it."""
    while value is not None and value.dtype is None and (node := value.producer()) is not None:
        if node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear"):
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            return ir.DataType.UINT8 if zero is None else zero.dtype
        value = node.inputs[1 if node.op_type == "Where" else 0] if node.inputs else None
    return value.dtype if value is not None else None


def _is_int8(node: ir.Node, slot: int) -> bool:
    tensor = _tensor(node.inputs[slot]) if slot < len(node.inputs) else None
    return tensor is not None and tensor.dtype == ir.DataType.INT8


def _may_rise(node: ir.Node, slot: int) -> bool:
    return slot >= len(node.inputs) or node.inputs[slot] is None or _is_int8(node, slot)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None or value.is_graph_input() else constant_of(value)
