"""Small known values: what becomes of shapes and other short tensors on their way through a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.shapes import arithmetic as on
from spa.shapes.basic import bounds
from spa.shapes.movement import positions, slice_operands
from spa.shapes.op import FLOATS, Const, Item, Op, Table, axis_of, count_of, fits, static
from spa.symbols import is_static, product

VALUES = Table()


def _room(op: Op) -> tuple[tuple[int, ...], ir.DataType] | None:
    """Shape and type of the first output if its value is worth following."""
    dims, dtype = static(op.outs[0] if op.outs else None), op.dtypes[0] if op.dtypes else None
    return None if dims is None or dtype is None or not fits(count_of(dims), dtype) else (dims, dtype)


def _spread(const: Const, dims: tuple[int, ...]) -> list[Any]:
    """The items broadcast to a shape."""
    if const.dims == dims:
        return const.items
    if len(const.items) == 1:
        return const.items * count_of(dims)
    return np.broadcast_to(const.array(), dims).reshape(-1).tolist()


# --- pointwise -------------------------------------------------------------------------------------------------------


def _fold(function: on.Binary) -> Callable[[Op], Const | None]:
    """The rule of an operator of two or more operands."""

    def apply(op: Op) -> Const | None:
        room = _room(op)
        if room is None:
            return None
        dims, dtype = room
        out: list[Any] | None = None
        for slot in range(len(op.inputs)):
            const = op.const(slot)
            if const is None:
                return None
            items = _spread(const, dims)
            out = items if out is None else [function(a, b) for a, b in zip(out, items, strict=True)]
        return None if out is None else Const(dims, [on.fit(item, dtype) for item in out], dtype)

    return apply


def _each(function: on.Unary) -> Callable[[Op], Const | None]:
    """The rule of an operator of one operand."""

    def apply(op: Op) -> Const | None:
        const, dtype = op.const(), op.dtypes[0]
        if const is None or dtype is None:
            return None
        return Const(const.dims, [on.fit(function(item), dtype) for item in const.items], dtype)

    return apply


for _names, _binary in {
    "Add Sum": on.add,
    "Sub": on.sub,
    "Mul": on.mul,
    "Pow": on.power,
    "Min": on.smaller,
    "Max": on.larger,
    "Equal": on.equal,
    "Greater": on.greater,
    "Less": on.less,
    "GreaterOrEqual": on.at_least,
    "LessOrEqual": on.at_most,
    "And": on.both,
    "Or": on.either,
    "Xor": on.differs,
}.items():
    VALUES.add(_names, _fold(_binary))
for _names, _unary in {
    "Neg": on.negative,
    "Abs": on.absolute,
    "Not": on.negated,
    "Floor": on.floor,
    "Ceil": on.ceil,
    "Round": on.nearest,
    "Sqrt": on.root,
    "Reciprocal": on.inverse,
    "Sign": on.sign,
    "Relu": on.positive,
}.items():
    VALUES.add(_names, _each(_unary))

_INT_DIV, _FLOAT_DIV = _fold(on.int_div), _fold(on.float_div)
_MOD, _FMOD = _fold(on.mod), _fold(on.fmod)


@VALUES.rule("Div")
def _div(op: Op) -> Const | None:
    return _FLOAT_DIV(op) if op.dtypes[0] in FLOATS else _INT_DIV(op)


@VALUES.rule("Mod")
def _mod(op: Op) -> Const | None:
    return _FMOD(op) if op.attr("fmod", 0) else _MOD(op)


@VALUES.rule("Cast CastLike")
def _cast(op: Op) -> Const | None:
    const, dtype = op.const(), op.dtypes[0]
    if const is None or dtype is None or not fits(len(const.items), dtype):
        return None
    return Const(const.dims, [on.cast(item, dtype) for item in const.items], dtype)


@VALUES.rule("Where")
def _where(op: Op) -> Const | None:
    room = _room(op)
    condition, yes, no = (op.const(k) for k in range(3))
    if room is None or yes is None or no is None:
        return None
    dims, dtype = room
    flags = _spread(condition, dims) if condition is not None else [None] * count_of(dims)
    pairs = zip(flags, _spread(yes, dims), _spread(no, dims), strict=True)
    return Const(dims, [(a if a == b else None) if f is None else a if f else b for f, a, b in pairs], dtype)


@VALUES.rule("Clip")
def _clip(op: Op) -> Const | None:
    const = op.const()
    if const is None or op.attr("min") is not None or op.attr("max") is not None:
        return None
    items = const.items
    for slot, function in ((1, on.larger), (2, on.smaller)):
        if op.has(slot):
            limit = op.const(slot)
            items = [function(item, limit.items[0] if limit and limit.items else None) for item in items]
    return const.like([on.fit(item, const.dtype) for item in items])


@VALUES.rule("IsNaN")
def _is_nan(op: Op) -> Const | None:
    const = op.const()
    if const is None:
        return None
    return Const(const.dims, [None if item is None else item != item for item in const.items], ir.DataType.BOOL)


# --- from shapes -----------------------------------------------------------------------------------------------------


@VALUES.rule("Shape")
def _shape(op: Op) -> Const | None:
    x = op.shape()
    if x is None:
        return None
    items = list(x[bounds(op, len(x))])
    return Const((len(items),), items, ir.DataType.INT64)


@VALUES.rule("Size")
def _size(op: Op) -> Const | None:
    x = op.shape()
    return None if x is None else Const((), [product(x)], ir.DataType.INT64)


@VALUES.rule("ConstantOfShape")
def _constant_of_shape(op: Op) -> Const | None:
    room = _room(op)
    if room is None:
        return None
    dims, dtype = room
    tensor = op.attr("value")
    fill = 0.0 if tensor is None else tensor.numpy().reshape(-1).tolist()[0]
    return Const(dims, [fill] * count_of(dims), dtype)


@VALUES.rule("Range")
def _range(op: Op) -> Const | None:
    limits = [op.ints(k) for k in range(3)]
    dtype = op.dtypes[0]
    if dtype is None or dtype in FLOATS or any(not limit for limit in limits):
        return None
    start, stop, step = (limit[0] for limit in limits if limit)
    if step == 0 or not fits(len(span := range(start, stop, step)), dtype):
        return None
    return Const((len(span),), list(span), dtype)


# --- same items, other shape -----------------------------------------------------------------------------------------


@VALUES.rule("Identity Reshape Squeeze Unsqueeze Flatten")
def _renamed(op: Op) -> Const | None:
    const = op.const()
    if const is None:
        return None
    dims = const.dims if op.node.op_type == "Identity" else static(op.outs[0])
    if dims is None or count_of(dims) != len(const.items):
        return None
    return Const(dims, const.items, const.dtype)


def _moved(const: Const, array: NDArray[Any]) -> Const | None:
    return Const.of(array, const.dtype) if fits(array.size, const.dtype) else None


@VALUES.rule("Transpose")
def _transpose(op: Op) -> Const | None:
    const = op.const()
    if const is None or len(const.dims) < 2:
        return const
    return _moved(const, const.array().transpose(op.attr("perm")))


@VALUES.rule("Expand")
def _expand(op: Op) -> Const | None:
    const, room = op.const(), _room(op)
    return None if const is None or room is None else Const(room[0], _spread(const, room[0]), const.dtype)


@VALUES.rule("Tile")
def _tile(op: Op) -> Const | None:
    const, repeats, room = op.const(), op.ints(1), _room(op)
    return None if const is None or repeats is None or room is None else _moved(const, np.tile(const.array(), repeats))


@VALUES.rule("Concat")
def _concat(op: Op) -> Const | None:
    parts = [op.const(k) for k in range(len(op.inputs))]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if all(len(part.dims) == 1 for part in known):
        items = [item for part in known for item in part.items]
        return Const((len(items),), items, known[0].dtype) if fits(len(items), known[0].dtype) else None
    return _moved(known[0], np.concatenate([part.array() for part in known], axis=op.attr("axis", 1)))


@VALUES.rule("Split")
def _split(op: Op) -> list[Const | None] | Const | None:
    const = op.const()
    axis = None if const is None else axis_of(op.attr("axis", 0), len(const.dims))
    sizes = [static(shape) for shape in op.outs]
    if const is None or axis is None or any(dims is None for dims in sizes):
        return None
    ends = np.cumsum([dims[axis] for dims in sizes if dims is not None])
    return [_moved(const, part) for part in np.split(const.array(), ends[:-1], axis=axis)]


@VALUES.rule("Slice")
def _slice(op: Op) -> Const | None:
    const = op.const()
    if const is None:
        return None
    starts, ends, axes, steps = slice_operands(op)
    if starts is None or ends is None or steps is None or (op.has(3) and axes is None):
        return None
    picks = [range(n) for n in const.dims]
    for k, axis in enumerate(range(len(starts)) if axes is None else axes):
        start, end, step = starts[k], ends[k], steps[k]
        place = axis_of(axis, len(const.dims))
        if place is None or type(start) is not int or type(end) is not int or type(step) is not int or step == 0:
            return None
        picks[place] = positions(const.dims[place], start, end, step)
    if len(picks) == 1:
        return Const((len(picks[0]),), [const.items[k] for k in picks[0]], const.dtype)
    return _moved(const, const.array()[np.ix_(*picks)])


# --- picking and placing ---------------------------------------------------------------------------------------------


def _indices(op: Op, slot: int) -> NDArray[np.int64] | None:
    """A completely known index tensor."""
    const = op.const(slot)
    if const is None or not const.static():
        return None
    return np.array(const.items, dtype=np.int64).reshape(const.dims)


@VALUES.rule("Gather")
def _gather(op: Op) -> Const | None:
    const, index = op.const(), op.const(1)
    axis = None if const is None else axis_of(op.attr("axis", 0), len(const.dims))
    if const is None or index is None or axis is None:
        return None
    size = const.dims[axis]
    if len(const.dims) == 1:
        return Const(index.dims, [_at(const.items, k) for k in index.items], const.dtype)
    if not all(type(k) is int and -size <= k < size for k in index.items):
        return None
    count = count_of(const.dims) // max(size, 1) * len(index.items)
    return (
        _moved(const, np.take(const.array(), index.array().astype(np.int64), axis))
        if fits(count, const.dtype)
        else None
    )


def _at(items: list[Any], position: Item) -> Item:
    known = type(position) is int and -len(items) <= position < len(items)
    return items[position] if known else None  # type: ignore[index]  # a plain number if `known`


@VALUES.rule("GatherElements")
def _gather_elements(op: Op) -> Const | None:
    const, index = op.const(), _indices(op, 1)
    if const is None or index is None:
        return None
    return _moved(const, np.take_along_axis(const.array(), index, axis=op.attr("axis", 0)))


@VALUES.rule("GatherND")
def _gather_nd(op: Op) -> Const | None:
    const, index = op.const(), _indices(op, 1)
    if const is None or index is None or op.attr("batch_dims", 0):
        return None
    picked = const.array()[tuple(np.moveaxis(index, -1, 0))]
    return _moved(const, np.asarray(picked, dtype=object))


@VALUES.rule("ScatterND")
def _scatter_nd(op: Op) -> Const | None:
    const, index, updates = op.const(), _indices(op, 1), op.const(2)
    if const is None or index is None or updates is None or op.attr("reduction", "none") != "none":
        return None
    out = const.array()
    out[tuple(np.moveaxis(index, -1, 0))] = updates.array()
    return _moved(const, out)


@VALUES.rule("ScatterElements Scatter")
def _scatter_elements(op: Op) -> Const | None:
    const, index, updates = op.const(), _indices(op, 1), op.const(2)
    if const is None or index is None or updates is None or op.attr("reduction", "none") != "none":
        return None
    out = const.array()
    np.put_along_axis(out, index, updates.array(), axis=op.attr("axis", 0))
    return _moved(const, out)


@VALUES.rule("OneHot")
def _one_hot(op: Op) -> Const | None:
    """Exporters build the repeats of `repeat_interleave` with it."""
    index, depth, values, room = _indices(op, 0), op.ints(1), op.const(2), _room(op)
    if index is None or not depth or values is None or room is None:
        return None
    axis = axis_of(op.attr("axis", -1), index.ndim + 1)
    if axis is None:
        return None
    hot = np.expand_dims(np.where(index < 0, index + depth[0], index), axis)
    count = np.arange(depth[0]).reshape([-1 if d == axis else 1 for d in range(index.ndim + 1)])
    other, at = values.items
    return Const(room[0], [at if flag else other for flag in (hot == count).reshape(-1).tolist()], room[1])


@VALUES.rule("NonZero")
def _non_zero(op: Op) -> Const | None:
    const = op.const()
    if const is None or not const.static() or not const.dims:
        return None
    return Const.of(np.array(np.nonzero(const.array().astype(bool)), dtype=object), ir.DataType.INT64)


# --- reductions ------------------------------------------------------------------------------------------------------


def _reduction(function: on.Binary, empty: Item) -> Callable[[Op], Const | None]:
    """The rule of a reduction by an associative operation."""

    def apply(op: Op) -> Const | None:
        const, room = op.const(), _room(op)
        axes = op.ints(1, "axes")
        if const is None or room is None or (axes is None and op.has(1)):
            return None
        if not axes and op.attr("noop_with_empty_axes", 0):
            return const
        rank = len(const.dims)
        gone = sorted(k for k in (axis_of(a, rank) for a in axes or range(rank)) if k is not None)
        kept = [k for k in range(rank) if k not in gone]
        rows = const.array().transpose(kept + gone).reshape(count_of([const.dims[k] for k in kept]), -1).tolist()
        items = [reduce(function, row) if row else empty for row in rows]
        return Const(room[0], [on.fit(item, room[1]) for item in items], room[1])

    return apply


VALUES.add("ReduceProd", _reduction(on.mul, 1))
VALUES.add("ReduceSum", _reduction(on.add, 0))
VALUES.add("ReduceMax", _reduction(on.larger, None))
VALUES.add("ReduceMin", _reduction(on.smaller, None))


@VALUES.rule("CumSum")
def _cum_sum(op: Op) -> Const | None:
    const, axis = op.const(), op.ints(1)
    if const is None or not axis or const.dtype in FLOATS or not all(map(is_static, const.items)):
        return None
    array = np.array(const.items, dtype=np.int64).reshape(const.dims)
    back = bool(op.attr("reverse", 0))
    array = np.flip(array, axis[0]) if back else array
    total = array.cumsum(axis[0]) - (array if op.attr("exclusive", 0) else 0)
    return Const.of(np.flip(total, axis[0]) if back else total, const.dtype)
