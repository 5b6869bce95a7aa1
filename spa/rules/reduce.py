"""Pooling, reductions, and operators that compare along an axis."""

from __future__ import annotations

from spa.rules import choice
from spa.rules.base import FACTOR, NEVER, Leaving, Op, Rule, register
from spa.rules.notation import Einsum, einsum


def _pool(op: Op) -> None:
    """Windows of one position leave an axis as it is: pooling over time beside a feature axis."""
    x, y = op.input(0), op.output()
    if x is None or y is None:
        return
    if op.output(1) is not None:
        op.freeze_all("MaxPool returns positions in the whole tensor")
        return
    for d, dim in enumerate(x.dims):
        if d < 2 or _alone(op, d - 2):
            op.axes.same(dim, y.dims[d])
        else:
            op.freeze(dim, f"{op.node.op_type} reads this axis as a whole")
            op.freeze(y.dims[d], f"{op.node.op_type} reads this axis as a whole")


def _alone(op: Op, k: int) -> bool:
    """Whether every output position of spatial axis `k` is one input position."""
    kernel = op.attr("kernel_shape")
    strides, pads = op.attr("strides") or [1] * len(kernel), op.attr("pads") or [0] * (2 * len(kernel))
    return bool(kernel[k] == strides[k] == 1 and pads[k] == pads[k + len(kernel)] == 0)


register("AveragePool LpPool MaxPool", Rule(_pool, "b c ~ -> b c ~, a window of 1 lets its axis pass", FACTOR))


def _regions(op: Op) -> None:
    """RoiAlign, MaxRoiPool: every region names the image it is cut from."""
    bound = Einsum("b c ~, r ~, r -> r c ~").bind(op)
    if bound:
        op.freeze(bound["b"], f"{op.node.op_type} looks images up")


register("RoiAlign MaxRoiPool", Rule(_regions, "b c ~, r ~, r -> r c ~, b is frozen", FACTOR))
register("GridSample", einsum("b c ~, b ~ -> b c ~", zero=FACTOR))

# how a removed index leaves a reduction over its axis; the others need the whole axis
_LEAVING: dict[str, Leaving] = {
    "ReduceSum": "sum",
    "ReduceL1": "sum",  # |0|, 0^2: a zeroed index adds nothing
    "ReduceL2": "sum",
    "ReduceSumSquare": "sum",
    "ReduceMean": "mean",
    "GlobalLpPool": "sum",
    "GlobalAveragePool": "mean",
    "GlobalMaxPool": "stat",
    "ReduceMax": "stat",  # over the survivors
    "ReduceMin": "stat",
    "ReduceProd": "stat",
    "ReduceLogSum": "stat",
    "ReduceLogSumExp": "stat",
}


def _reduced(op: Op, rank: int) -> set[int] | None:
    """Which dimensions are reduced; None if not known before run time."""
    axes = op.ints(1, "axes")
    if axes is None and op.input(1) is not None:
        return None
    if not axes:
        return set() if op.attr("noop_with_empty_axes", 0) else set(range(rank))
    return None if None in axes else {int(a) % rank for a in axes if a is not None}


def _reduce(op: Op) -> None:
    x, y = op.input(0), op.output()
    if x is None or y is None:
        return
    reduced = _reduced(op, len(x.dims))
    if reduced is None or not x.dims:
        op.freeze_all("reduced over axes known only at run time")
        return
    keepdims = bool(op.attr("keepdims", 1))
    out = 0
    for d, dim in enumerate(x.dims):
        if d not in reduced:
            op.axes.same(dim, y.dims[out])
        elif op.node.op_type in _LEAVING:
            op.flow(dim, [(0, d)], leaving=_LEAVING[op.node.op_type])
        else:
            op.freeze(dim, f"{op.node.op_type} over this axis")
        out += d not in reduced or keepdims


_REDUCE = Rule(_reduce, "kept axes pass, reduced axes are contracted", FACTOR)
register("ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare", _REDUCE)
register("ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp", Rule(_reduce, _REDUCE.text))


