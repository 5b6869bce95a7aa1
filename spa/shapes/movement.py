"""Shapes of operators that only move elements."""

from __future__ import annotations

from collections.abc import Sequence

from spa.shapes.basic import joint, listed
from spa.shapes.op import Item, Op, Result, Shape, Table, axis_of, merge
from spa.symbols import Size, Sym, broadcast, exact_div, low, maximum, minimum, product

SHAPES = Table()
_FAR = 2**31 - 1
"""Exporters write this, or more, for "to the end"."""


@SHAPES.rule("Transpose")
def _transpose(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return None
    order = op.attr("perm")
    if order is None:
        return x[::-1]
    return tuple(x[k] for k in order) if sorted(order) == list(range(len(x))) else None


@SHAPES.rule("Reshape")
def _reshape(op: Op) -> Result:
    x, target = op.shape(), op.items(1, "shape")
    if target is None:
        return listed(op, 1)
    dims: list[Size | None] = []
    inferred = None
    for k, item in enumerate(target):
        if item == 0 and not op.attr("allowzero", 0):
            dims.append(x[k] if x is not None and k < len(x) else None)
            continue
        if item == -1 and inferred is None:
            inferred = k
        bottom = low(item) if isinstance(item, int | Sym) else None
        dims.append(None if bottom is None or bottom < 0 or isinstance(item, float) else item)
    return _completed(op, x, dims, inferred)


def _completed(op: Op, x: Shape | None, dims: list[Size | None], inferred: int | None) -> Shape:
    """One unknown dim follows from the number of elements."""
    if dims.count(None) == 1 and x is not None:
        missing = dims.index(None)
        total, rest = product(x), product(d for d in dims if d is not None)
        size = exact_div(total, rest)
        if size is None and missing == inferred and rest != 0:
            size = total // rest
        dims[missing] = size
    return tuple(op.fresh() if d is None else d for d in dims)


@SHAPES.rule("Flatten")
def _flatten(op: Op) -> Result:
    x, axis = op.shape(), op.attr("axis", 1)
    if x is None:
        return op.unknown(2)
    axis = axis + len(x) if axis < 0 else axis
    return (product(x[:axis]), product(x[axis:]))


@SHAPES.rule("Squeeze")
def _squeeze(op: Op) -> Result:
    x, axes = op.shape(), op.ints(1, "axes")
    if x is None:
        return None
    if axes is None:
        if op.has(1):
            count = op.shape(1)
            known = count[0] if count else 1
            return op.unknown(max(len(x) - known, 0)) if count is not None and isinstance(known, int) else None
        # a symbol might be 1, too
        return tuple(d for d in x if d != 1) if all(isinstance(d, int) or _above_one(d) for d in x) else None
    marked = {axis_of(a, len(x)) for a in axes}
    return None if None in marked else tuple(d for k, d in enumerate(x) if k not in marked)


def _above_one(size: Size) -> bool:
    bottom = low(size)
    return bottom is not None and bottom > 1


@SHAPES.rule("Unsqueeze")
def _unsqueeze(op: Op) -> Result:
    x, axes = op.shape(), op.ints(1, "axes")
    if x is None:
        return None
    if axes is None:
        count = op.shape(1)
        known = count[0] if count else 1
        return op.unknown(len(x) + known) if count is not None and isinstance(known, int) else None
    rank = len(x) + len(axes)
    marked = {axis_of(a, rank) for a in axes}
    if None in marked or len(marked) != len(axes):
        return None
    rest = iter(x)
    return tuple(1 if k in marked else next(rest) for k in range(rank))


@SHAPES.rule("Concat")
def _concat(op: Op) -> Result:
    shapes = [shape for shape in op.shapes if shape is not None]
    if not shapes:
        return None
    out = list(shapes[0])
    axis = axis_of(op.attr("axis", 1), len(out))
    if axis is None or any(len(shape) != len(out) for shape in shapes):
        return None
    for shape in shapes[1:]:
        for k, d in enumerate(shape):
            out[k] = out[k] + d if k == axis else merge(out[k], d)
    if len(shapes) < len(op.shapes):
        out[axis] = op.fresh()
    return tuple(out)


@SHAPES.rule("Split")
def _split(op: Op) -> Result:
    x, count = op.shape(), len(op.node.outputs)
    axis = None if x is None else axis_of(op.attr("axis", 0), len(x))
    if x is None or axis is None:
        return None
    sizes = op.items(1, "split")
    parts: list[Size]
    if sizes is not None:
        parts = [op.size(item) for item in sizes]
        if len(parts) != count:
            return None
    elif op.has(1):
        parts = [op.fresh() for _ in range(count)]
    else:
        parts = equal_parts(x[axis], count, op.version)
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


def equal_parts(size: Size, count: int, version: int) -> list[Size]:
    """The default of Split: since opset 18 the last part may be smaller."""
    part = exact_div(size, count)
    if part is None and version < 18:
        part = size // count
    if part is not None:
        return [part] * count
    part = (size + count - 1) // count
    return [*[part] * (count - 1), size - part * (count - 1)]


@SHAPES.rule("Slice")
def _slice(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return None
    starts, ends, axes, steps = slice_operands(op)
    if op.has(3) and axes is None:
        return op.unknown(len(x))
    if axes is None:
        count = len(starts) if starts is not None else len(ends) if ends is not None else len(x)
        axes = list(range(count))
    out = list(x)
    for n, a in enumerate(axes):
        axis = axis_of(a, len(x))
        if axis is None:
            return None
        start, end = (items[n] if items is not None and n < len(items) else None for items in (starts, ends))
        step = steps[n] if steps is not None and n < len(steps) else None
        size = span(x[axis], start, end, step)
        out[axis] = op.fresh() if size is None else size
    return tuple(out)


def slice_operands(op: Op) -> tuple[list[Item] | None, list[Item] | None, list[int] | None, list[Item] | None]:
    """Starts, ends, axes (None: not known, or the first ones) and steps."""
    starts, ends = op.items(1, "starts"), op.items(2, "ends")
    axes = op.ints(3, "axes")
    ones: list[Item] = [1] * len(axes if axes is not None else starts or ends or ())
    steps = op.items(4) if op.has(4) else ones
    return starts, ends, axes, steps


def span(size: Size, start: Item, end: Item, step: Item) -> Size | None:
    """The length of a slice, None if it is not known."""
    if type(step) is not int or step == 0 or isinstance(start, float) or isinstance(end, float):
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(positions(size, start, end, step))
    if step < 0:
        whole = step == -1 and start == -1 and isinstance(end, int) and end <= -_FAR
        return size if whole else None
    first, last = _position(size, start), _position(size, end)
    if first is None or last is None:
        return None
    length = maximum(last - first, 0)
    return length if step == 1 else (length + step - 1) // step


def positions(size: int, start: int, end: int, step: int) -> range:
    """What a slice picks. ONNX clamps as numpy does, but adds the size to a negative end whatever the step's sign."""
    first = start + size if start < 0 else start
    last = end + size if end < 0 else end
    if step > 0:
        return range(min(max(first, 0), size), min(max(last, 0), size), step)
    return range(min(max(first, 0), size - 1), min(max(last, -1), size - 1), step)


def _position(size: Size, item: Item) -> Size | None:
    """Where a slice with positive step begins or ends."""
    if isinstance(item, int):
        if item >= _FAR:
            return size
        if item <= -_FAR:
            return 0
        return minimum(item, size) if item >= 0 else maximum(size + item, 0)
    if isinstance(item, Sym):
        bottom = low(item)
        return None if bottom is None or bottom < 0 else minimum(item, size)
    return None


# --- picking ---------------------------------------------------------------------------------------------------------


@SHAPES.rule("Gather")
def _gather(op: Op) -> Result:
    x, index = op.shape(0), op.shape(1)
    axis = None if x is None else axis_of(op.attr("axis", 0), len(x))
    if x is None or index is None or axis is None:
        return None
    return (*x[:axis], *index, *x[axis + 1 :])


SHAPES.add("GatherElements", lambda op: op.shape(1))


@SHAPES.rule("GatherND")
def _gather_nd(op: Op) -> Result:
    x, index, batch = op.shape(0), op.shape(1), op.attr("batch_dims", 0)
    if x is None or not index or not isinstance(index[-1], int):
        return None
    return (*index[:-1], *x[batch + index[-1] :])


@SHAPES.rule("Compress")
def _compress(op: Op) -> Result:
    x, axis = op.shape(), op.attr("axis")
    if axis is None:
        return (op.fresh(),)
    k = None if x is None else axis_of(axis, len(x))
    return None if x is None or k is None else (*x[:k], op.fresh(), *x[k + 1 :])


@SHAPES.rule("Unique")
def _unique(op: Op) -> Result:
    x, axis, count = op.shape(), op.attr("axis"), op.fresh()
    y: Shape | None = (count,)
    if axis is not None:
        k = None if x is None else axis_of(axis, len(x))
        y = None if x is None or k is None else (*x[:k], count, *x[k + 1 :])
    inverse: Shape = (op.fresh(),) if x is None else (product(x),) if axis is None else (x[axis],)
    return [y, (count,), inverse, (count,)][: len(op.node.outputs)]


SHAPES.add("ReverseSequence", lambda op: op.shape())


# --- repeating -------------------------------------------------------------------------------------------------------


@SHAPES.rule("Expand")
def _expand(op: Op) -> Result:
    x, target = op.shape(), op.items(1)
    if x is None:
        return None
    if target is None:
        rank = op.shape(1)
        return op.unknown(max(rank[0], len(x))) if rank and isinstance(rank[0], int) else None
    padded: Sequence[Size] = (*[1] * (len(target) - len(x)), *x)
    wanted = [1] * (len(padded) - len(target)) + list(target)
    return tuple(_expanded(op, d, item) for d, item in zip(padded, wanted, strict=True))


def _expanded(op: Op, size: Size, item: Item) -> Size:
    bottom = low(item) if isinstance(item, int | Sym) else None
    if isinstance(item, int | Sym) and bottom is not None and bottom >= 0:
        merged = joint([(size,), (item,)])
        return merged[0] if merged else broadcast(size, item)
    return size if isinstance(size, int) and size > 1 else op.fresh()


@SHAPES.rule("Tile")
def _tile(op: Op) -> Result:
    x, repeats = op.shape(), op.items(1)
    if x is None:
        return None
    if repeats is None or len(repeats) != len(x):
        return op.unknown(len(x))
    return tuple(d * op.size(n) for d, n in zip(x, repeats, strict=True))


@SHAPES.rule("Pad")
def _pad(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return None
    pads, axes = op.items(1, "pads"), op.ints(3) if op.has(3) else list(range(len(x)))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return op.unknown(len(x))
    out = list(x)
    for k, a in enumerate(axes):
        axis, left, right = axis_of(a, len(x)), pads[k], pads[k + len(axes)]
        if axis is None:
            return None
        if isinstance(left, int | Sym) and isinstance(right, int | Sym):
            out[axis] = out[axis] + left + right
        else:
            out[axis] = op.fresh()
    return tuple(out)


@SHAPES.rule("DepthToSpace")
def _depth_to_space(op: Op) -> Result:
    return _blocks(op, 1)


@SHAPES.rule("SpaceToDepth")
def _space_to_depth(op: Op) -> Result:
    return _blocks(op, -1)


def _blocks(op: Op, sign: int) -> Shape | None:
    x, block = op.shape(), op.attr("blocksize", 1)
    if x is None or len(x) != 4:
        return None
    if sign > 0:
        return (x[0], x[1] // (block * block), x[2] * block, x[3] * block)
    return (x[0], x[1] * (block * block), x[2] // block, x[3] // block)
