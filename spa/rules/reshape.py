"""Reshape and its relatives: which runs of input dimensions make up which runs of output dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from spa.axes import Axis
from spa.rules.base import FACTOR, Op, Operand, Rule, register
from spa.symbols import Size, exact_div

Segment = tuple[list[int], list[int]]
"""Input dimensions and output dimensions with equal products."""


def segments(xs: Sequence[Size], ys: Sequence[Size]) -> tuple[list[Segment], Segment]:
    """Match runs of dimensions with equal products, from the right, then from the left; and what is left over.

    >>> segments([2, 12, 64], [2, 768])
    ([([0], [0]), ([1, 2], [1])], ([], []))
    """
    i, j = len(xs), len(ys)
    right: list[Segment] = []
    while i and j and (found := _segment([xs[k] for k in range(i - 1, -1, -1)], [ys[k] for k in range(j - 1, -1, -1)])):
        right.append((list(range(i - found[0], i)), list(range(j - found[1], j))))
        i, j = i - found[0], j - found[1]
    left: list[Segment] = []
    a = b = 0
    while a < i and b < j and (found := _segment(xs[a:i], ys[b:j])):
        left.append((list(range(a, a + found[0])), list(range(b, b + found[1]))))
        a, b = a + found[0], b + found[1]
    return left + right[::-1], (list(range(a, i)), list(range(b, j)))


def _segment(xs: Sequence[Size], ys: Sequence[Size]) -> tuple[int, int] | None:
    """Shortest prefixes of `xs` and `ys` with equal products, None if their products never meet."""
    i = j = 1
    px, py = xs[0], ys[0]
    while px != py:
        if _below(px, py) and i < len(xs):
            px, i = px * xs[i], i + 1
        elif _below(py, px) and j < len(ys):
            py, j = py * ys[j], j + 1
        else:
            return None
    return i, j


def _below(a: Size, b: Size) -> bool:
    """Whether the product `a` has to grow to meet `b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return exact_div(b, a) is not None


def relate(op: Op, x: Operand, y: Operand) -> None:
    """Relate the dimensions of `x` and its reshaped `y`."""
    matched, (lost_x, lost_y) = segments(x.shape, y.shape)
    for left, right in matched:
        op.axes.same(op.axes.product_of(x.dims[k] for k in left), op.axes.product_of(y.dims[k] for k in right))
    for operand, lost in ((x, lost_x), (y, lost_y)):
        for k in lost:
            if operand.shape[k] != 1:
                op.freeze(operand.dims[k], f"{op.node.op_type} mixes axes whose sizes are known only at run time")


def _reshape(op: Op) -> None:
    x, y = op.input(0), op.output()
    if x is None or y is None:
        op.freeze_all("Reshape of a tensor of unknown rank")
        return
    relate(op, x, y)
    edit_target(op, 1, y.dims)


def edit_target(op: Op, slot: int, dims: Sequence[Axis]) -> None:
    """Tie the entries of a shape operand to the sizes of `dims`; -1 and 0 adapt by themselves."""
    entries = op.ints(slot) if op.input(slot) is not None else op.ints(slot, "shape")
    target: str | int = slot if op.input(slot) is not None else "shape"
    operand = op.input(slot)
    for k, dim in enumerate(dims):
        entry = operand.const.reshape(-1)[k] if operand is not None and operand.const is not None else None
        if operand is None and entries is not None:
            entry = entries[k]
        if entry is None:
            op.freeze(dim, f"{op.node.op_type} to a size known only at run time")
        elif not isinstance(entry, int) or entry > 0:
            op.edit(target, k, dim)


def _adaptive(op: Op) -> None:
    """Flatten, Squeeze, Unsqueeze: no sizes stand in the graph."""
    x, y = op.input(0), op.output()
    if x is None or y is None:
        op.freeze_all(f"{op.node.op_type} of a tensor of unknown rank")
        return
    relate(op, x, y)


register("Reshape", Rule(_reshape, "runs of dimensions with equal products are one space", FACTOR))
register("Flatten Unsqueeze", Rule(_adaptive, "as Reshape, without a target", FACTOR))


def _squeeze(op: Op) -> None:
    """Without axes it drops whatever has size 1: that must not become more."""
    _adaptive(op)
    x, y = op.input(0), op.output()
    if x is not None and y is not None and op.input(1) is None and op.attr("axes") is None:
        dropped = tuple(d for d, size in enumerate(x.shape) if size == 1)
        if len(dropped) != len(x.dims) - len(y.dims):
            op.freeze_all("Squeeze of axes known only at run time")
        for d, dim in enumerate(x.dims):
            if d not in dropped:
                op.pin(1 if op.version >= 13 else "axes", dropped, dim)


register("Squeeze", Rule(_squeeze, "as Reshape, without a target", FACTOR))
