"""Operators with an activation inside, and what they compute before it."""

from __future__ import annotations

import onnx

SUFFIX = "~linear"
"""The linear part of the output `y` of such an operator is called `y~linear`."""
_LINEAR: dict[tuple[str, str], tuple[str, int]] = {
    ("com.microsoft", "FusedConv"): ("Conv", 3),
    ("com.microsoft", "FusedGemm"): ("Gemm", 3),
    ("com.microsoft", "GemmFastGelu"): ("MatMul", 2),
}
"""Operator -> the operator inside, and how many inputs that takes; a bias behind them is added."""


def linear_part(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that compute what `node` does before its activation (and before a branch that it adds), if it has one."""
    known = _LINEAR.get((node.domain, node.op_type))
    if known is None:
        return []
    operator, count = known
    output = node.output[0] + SUFFIX
    out = [onnx.NodeProto(op_type=operator, name=f"{node.name}{SUFFIX}", input=node.input[:count], output=[output])]
    out[0].attribute.extend(a for a in node.attribute if not a.name.startswith("activation"))
    if operator == "MatMul" and len(node.input) > count and node.input[count]:
        out[0].output[0] += "~product"
        added = [out[0].output[0], node.input[count]]
        out.append(onnx.NodeProto(op_type="Add", name=f"{node.name}{SUFFIX}~bias", input=added, output=[output]))
    return out
