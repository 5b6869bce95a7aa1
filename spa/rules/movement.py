"""Operators that move, join, cut or repeat positions without computing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from spa.axes import Axis
from spa.rules.base import FACTOR, NEVER, Op, Operand, Rule, Zero, register
from spa.rules.choice import look_up
from spa.rules.notation import Einsum
from spa.rules.reshape import edit_target
from spa.symbols import is_static

PARTS = Zero(all_of="all", parts=True)


def _known(op: Op) -> tuple[Operand, Operand] | None:
    """Input 0 and output 0, or None (everything frozen) if a rank is unknown."""
    x, y = op.input(0), op.output()
    if x is None or y is None:
        op.freeze_all(f"{op.node.op_type} of a tensor of unknown rank")
        return None
    return x, y


def _transpose(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    perm = op.attr("perm") or range(len(x.dims) - 1, -1, -1)
    for out, source in enumerate(perm):
        op.axes.same(y.dims[out], x.dims[source])


register("Transpose", Rule(_transpose, "axes are permuted", FACTOR))


def _concat(op: Op) -> None:
    y = op.output()
    parts = [x for x in op.inputs if x is not None]
    if y is None or len(parts) < len(op.inputs):
        op.freeze_all("Concat of a tensor of unknown rank")
        return
    axis = int(op.attr("axis", 1)) % len(y.dims)
    op.axes.cat(y.dims[axis], [x.dims[axis] for x in parts])
    for x in parts:
        for d, dim in enumerate(x.dims):
            if d != axis:
                _pair(op, x, d, y, d, dim)


def _pair(op: Op, x: Operand, dx: int, y: Operand, dy: int, dim: Axis) -> None:
    """Couple two dimensions that must be equal; one of unknown size freezes the other."""
    if x.shape[dx] == y.shape[dy]:
        op.axes.same(dim, y.dims[dy])
    else:
        op.freeze(dim, f"meets an axis of unknown size in {op.node.op_type}")
        op.freeze(y.dims[dy], f"meets an axis of unknown size in {op.node.op_type}")


register("Concat", Rule(_concat, "out axis = inputs laid end to end", PARTS))


def _split(op: Op) -> None:
    x = op.input(0)
    outputs = [y for y in op.outputs if y is not None]
    if x is None or len(outputs) < len(op.outputs):
        op.freeze_all("Split into tensors of unknown rank")
        return
    axis = int(op.attr("axis", 0)) % len(x.dims)
    for y in outputs:
        for d, dim in enumerate(x.dims):
            if d != axis:
                _pair(op, x, d, y, d, dim)
    if all(is_static(y.shape[axis]) for y in outputs):
        op.axes.cat(x.dims[axis], [y.dims[axis] for y in outputs])
        for k, y in enumerate(outputs):
            op.edit(1 if op.version >= 13 else "split", k, y.dims[axis])
    else:
        for operand in (x, *outputs):
            op.freeze(operand.dims[axis], "Split at positions known only at run time")


register("Split", Rule(_split, "in axis = outputs laid end to end", FACTOR, selects=True))


def _slice(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    starts, ends = op.ints(1, "starts"), op.ints(2, "ends")
    axes = op.ints(3, "axes")
    if axes is None and op.input(3) is None and starts is not None:
        axes = list(range(len(starts)))
    steps = op.ints(4)
    if steps is None and starts is not None:
        steps = [1] * len(starts) if op.input(4) is None else [None] * len(starts)
    if axes is None or None in axes:
        op.freeze_all("Slice over axes known only at run time")
        return
    rank = len(x.dims)
    where = {int(a) % rank: k for k, a in enumerate(axes) if a is not None}
    for d, dim in enumerate(x.dims):
        if d not in where:
            _pair(op, x, d, y, d, dim)
            continue
        k = where[d]
        bounds = None if starts is None or ends is None or steps is None else (starts[k], ends[k], steps[k])
        _slice_axis(op, x, y, d, k, bounds, alone=len(where) == 1)


def _slice_axis(
    op: Op,
    x: Operand,
    y: Operand,
    d: int,
    k: int,
    bounds: tuple[int | None, int | None, int | None] | None,
    alone: bool,
) -> None:
    size = x.shape[d]
    if bounds is None or not isinstance(size, int) or None in bounds:
        if size == y.shape[d] and is_static(size) and bounds is None:
            op.freeze(x.dims[d], "Slice at positions known only at run time")
        op.freeze(x.dims[d], "Slice at positions known only at run time")
        op.freeze(y.dims[d], "Slice at positions known only at run time")
        return
    start, end, step = (int(b) for b in bounds if b is not None)
    index = range(size)[slice(start, None if step < 0 and end < -size else end, step)]
    if len(index) != y.shape[d]:
        op.freeze(x.dims[d], "Slice at positions that do not add up")
        op.freeze(y.dims[d], "Slice at positions that do not add up")
    elif step == 1:
        _window(op, x.dims[d], y.dims[d], size, index.start, index.stop, k)
    elif alone:
        op.axes.take(y.dims[d], x.dims[d], np.array(index, dtype=np.int64))
        op.remap(-1, x.dims[d], y.dims[d])
    else:
        op.freeze(x.dims[d], "Slice with steps over several axes")
        op.freeze(y.dims[d], "Slice with steps over several axes")


def _window(op: Op, source: Axis, target: Axis, size: int, start: int, stop: int, k: int) -> None:
    """target = source[start:stop]: cut the source in three and tie the bounds to the pieces."""
    before, after = op.axes.leaf(start), op.axes.leaf(size - stop)
    op.axes.cat(source, [before, target, after])
    slots: tuple[str | int, str | int] = (1, 2) if op.input(1) is not None else ("starts", "ends")
    if start:
        op.edit(slots[0], k, before, watch=(source,))
    if stop < size:
        op.edit(slots[1], k, before, target, watch=(source,))


register("Slice", Rule(_slice, "in axis = before, out, after; steps take single positions", FACTOR, selects=True))


def _gather(op: Op) -> None:
    x, index, y = op.input(0), op.input(1), op.output()
    if x is None or index is None or y is None:
        op.freeze_all("Gather of a tensor of unknown rank")
        return
    axis = int(op.attr("axis", 0)) % len(x.dims)
    width = len(index.dims)
    for d, dim in enumerate(x.dims):
        if d != axis:
            _pair(op, x, d, y, d if d < axis else d - 1 + width, dim)
    positions = op.ints(1) if index.constant or index.const is not None else None
    size = x.shape[axis]
    if width == 0 and positions in ([0], [-1]) and _only_measured(y.value):
        op.axes.mentioned.add(x.dims[axis])  # both ends exist whatever is removed, and nobody reads the value
        return
    if width != 1 or positions is None or None in positions or not isinstance(size, int):
        if positions is not None or not look_up(op, 1, axis):
            op.freeze(x.dims[axis], "Gather looks positions up")
        for d, dim in enumerate(index.dims):
            _pair(op, index, d, y, axis + d, dim)
        return
    op.axes.same(index.dims[0], y.dims[axis])
    _taken(op, x.dims[axis], y.dims[axis], size, positions)


def _taken(op: Op, source: Axis, out: Axis, size: int, positions: Sequence[int | None]) -> None:
    """Position k of `out` is position `positions[k]` of `source`; input 1 holds them."""
    taken = np.array([int(p) % size for p in positions if p is not None], dtype=np.int64)
    start = int(taken[0]) if len(taken) else 0
    if np.array_equal(taken, np.arange(start, start + len(taken))):
        op.axes.cat(source, [op.axes.leaf(start), out, op.axes.leaf(size - start - len(taken))])
    else:
        op.axes.take(out, source, taken)
    op.remap(1, source, out)


def _only_measured(value: ir.Value) -> bool:
    """Whether only the shape of a value is read."""
    return not value.is_graph_output() and all(n.op_type in ("Shape", "Size") for n, _ in value.uses())


register(
    "Gather",
    Rule(
        _gather,
        "constant indices take positions; looked-up axes are frozen, but for experts of a router",
        FACTOR,
        selects=True,
    ),
)


def _elements(op: Op) -> None:
    """GatherElements, ScatterElements: `axis` is looked up, equal other axes pass. Experts of a router may leave."""
    x, index, y = op.input(0), op.input(1), op.output()
    if x is None or index is None or y is None:
        op.freeze_all(f"{op.node.op_type} of a tensor of unknown rank")
        return
    axis = int(op.attr("axis", 0)) % len(x.dims)
    others = [operand for operand in (op.input(2), y) if operand is not None]
    free = look_up(op, 1, axis)
    for d, dim in enumerate(x.dims):
        if d == axis and free:
            written = op.node.op_type != "GatherElements"
            if written:
                op.axes.same(dim, y.dims[d])
            for operand in (index, op.input(2) if written else y):
                if operand is not None:
                    op.freeze(operand.dims[d], f"{op.node.op_type} looks each of these up")
            continue
        same = d != axis and all(o.shape[d] == x.shape[d] for o in (index, *others))
        for operand in (index, *others):
            if same:
                op.axes.same(dim, operand.dims[d])
            else:
                op.freeze(operand.dims[d], f"{op.node.op_type} looks positions up")
        if not same:
            op.freeze(dim, f"{op.node.op_type} looks positions up")


register(
    "GatherElements ScatterElements Scatter",
    Rule(_elements, "all axes pass but `axis`, which is frozen unless it is one of experts"),
)


def _gather_nd(op: Op) -> None:
    x, index, y = op.input(0), op.input(1), op.output()
    if x is None or index is None or y is None or not is_static(index.shape[-1]):
        op.freeze_all("GatherND of a tensor of unknown rank")
        return
    batch = int(op.attr("batch_dims", 0))
    depth = index.shape[-1]
    op.freeze(index.dims[-1], "GatherND reads coordinates")
    positions, size = op.ints(1), x.shape[0]
    if (
        not batch
        and depth == 1
        and len(index.dims) == 2
        and positions
        and None not in positions
        and isinstance(size, int)
    ):
        # x[idx]: constant positions along the first axis, as in Gather
        op.axes.same(index.dims[0], y.dims[0])
        _taken(op, x.dims[0], y.dims[0], size, positions)
        for dim, out in zip(x.dims[1:], y.dims[1:], strict=True):
            op.axes.same(dim, out)
        return
    for d in range(len(x.dims)):
        if d < batch:
            op.axes.same(x.dims[d], index.dims[d])
            op.axes.same(x.dims[d], y.dims[d])
        elif d < batch + depth:
            if batch or depth > 1 or positions is not None or not look_up(op, 1, d):
                op.freeze(x.dims[d], "GatherND looks positions up")
        else:
            op.axes.same(x.dims[d], y.dims[len(index.dims) - 1 + d - batch - depth])
    for d in range(batch, len(index.dims) - 1):
        op.axes.same(index.dims[d], y.dims[d])


register(
    "GatherND", Rule(_gather_nd, "looked-up axes are frozen, trailing axes pass; as Gather for x[constant]", FACTOR)
)


def _scatter_nd(op: Op) -> None:
    x, index, updates, y = op.input(0), op.input(1), op.input(2), op.output()
    if x is None or index is None or updates is None or y is None or not is_static(index.shape[-1]):
        op.freeze_all("ScatterND of a tensor of unknown rank")
        return
    depth = index.shape[-1]
    op.freeze(index.dims[-1], "ScatterND reads coordinates")
    for d, dim in enumerate(x.dims):
        op.axes.same(dim, y.dims[d])
        if d < depth:
            op.freeze(dim, "ScatterND writes at positions")
        else:
            op.axes.same(dim, updates.dims[len(index.dims) - 1 + d - depth])
    for d in range(len(index.dims) - 1):
        op.freeze(index.dims[d], "ScatterND writes each of these")
        op.freeze(updates.dims[d], "ScatterND writes each of these")


register("ScatterND", Rule(_scatter_nd, "written axes are frozen, trailing axes pass", Zero(all_of=(0, 2))))


def _pad(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    rank = len(x.dims)
    pads = op.ints(1, "pads")
    axes = op.ints(3) if op.input(3) is not None else list(range(rank))
    if axes is None or None in axes:
        op.freeze_all("Pad over axes known only at run time")
        return
    where = {int(a) % rank: k for k, a in enumerate(axes) if a is not None}
    slot: str | int = 1 if op.input(1) is not None else "pads"
    for d in range(rank):
        k = where.get(d)
        low, high = (0, 0) if k is None else (None, None) if pads is None else (pads[k], pads[k + len(where)])
        if low == 0 and high == 0:
            op.axes.same(x.dims[d], y.dims[d])
        elif low is None or high is None or low < 0 or high < 0 or op.attr("mode", "constant") != "constant":
            op.freeze(x.dims[d], "Pad reads this axis")
            op.freeze(y.dims[d], "Pad reads this axis")
        elif k is not None and is_static(x.shape[d]):
            before, after = op.axes.leaf(low), op.axes.leaf(high)
            op.axes.cat(y.dims[d], [before, x.dims[d], after])
            op.edit(slot, k, before)
            op.edit(slot, k + len(where), after)


def _padded(op: Op) -> Zero:
    """What is added is zero, or a copy of what is there."""
    if op.attr("mode", "constant") != "constant":
        return FACTOR
    value = op.input(2)
    fill = op.attr("value", 0.0) if value is None else None if value.const is None else value.const.reshape(-1)[0]
    return PARTS if fill == 0 else NEVER


register("Pad", Rule(_pad, "out axis = before, in, after", _padded))


def _tensor_scatter(op: Op) -> None:
    """Writes new tokens into a cache along `axis`."""
    x, update, where, y = op.input(0), op.input(1), op.input(2), op.output()
    if x is None or update is None or y is None:
        op.freeze_all("TensorScatter of a tensor of unknown rank")
        return
    axis = int(op.attr("axis", -2)) % len(x.dims)
    for d, dim in enumerate(x.dims):
        op.axes.same(dim, y.dims[d])
        if d == axis:
            op.freeze(dim, "TensorScatter writes at positions")
            op.freeze(update.dims[d], "TensorScatter writes at positions")
        else:
            _pair(op, update, d, x, d, update.dims[d])
    if where is not None:
        _pair(op, where, 0, x, 0, where.dims[0])


register("TensorScatter", Rule(_tensor_scatter, "all axes pass but `axis`, which is frozen", Zero(all_of=(0, 1))))


def _one_axis(op: Op) -> None:
    """Compress, CenterCropPad: all axes pass but those that are cut at run time."""
    if (xy := _known(op)) is None:
        return
    x, y = xy
    chosen = op.attr("axes") if op.node.op_type == "CenterCropPad" else [op.attr("axis")]
    if chosen is None or None in chosen or len(x.dims) != len(y.dims):
        op.freeze_all(f"{op.node.op_type} over all axes")
        return
    cut = {int(a) % len(x.dims) for a in chosen}
    for d, dim in enumerate(x.dims):
        if d not in cut:
            _pair(op, x, d, y, d, dim)
        else:
            op.freeze(dim, f"{op.node.op_type} cuts this axis")
            op.freeze(y.dims[d], f"{op.node.op_type} cuts this axis")


register("Compress CenterCropPad", Rule(_one_axis, "all axes pass but `axis` (`axes`), which are frozen", FACTOR))


def _expand(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    shift = len(y.dims) - len(x.dims)
    for d, dim in enumerate(x.dims):
        if x.shape[d] != 1:
            _pair(op, x, d, y, d + shift, dim)
    target = op.input(1)
    missing = len(y.dims) - target.shape[0] if target is not None and is_static(target.shape[0]) else 0
    _edit_sizes(op, 1, y.dims[missing:])


def _edit_sizes(op: Op, slot: int, dims: Sequence[Axis]) -> None:
    """As for Reshape, but an entry of 1 stays 1 (it broadcasts)."""
    operand = op.input(slot)
    for k, dim in enumerate(dims):
        entry = operand.const.reshape(-1)[k] if operand is not None and operand.const is not None else None
        if entry is None:
            op.freeze(dim, f"{op.node.op_type} to a size known only at run time")
        elif entry != 1:
            op.edit(slot, k, dim)


register("Expand", Rule(_expand, "axes pass; a stretched axis is free, its size is edited", FACTOR))


def _tile(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    repeats = op.ints(1)
    for d, dim in enumerate(x.dims):
        count = repeats[d] if repeats is not None else None
        if count is None or count < 1:
            op.freeze(dim, "Tile known only at run time")
            op.freeze(y.dims[d], "Tile known only at run time")
        else:
            copies = op.axes.leaf(count)
            op.axes.prod(y.dims[d], [copies, dim])
            op.edit(1, d, copies)


register("Tile", Rule(_tile, "out axis = repeats x in axis", FACTOR))


def _constant_of_shape(op: Op) -> None:
    y = op.output()
    if y is not None:
        edit_target(op, 0, y.dims)


def _filled_with_zero(op: Op) -> Zero:
    fill = op.attr("value")
    return NEVER if fill is not None and fill.numpy().any() else Zero()


register("ConstantOfShape", Rule(_constant_of_shape, "free axes, their sizes are edited", _filled_with_zero))


def _depth_to_space(op: Op) -> None:
    n = int(op.attr("blocksize"))
    packed = f"c {n} {n}" if op.attr("mode", "DCR") == "CRD" else f"{n} {n} c"
    Einsum(f"b ({packed}) h w -> b c (h {n}) (w {n})")(op)


def _space_to_depth(op: Op) -> None:
    n = int(op.attr("blocksize"))
    packed = f"c {n} {n}" if op.attr("mode", "DCR") == "CRD" else f"{n} {n} c"
    Einsum(f"b c (h {n}) (w {n}) -> b ({packed}) h w")(op)


register("DepthToSpace", Rule(_depth_to_space, "b (n n c) h w -> b c (h n) (w n)", FACTOR))
register("SpaceToDepth", Rule(_space_to_depth, "b c (h n) (w n) -> b (n n c) h w", FACTOR))


def _resize(op: Op) -> None:
    if (xy := _known(op)) is None:
        return
    x, y = xy
    sizes = 3 if op.node.op_type == "Resize" else -1
    axes = [int(a) % len(x.dims) for a in op.attr("axes") or range(len(x.dims))]
    for d, dim in enumerate(x.dims):
        if x.shape[d] != y.shape[d]:
            op.freeze(dim, f"{op.node.op_type} interpolates over this axis")
            op.freeze(y.dims[d], f"{op.node.op_type} interpolates over this axis")
            continue
        op.axes.same(dim, y.dims[d])
        if d in axes and op.input(sizes) is not None and sizes > 0:
            entries = op.ints(sizes)
            if entries is None or entries[axes.index(d)] is None:
                op.freeze(dim, f"{op.node.op_type} to a size known only at run time")
            else:
                op.edit(sizes, axes.index(d), dim)


register("Resize Upsample", Rule(_resize, "axes that keep their size pass, the others are frozen", FACTOR))
register(
    "Constant EyeLike Range",
    Rule(lambda op: op.freeze_all(f"{op.node.op_type} makes this axis"), "frozen", NEVER),
)
