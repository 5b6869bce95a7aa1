"""What is chosen by a router: numbers of positions, followed from TopK or ArgMax to where they look something up.

A position of the axis that TopK runs over may leave as one that is never chosen, if every use of the numbers is known:
the axis they look up in loses it, too, and those behind it get smaller numbers. `spa.coupling` frees such an axis only
where it is one of stacked matrices, the experts of a mixture; class scores, tokens and boxes stay.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spa.axes import Axis
from spa.rules.base import NEVER, Op, Operand, Rule, Zero, register
from spa.rules.notation import Einsum
from spa.symbols import Size

_INDICES = {"TopK": 1, "ArgMax": 0}
"""Operator -> the output with the numbers of the chosen positions."""
_VIEWS = {
    "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Slice", "Split",
    "Gather", "GatherElements",
}  # fmt: skip
"""What their outputs hold are entries of input 0."""
_LOOKUPS = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterElements": 1, "Scatter": 1, "OneHot": 0}
"""Operator -> the input with numbers of positions."""
_MEASURES = ("Shape", "Size")


def chosen(op: Op, slot: int) -> Axis | None:
    """The axis whose positions input `slot` holds the numbers of; None if they were not chosen from one."""
    value = op.node.inputs[slot]
    while value is not None and (node := value.producer()) is not None and _standard(node):
        if _INDICES.get(node.op_type) == value.index():
            return _searched(op, node)
        value = node.inputs[0] if _keeps_numbers(node) else None
    return None


def _searched(op: Op, node: ir.Node) -> Axis | None:
    source = op.resolve(node.inputs[0]) if node.inputs[0] is not None else None
    attribute = node.attributes.get("axis")
    axis = attribute.as_int() if attribute is not None else 0 if node.op_type == "ArgMax" else -1
    return source.dims[axis] if source is not None and source.dims else None


def _standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")


def _keeps_numbers(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).is_integer()
    return node.op_type in _VIEWS


def count(op: Op, size: Size) -> int | str:
    """How many of `size` positions TopK or ArgMax chooses; a sentence where one that is not chosen cannot leave."""
    wanted = op.ints(1) if op.input(1) is not None else [int(op.attr("k", 1))]
    indices = op.output(_INDICES[op.node.op_type])
    if not isinstance(size, int):
        return "its size is known only at run time"
    if not op.attr("largest", 1):
        return "the smallest are chosen"
    if not wanted or wanted[0] is None:
        return "how many are chosen is known only at run time"
    if wanted[0] >= size:
        return "all are chosen"
    return wanted[0] if indices is None else _misused(op, indices.value, size) or wanted[0]


def _misused(op: Op, numbers: ir.Value, size: int) -> str:
    """What reads the numbers of positions, and does not look them up; empty if nothing does."""
    waiting, seen = [numbers], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            return "the numbers of what is chosen are an output"
        for node, slot in value.uses():
            if _standard(node) and (node.op_type in _MEASURES or _looks_up(op, node, slot, size)):
                continue
            if slot != 0 or not (_standard(node) and _keeps_numbers(node)):
                return f"{node.op_type} {node.name or ''}".strip() + " reads the numbers of what is chosen"
            waiting += node.outputs
    return ""


def _looks_up(op: Op, node: ir.Node, slot: int, size: int) -> bool:
    if node.op_type == "Equal":
        other = node.inputs[1 - slot]
        return other is not None and numbered(op.resolve(other), size)
    if node.op_type == "GatherND":
        index = op.resolve(node.inputs[1]) if node.inputs[1] is not None else None
        batch = node.attributes.get("batch_dims")
        return slot == 1 and index is not None and index.shape[-1] == 1 and (batch is None or not batch.as_int())
    return _LOOKUPS.get(node.op_type) == slot


def numbered(operand: Operand | None, size: int) -> bool:
    """Whether an operand is the constant 0, 1 ... size - 1."""
    known = operand.const if operand is not None else None
    return known is not None and known.ndim == 1 and np.array_equal(known, np.arange(size))


def look_up(op: Op, slot: int, d: int) -> bool:
    """Dimension `d` of input 0 is looked up at the numbers in input `slot`: whether it may lose what is not chosen."""
    data, axis = op.input(0), chosen(op, slot)
    if axis is None or data is None or data.shape[d] != op.axes.size(axis):
        return False
    op.axes.same(data.dims[d], axis)
    op.flow(axis, [(0, d)], role="expert")
    return True


def _one_hot(op: Op) -> None:
    """The numbers of experts as a mask over all of them."""
    index, y = op.input(0), op.output()
    axis, depth = chosen(op, 0), op.ints(1)
    if axis is None or index is None or y is None or depth != [op.axes.size(axis)]:
        op.freeze_all("OneHot makes this axis")
        return
    place = int(op.attr("axis", -1)) % len(y.dims)
    op.axes.same(axis, y.dims[place])
    op.flow(axis, [], [(0, place)], role="expert")
    op.edit(1, None, axis)
    others = [dim for d, dim in enumerate(y.dims) if d != place]
    for dim, out in zip(index.dims, others, strict=True):
        op.axes.same(dim, out)
    values = op.input(2)
    for dim in values.dims if values is not None else ():
        op.freeze(dim, "OneHot reads both values")


register("OneHot", Rule(_one_hot, "numbers of experts: their axis, its size is edited; else frozen", NEVER))


def _equal(op: Op) -> None:
    """As any comparison; numbers of experts with all of them, in order: a mask over all of them."""
    Einsum("..., ... -> ...")(op)
    y = op.output()
    for slot in (0, 1) if len(op.inputs) == 2 and y is not None else ():
        axis, other = chosen(op, slot), op.input(1 - slot)
        size = op.axes.size(axis) if axis is not None else None
        if axis is not None and other is not None and isinstance(size, int) and numbered(other, size):
            op.axes.same(axis, other.dims[0])
            op.remap(1 - slot, axis, axis)


register("Equal", Rule(_equal, "..., ... -> ..., numbers of experts are counted anew", NEVER, combines=True))


def _moe(op: Op) -> None:
    """Router, choice and experts in one operator, as far as ONNX Runtime has it on CPU.

    Neurons pass from the first product to the second, which sums over them: there a zero silences them, not before.
    """
    gated = op.attr("activation_type", "relu") == "swiglu"
    router = op.input(1)
    if router is None or op.input(6) is not None or (gated and op.attr("swiglu_fusion", 0) != 1):
        op.freeze_all("MoE with a third matrix, or with gates that do not alternate with what they multiply")
        return
    chosen, first = int(op.attr("k", 1)), "(f 2)" if gated else "f"
    bound = Einsum(
        f"~ i, ~ e, e {first} i, e {first}, e o g, e o -> ~ o",
        leaving={"e": "pass", "f": "pass"},
        macs=f"{chosen * (1 + gated)} ~0 f i, {chosen} ~0 g o",
        roles=dict.fromkeys("ifgo", "neuron") | {"e": "expert"},
    ).bind(op)
    if bound:
        op.axes.same(bound["f"], bound["g"])
        op.axes.same(bound["i"], bound["o"])  # the kernel knows one width
        sparse = "a sparse mixer compares the best" if op.attr("use_sparse_mixer", 0) else ""
        few = isinstance(router.shape[-1], int) and chosen < router.shape[-1]
        op.choose(len(router.dims) - 1, sparse or (chosen if few else "all are chosen"), slot=1)


register(
    "MoE",
    Rule(_moe, "~ c, ~ e, e f c, e f, e c f, e c -> ~ c, e is chosen from", Zero(any_of=(4,), all_of=(5,))),
    domain="com.microsoft",
)