def _global_pool(op: Op) -> None:
    """Usually over space, which is frozen elsewhere; after a Reshape it may be the mean of a normalisation."""
    x, y = op.input(0), op.output()
    if x is None or y is None:
        return
    for d, dim in enumerate(x.dims):
        if d < 2:
            op.axes.same(dim, y.dims[d])
        else:
            op.flow(dim, [(0, d)], leaving=_LEAVING[op.node.op_type])


register("GlobalAveragePool GlobalLpPool GlobalMaxPool", Rule(_global_pool, "b c ~ -> b c ~, ~ is contracted", FACTOR))


def _along(op: Op) -> None:
    """Softmax, ArgMax, TopK, CumSum ...: the axis is needed as a whole, or is one of experts; the others pass."""
    x = op.input(0)
    if x is None or not x.dims:
        op.freeze_all(f"{op.node.op_type} of a scalar")
        return
    rank = len(x.dims)
    axis = _axis(op)
    if axis is None:
        op.freeze_all("axis known only at run time")
        return
    first = axis % rank
    coerced = op.node.op_type in _COERCING and op.version < 13
    frozen = set(range(first, rank)) if coerced else {first}
    shared = op.node.op_type in _SHARING and frozen == {first}
    size = x.shape[first]
    chosen = op.node.op_type in _CHOOSING
    if shared or chosen:
        op.choose(first, choice.count(op, size) if chosen else 0, [(0, first)] if shared else [])
    for operand in op.outputs:
        if operand is None:
            continue
        dropped = len(operand.dims) < rank
        out = 0
        for d, dim in enumerate(x.dims):
            if d in frozen and not shared:
                if not chosen:
                    op.freeze(dim, f"{op.node.op_type} runs over this axis")
                if not dropped:
                    op.freeze(operand.dims[out], f"{op.node.op_type} runs over this axis")
            else:
                op.axes.same(dim, operand.dims[out])
            out += not (dropped and d in frozen)


_COERCING = ("Softmax", "LogSoftmax", "Hardmax")
_SHARING = ("Softmax", "LogSoftmax")
_CHOOSING = ("TopK", "ArgMax")


def _axis(op: Op) -> int | None:
    if op.node.op_type in ("CumSum", "CumProd"):
        values = op.ints(1)
        return values[0] if values else None
    default = {"ArgMax": 0, "ArgMin": 0}.get(op.node.op_type, 1 if op.version < 13 else -1)
    return int(op.attr("axis", -1 if op.node.op_type == "TopK" else default))


register("Hardmax ArgMin CumSum CumProd", Rule(_along, "all axes pass but `axis`, which is frozen"))
register(
    "Softmax LogSoftmax ArgMax TopK",
    Rule(_along, "all axes pass but `axis`, which is frozen unless it is one of experts"),
)


def _trilu(op: Op) -> None:
    Einsum("..., ~ -> ...")(op)
    x = op.input(0)
    for dim in x.dims[-2:] if x else ():
        op.freeze(dim, "Trilu compares positions of this axis")


register("Trilu", Rule(_trilu, "leading axes pass, the last two are frozen", FACTOR))


def _reverse_sequence(op: Op) -> None:
    Einsum("..., ~ -> ...")(op)
    x = op.input(0)
    for d in (op.attr("batch_axis", 1), op.attr("time_axis", 0)):
        if x is not None:
            op.freeze(x.dims[int(d)], "ReverseSequence reads this axis as a whole")


register("ReverseSequence", Rule(_reverse_sequence, "all axes pass but batch and time", FACTOR))


def _det(op: Op) -> None:
    x, y = op.input(0), op.output()
    for d, dim in enumerate(x.dims if x is not None else ()):
        if y is not None and d < len(y.dims):
            op.axes.same(dim, y.dims[d])
        else:
            op.freeze(dim, "Det reads whole matrices")


register("Det", Rule(_det, "leading axes pass, the last two are frozen", FACTOR))


def _nothing(op: Op) -> None:
    """Shape, Size: sizes are not coupled with the axes they are read from (the rewrite restores them)."""
    x = op.input(0)
    op.axes.mentioned.update(x.dims if x is not None else ())


register("Shape Size", Rule(_nothing, "reads sizes; keeps returning the original ones", NEVER))
