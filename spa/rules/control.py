"""If, Loop, Scan: captured and carried values tie the axes inside to the axes outside."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from spa.rules.base import NEVER, Op, Operand, Rule, register


def _tie(op: Op, outer: Operand | None, inner: ir.Value | None, skip: Sequence[int] = ()) -> None:
    """Make the dimensions of two values one space; `skip` are dimensions that only the outer value has."""
    other = op.resolve(inner) if inner is not None else None
    if outer is None or other is None:
        for operand in (outer, other):
            for dim in operand.dims if operand is not None else ():
                op.freeze(dim, f"{op.node.op_type} with a value of unknown rank")
        return
    outside = [d for d in range(len(outer.dims)) if d not in skip]
    for d in skip:
        op.freeze(outer.dims[d], f"{op.node.op_type} iterates over this axis")
    if len(outside) != len(other.dims):
        for dim in (*outer.dims, *other.dims):
            op.freeze(dim, f"{op.node.op_type} with values of different ranks")
        return
    for d, dim in zip(outside, other.dims, strict=True):
        if outer.shape[d] == op.axes.size(dim):
            op.axes.same(outer.dims[d], dim)
        else:
            op.freeze(outer.dims[d], f"{op.node.op_type} with values of different sizes")
            op.freeze(dim, f"{op.node.op_type} with values of different sizes")


def handed(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Loop, Scan: (input slot, value inside) that every iteration sees unchanged, such as weights in a state."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Loop", "Scan"):
        return []
    body = node.attributes["body"].as_graph()
    first = 2 if node.op_type == "Loop" else 0  # the trip count and the condition
    states = len(node.inputs) - (2 if first else node.attributes["num_scan_inputs"].as_int())
    found = []
    for k in range(states):
        inner, result = body.inputs[first + k], body.outputs[k + (first > 0)]
        while (producer := result.producer()) is not None and producer.op_type == "Identity" and producer.inputs[0]:
            result = producer.inputs[0]
        if result is inner:
            found.append((first + k, inner))
    return found


def _if(op: Op) -> None:
    for name in ("then_branch", "else_branch"):
        for outer, inner in zip(op.outputs, op.attr(name).outputs, strict=True):
            _tie(op, outer, inner)


def _loop(op: Op) -> None:
    body: ir.Graph = op.attr("body")
    carried = len(op.inputs) - 2
    for k in range(carried):
        _tie(op, op.input(k + 2), body.inputs[k + 2])
        _tie(op, op.input(k + 2), body.outputs[k + 1])
        _tie(op, op.output(k), body.outputs[k + 1])
    for k in range(carried, len(op.outputs)):
        _tie(op, op.output(k), body.outputs[k + 1], skip=(0,))


def _scan(op: Op) -> None:
    body: ir.Graph = op.attr("body")
    scanned = int(op.attr("num_scan_inputs"))
    states = len(op.inputs) - scanned
    for k in range(states):
        _tie(op, op.input(k), body.inputs[k])
        _tie(op, op.input(k), body.outputs[k])
        _tie(op, op.output(k), body.outputs[k])
    in_axes = op.attr("scan_input_axes") or [0] * scanned
    for k in range(scanned):
        x = op.input(states + k)
        _tie(op, x, body.inputs[states + k], skip=(int(in_axes[k]) % len(x.dims),) if x is not None else ())
    out_axes = op.attr("scan_output_axes") or [0] * (len(op.outputs) - states)
    for k in range(states, len(op.outputs)):
        y = op.output(k)
        _tie(op, y, body.outputs[k], skip=(int(out_axes[k - states]) % len(y.dims),) if y is not None else ())


register("If", Rule(_if, "branch results are the outputs", NEVER))
register("Loop", Rule(_loop, "carried values keep their axes through the body", NEVER))
register("Scan", Rule(_scan, "states keep their axes; scanned axes are frozen", NEVER), since=9)
