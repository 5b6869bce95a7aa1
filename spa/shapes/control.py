"""If, Loop and Scan: shapes through subgraphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from spa.shapes.op import Const, Facts, Item, Op, Shape, Table, merge
from spa.symbols import Size

_ROUNDS = 16


class Walker(Facts, Protocol):
    """What control flow needs from the walk over a graph."""

    def walk(self, graph: ir.Graph) -> None:
        """Infer everything inside."""

    def settle(self, value: ir.Value, shape: Shape | None, const: Const | None, dtype: ir.DataType | None) -> None:
        """Set what is known about a value."""


CONTROL = Table()


@CONTROL.rule("If")
def _if(op: Op) -> None:
    walker: Walker = op.facts  # type: ignore[assignment]  # only a walk runs this table
    then, other = op.attr("then_branch"), op.attr("else_branch")
    walker.walk(then)
    walker.walk(other)
    condition = op.items(0)
    known = condition[0] if condition else None
    for value, yes, no in zip(op.node.outputs, then.outputs, other.outputs, strict=False):
        dtype = walker.dtype(yes) or walker.dtype(no)
        if known is not None:
            chosen = yes if known else no
            walker.settle(value, walker.shape(chosen), walker.known(chosen), dtype)
            continue
        const, second = walker.known(yes), walker.known(no)
        agreed = const is not None and second is not None and (const.dims, const.items) == (second.dims, second.items)
        walker.settle(value, _agreed(op, walker.shape(yes), walker.shape(no)), const if agreed else None, dtype)


def _agreed(op: Op, a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(x if x == y else op.fresh() for x, y in zip(a, b, strict=True))


def _carried(
    walker: Walker, op: Op, body: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], first: int
) -> list[Shape | None]:
    """Shapes of carried values that hold in every round: a dim that the body changes is unknown."""
    shapes = [op.shape(first + k) for k in range(len(inputs))]
    varying: set[tuple[int, int]] = set()
    for _ in range(_ROUNDS):
        for k, value in enumerate(inputs):
            walker.settle(value, shapes[k], None, op.dtype(first + k))
        walker.walk(body)
        if not _loosen(op, shapes, [walker.shape(value) for value in outputs], varying):
            break
    else:
        shapes = [None] * len(inputs)
        for value in inputs:
            walker.settle(value, None, None, walker.dtype(value))
        walker.walk(body)
    return [
        None if shape is None else tuple(op.fresh() if (k, n) in varying else d for n, d in enumerate(shape))
        for k, shape in enumerate(shapes)
    ]


def _loosen(op: Op, shapes: list[Shape | None], after: list[Shape | None], varying: set[tuple[int, int]]) -> bool:
    """Forget what one round of the body changes; True if there was something."""
    changed = False
    for k, (old, new) in enumerate(zip(shapes, after, strict=True)):
        if old is None or old == new:
            continue
        if new is None or len(new) != len(old):
            shapes[k] = None
            changed = True
            continue
        moved = {n for n in range(len(old)) if old[n] != new[n] and (k, n) not in varying}
        if moved:
            varying |= {(k, n) for n in moved}
            shapes[k] = tuple(op.fresh() if n in moved else d for n, d in enumerate(old))
            changed = True
    return changed


@CONTROL.rule("Loop")
def _loop(op: Op) -> None:
    walker: Walker = op.facts  # type: ignore[assignment]  # only a walk runs this table
    body: ir.Graph = op.attr("body")
    count = len(body.inputs) - 2
    for value, dtype in zip(body.inputs[:2], (ir.DataType.INT64, ir.DataType.BOOL), strict=True):
        walker.settle(value, (), None, dtype)
    shapes = _carried(walker, op, body, body.inputs[2:], body.outputs[1 : 1 + count], 2)
    trips = _trips(op, walker, body)
    for value, inner in zip(op.node.outputs[count:], body.outputs[1 + count :], strict=False):
        element = walker.shape(inner)
        walker.settle(value, None if element is None else (trips, *element), None, walker.dtype(inner))
    for k, value in enumerate(op.node.outputs[:count]):
        walker.settle(value, shapes[k], None, op.dtype(2 + k))


def _trips(op: Op, walker: Walker, body: ir.Graph) -> Size:
    """How often the body runs; known only if nothing can stop it early."""
    start, limit, go_on = op.items(1), op.items(0), walker.known(body.outputs[0])
    endless = go_on is not None and go_on.items[0] is True and (not op.has(1) or bool(start and start[0] is True))
    most: Item = limit[0] if limit else None
    if not endless or isinstance(most, float):
        return op.fresh()
    return max(most, 0) if isinstance(most, int) else op.size(most)


@CONTROL.rule("Scan")
def _scan(op: Op) -> None:
    walker: Walker = op.facts  # type: ignore[assignment]  # only a walk runs this table
    body: ir.Graph = op.attr("body")
    scanned = op.attr("num_scan_inputs", 0)
    count = len(op.inputs) - scanned
    if op.version < 9 or count < 0:
        return
    axes = op.attr("scan_input_axes") or [0] * scanned
    length: Size | None = None
    for k, axis in enumerate(axes):
        x = op.shape(count + k)
        if x:
            size = x[axis]
            length = size if length is None else merge(length, size)
        element = None if not x else tuple(d for n, d in enumerate(x) if n != axis % len(x))
        walker.settle(body.inputs[count + k], element, None, op.dtype(count + k))
    shapes = _carried(walker, op, body, body.inputs[:count], body.outputs[:count], 0)
    for k, value in enumerate(op.node.outputs[:count]):
        walker.settle(value, shapes[k], None, op.dtype(k))
    places = op.attr("scan_output_axes") or [0] * (len(body.outputs) - count)
    for value, inner, place in zip(op.node.outputs[count:], body.outputs[count:], places, strict=False):
        element = walker.shape(inner)
        if element is not None:
            at = place % (len(element) + 1)
            element = (*element[:at], op.fresh() if length is None else length, *element[at:])
        walker.settle(value, element, None, walker.dtype(inner))
