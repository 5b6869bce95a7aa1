"""What criteria may ask for. For now: the weights, as sums over everything but one axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.coupling import Coupling
from spa.groups import Analysis, Group, Member

Vector = NDArray[np.float64]
_CHUNK = 1 << 22


@dataclass
class Evidence:
    """Measurements of one analysed model, each taken once."""

    analysis: Analysis
    seed: int = 0
    _sums: dict[tuple[ir.Value, int], list[Vector]] = field(default_factory=dict)

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
        return by_position[group.positions].sum(axis=1)  # type: ignore[no-any-return]


def _power_sums(coupling: Coupling, value: ir.Value, power: Literal[1, 2]) -> list[Vector]:
    """Per axis of a weight, the sums over all other axes; reads the tensor once, in blocks of its first axis."""
    array = coupling.weights[value].numpy()
    scale = _scales(coupling, value, array.ndim)
    sums = [np.zeros(n) for n in array.shape]
    rows = max(1, _CHUNK // max(1, array[:1].size))
    for start in range(0, array.shape[0] if array.ndim else 0, rows):
        block = array[start : start + rows].astype(np.float32)
        if scale is not None:
            zero, factor = scale
            block = (block - _rows(zero, start, rows)) * _rows(factor, start, rows)
        block = np.abs(block) if power == 1 else np.square(block)
        for axis in range(array.ndim):
            others = tuple(a for a in range(array.ndim) if a != axis)
            part = block.sum(axis=others, dtype=np.float64)
            if axis == 0:
                sums[0][start : start + rows] = part
            else:
                sums[axis] += part
    return sums


def _rows(array: NDArray[np.float32], start: int, rows: int) -> NDArray[np.float32]:
    return array[start : start + rows] if array.ndim and array.shape[0] > 1 else array


def _scales(coupling: Coupling, value: ir.Value, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Zero point and scale of a weight that is read through DequantizeLinear, shaped to broadcast against it."""
    for node, slot in coupling.shared.get(value, ()):
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" and slot == 0 else None
        tensor = coupling.weights.get(scale) if scale is not None else None
        if tensor is None or tensor.shape.rank() > 1:
            continue
        axis = node.attributes["axis"].as_int() % rank if "axis" in node.attributes else 1
        shape = [-1 if k == axis and tensor.size > 1 else 1 for k in range(rank)]
        point = node.inputs[2] if len(node.inputs) > 2 else None
        zero = coupling.weights[point].numpy() if point is not None and point in coupling.weights else np.zeros(1)
        return (
            np.broadcast_to(zero.astype(np.float32).reshape(-1), tensor.size).reshape(shape),
            tensor.numpy().astype(np.float32).reshape(shape),
        )
    return None
