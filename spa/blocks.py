"""Tensors that are read, cut and written block by block, so that no step holds a big one as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["Blocked", "blanked", "blocks", "divisible", "picked"]

Array: TypeAlias = NDArray[Any]
Index: TypeAlias = NDArray[np.intp]
Rows: TypeAlias = Callable[[int, int], Array]

BLOCK = 8 << 20
"""About this many bytes are held at a time."""


class Blocked(ir.LazyTensor):
    """A tensor that can be read in parts."""

    def __init__(self, rows: Rows, dtype: ir.DataType, shape: ir.Shape, name: str | None) -> None:
        """`rows(start, stop)` gives that part of the first axis."""
        super().__init__(self._whole, dtype, shape, name=name)
        self.rows = rows

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self.rows(0, _first(self)), self.dtype, shape=self.shape, name=self.name)


def _first(tensor: ir.TensorProtocol) -> int:
    return int(tensor.shape.numpy()[0])


def _rows(tensor: ir.TensorProtocol) -> Rows | None:
    """How to read a tensor in parts, if that is cheap."""
    if isinstance(tensor, Blocked):
        return tensor.rows
    if isinstance(tensor, ir.Tensor) and divisible(tensor.dtype, tensor.shape):
        return lambda start, stop: tensor.numpy()[start:stop]
    return None


def divisible(dtype: ir.DataType, shape: ir.Shape) -> bool:
    """Whether a tensor has a first axis whose entries start on a byte."""
    return dtype != ir.DataType.STRING and dtype.bitwidth >= 8 and shape.rank() > 0


def blocks(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """The tensor's parts along its first axis."""
    if not isinstance(tensor, Blocked):
        yield tensor.numpy()
        return
    count = _first(tensor)
    step = max(1, BLOCK * count // max(1, tensor.nbytes))
    for start in range(0, count, step):
        yield tensor.rows(start, min(start + step, count))


def picked(tensor: ir.TensorProtocol, picks: Sequence[tuple[int, Index]], name: str) -> ir.TensorProtocol:
    """`tensor` with only some positions, ascending, of some axes; read and cut when it is written."""
    shape = list(tensor.shape.numpy())
    # the axis that shrinks most goes first, so that the rest copies less
    picks = sorted(picks, key=lambda p: len(p[1]) / max(1, shape[p[0]]))
    for axis, index in picks:
        shape[axis] = len(index)
    source, ahead, others = _rows(tensor), dict(picks).get(0), [p for p in picks if p[0]]

    def rows(start: int, stop: int) -> Array:
        assert source is not None
        if ahead is None:
            return _take(source(start, stop), others)
        index = ahead[start:stop]
        low, high = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
        return _take(source(low, high), [(0, index - low), *others])

    def whole() -> ir.TensorProtocol:
        return ir.Tensor(_take(tensor.numpy(), picks), dtype=tensor.dtype, name=name)

    return _derived(source and rows, whole, tensor.dtype, ir.Shape(shape), name)


def blanked(tensor: ir.TensorProtocol, axis: int, index: Index) -> ir.TensorProtocol:
    """`tensor` with zeros at some positions of one axis, read when it is written."""
    source = _rows(tensor)

    def rows(start: int, stop: int) -> Array:
        assert source is not None
        where = index if axis else index[(index >= start) & (index < stop)] - start
        return _blank(source(start, stop), axis, where)

    def whole() -> ir.TensorProtocol:
        return ir.Tensor(_blank(tensor.numpy(), axis, index), dtype=tensor.dtype, name=tensor.name)

    return _derived(source and rows, whole, tensor.dtype, ir.Shape(tensor.shape.numpy()), tensor.name)


def _derived(
    rows: Rows | None, whole: Callable[[], ir.TensorProtocol], dtype: ir.DataType, shape: ir.Shape, name: str | None
) -> ir.TensorProtocol:
    return Blocked(rows, dtype, shape, name) if rows is not None else ir.LazyTensor(whole, dtype, shape, name=name)


def _take(array: Array, picks: Sequence[tuple[int, Index]]) -> Array:
    for axis, index in picks:
        array = np.take(array, index, axis=axis)
    return np.ascontiguousarray(array)


def _blank(array: Array, axis: int, index: Index) -> Array:
    array = np.array(array)
    array[(slice(None),) * axis + (index,)] = 0
    return array
