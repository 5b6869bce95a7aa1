"""What criteria may ask for: sums of the weights, what was measured on samples, and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.coupling import Coupling
from spa.errors import UsageError
from spa.gradients import Gradients
from spa.groups import Analysis, Group, Member
from spa.measured import Measured

Vector = NDArray[np.float64]
_CHUNK = 1 << 22


@dataclass
class Evidence:
    """Measurements of one analysed model, each taken once."""

    analysis: Analysis
    seed: int = 0
    data: Measured | None = None
    """Measurements on calibration samples, if there are any."""
    derivatives: Gradients | None = None
    """Of a loss on these samples."""
    _sums: dict[tuple[ir.Value, int], list[Vector]] = field(default_factory=dict)

    @property
    def measured(self) -> Measured:
        """Measurements on calibration samples.

        Raises:
            UsageError: there are no samples.
        """
        if self.data is None:
            raise UsageError(
                "this criterion looks at activations: give --calibration PATH, or --calibration none to make inputs up"
            )
        return self.data

    @property
    def gradients(self) -> Gradients:
        """Derivatives of a loss on calibration samples.

        Raises:
            UsageError: there are no samples.
        """
        if self.derivatives is None:
            raise UsageError(
                "this criterion looks at gradients: give --calibration PATH, or --calibration none to make inputs up"
            )
        return self.derivatives

    def power_sums(self, member: Member, power: Literal[1, 2]) -> Vector:
        """sum |w|^power over the slice of each position of the member's axis, float64 [size of the axis]."""
        key = (member.value, power)
        if key not in self._sums:
            self._sums[key] = _power_sums(self.analysis.coupling, member.value, power)
        return self._sums[key][member.axis]

    def per_unit(self, group: Group, member: Member, values: Vector) -> Vector:
        """Sum per-position `values` of a member's axis into the units of the group, [units]."""
        solution = self.analysis.coupling.solution
        by_position = np.zeros(solution.positions)
        for leaf, part in solution.fold(member.dim, values):
            if leaf in group.leaves:
                by_position[solution.base[leaf] : solution.base[leaf + 1]] += part
        return np.asarray(by_position[group.positions].sum(axis=1))


def _power_sums(coupling: Coupling, value: ir.Value, power: Literal[1, 2]) -> list[Vector]:
    """Per axis of a weight, the sums over all other axes; reads the tensor once, in blocks of its first axis."""
    array = coupling.weights[value].numpy()
    real = _reader(coupling, value)
    sums = [np.zeros(n) for n in array.shape]
    rows = max(1, _CHUNK // max(1, array[:1].size))
    for start in range(0, array.shape[0] if array.ndim else 0, rows):
        block = real(array[start : start + rows], start)
        block = np.abs(block) if power == 1 else np.square(block)
        for axis in range(array.ndim):
            others = tuple(a for a in range(block.ndim) if a != axis)
            part = block.sum(axis=others, dtype=np.float64)
            if axis == 0:
                sums[0][start : start + rows] = part
            else:
                sums[axis] += part
    return sums


# -- quantised weights: what their integers stand for ------------------------------------------------------------------

_Reader = Callable[[NDArray[Any], int], NDArray[np.float32]]
"""(rows of a tensor, index of the first) -> their real values, perhaps with one more axis at the end."""
_QUANTISED: dict[str, tuple[int, int | None, int, int]] = {
    "DequantizeLinear": (0, 1, 2, 1),
    "QLinearConv": (3, 4, 5, 0),
    "QLinearMatMul": (3, 4, 5, -1),
    "MatMulInteger": (1, None, 3, -1),
    "ConvInteger": (1, None, 3, 0),
    "MatMulIntegerToFloat": (1, 3, 5, -1),
    "DynamicQuantizeMatMul": (1, 2, 3, -1),
}
"""Operator -> slots of the weight, its scale and its zero point, and the axis along which these run."""


def _reader(coupling: Coupling, value: ir.Value) -> _Reader:
    for node, slot in coupling.shared.get(value, ()):
        if node.op_type == "MatMulNBits" and slot == 1:
            return _packed(coupling, node, value)
        known = _QUANTISED.get(node.op_type)
        if known is not None and slot == known[0]:
            return _affine(coupling, node, value, known)
    return lambda block, start: block.astype(np.float32)


def _constant(coupling: Coupling, node: ir.Node, slot: int | None) -> NDArray[Any] | None:
    operand = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
    tensor = coupling.weights.get(operand) if operand is not None else None
    return tensor.numpy() if tensor is not None else None


def _affine(coupling: Coupling, node: ir.Node, value: ir.Value, known: tuple[int, int | None, int, int]) -> _Reader:
    """(q - zero point) * scale, for the whole tensor, per position of an axis, or per block of one."""
    shape = coupling.weights[value].shape.numpy()
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else known[3]) % max(1, len(shape))
    size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0

    def spread(slot: int | None) -> NDArray[np.float32] | None:
        array = _constant(coupling, node, slot)
        if array is None:
            return None
        array = array.astype(np.float32)
        if size:
            return np.repeat(array, size, axis=axis).take(range(shape[axis]), axis=axis)
        return array.reshape([-1 if k == axis and array.size > 1 else 1 for k in range(len(shape))])

    scale, zero = spread(known[1]), spread(known[2])

    def read(block: NDArray[Any], start: int) -> NDArray[np.float32]:
        real = block.astype(np.float32)
        for array, combine in ((zero, np.subtract), (scale, np.multiply)):
            if array is not None:
                real = combine(real, array[start : start + len(block)] if array.shape[0] > 1 else array)
        return real

    return read


def _packed(coupling: Coupling, node: ir.Node, value: ir.Value) -> _Reader:
    """MatMulNBits: [columns, blocks, bytes], a scale and perhaps a zero point per block."""
    columns, blocks, _ = coupling.weights[value].shape.numpy()
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    scale, zero = _constant(coupling, node, 2), _constant(coupling, node, 3)
    if zero is None:
        zero = np.full((columns, blocks), 1 << (bits - 1))
    elif zero.dtype == np.uint8:
        zero = _unpacked(zero.reshape(columns, -1), bits).reshape(columns, -1)[:, :blocks]
    point = zero.astype(np.float32).reshape(columns, blocks)
    factor = (np.ones(1) if scale is None else scale).astype(np.float32)
    factor = np.broadcast_to(factor if factor.size == 1 else factor.reshape(columns, blocks), (columns, blocks))

    def read(block: NDArray[Any], start: int) -> NDArray[np.float32]:
        rows = slice(start, start + len(block))
        levels = _unpacked(block, bits).astype(np.float32)
        return (levels - point[rows, :, None, None]) * factor[rows, :, None, None]

    return read


def _unpacked(array: NDArray[Any], bits: int) -> NDArray[Any]:
    """The numbers in each byte, lowest bits first, along a new last axis."""
    return np.stack([(array >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=-1)
