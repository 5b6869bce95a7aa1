"""Which width a size of an operator follows.

ONNX Runtime fuses, reorders and renames, so that its operators cannot be told from the graph. They need not be: over
many models with random widths, a size that follows a width takes the same values as that width, and no other does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.axes import Axis
from spa.groups import Analysis
from spa.symbols import is_static

_BLOCKS = (1, 2, 4, 8, 16, 32, 64)
"""Sizes are widths, or widths rounded up to a multiple that kernels like."""
Row = NDArray[np.int64]
"""A size in all configurations; 0 where the operator is not there."""


@dataclass(frozen=True)
class Follows:
    """A size that is that of an axis, or a fixed multiple of it (axes may be flattened with fixed ones)."""

    axis: Axis
    multiply: int
    divide: int

    def of(self, size: int) -> int:
        """The operator's size when the axis has `size`."""
        return size * self.multiply // self.divide


class Widths:
    """All axes of a model whose size is not always the same over some configurations."""

    def __init__(self, analysis: Analysis, configurations: Sequence[Mapping[str, int]]) -> None:
        coupling = analysis.coupling
        solution = coupling.solution
        counts = [counts_of(analysis, c) for c in configurations]
        values = [v for op in coupling.ops for v in (*op.node.inputs, *op.node.outputs) if v is not None]
        axes = {a for v in dict.fromkeys(values) for a in coupling.dims(v) or () if a < len(solution.terms)}
        self._axes: list[Axis] = []
        rows: list[list[int]] = []
        self._known: dict[tuple[int, ...], int] = {}
        for axis in sorted({solution.terms[a]: a for a in sorted(axes, reverse=True)}.values()):
            sizes = [s for s in (solution.size(axis, row) for row in counts) if is_static(s)]
            if len(sizes) < len(counts) or len(set(sizes)) < 2 or _normal(sizes) in self._known:
                continue
            self._known[_normal(sizes)] = len(rows)
            self._axes.append(axis)
            rows.append(sizes)
        self._rows = np.array(rows, dtype=np.int64).reshape(len(rows), len(counts))

    def followed(self, row: Row) -> tuple[Follows, Row] | None:
        """What a size follows, and its values without rounding, also where the operator is not there."""
        there = row > 0
        if len(set(row[there].tolist())) < 2:
            return None
        if there.all() and (k := self._known.get(_normal(row.tolist()))) is not None:
            return self._result(k, int(row[0]), int(self._rows[k, 0]))
        seen, rows = row[there], self._rows[:, there]
        proportional = (rows * seen[0] == rows[:, :1] * seen[None, :]).all(axis=1)
        if proportional.any():
            k = int(np.argmax(proportional))
            return self._result(k, int(seen[0]), int(rows[k, 0]))
        # whether a size is rounded up may depend on where it comes from
        rounded = np.stack([-(-rows // block) * block for block in _BLOCKS])
        alike = (rounded == seen[None, None, :]).any(axis=0).all(axis=1)
        return self._result(int(np.argmax(alike)), 1, 1) if alike.any() else None

    def _result(self, k: int, size: int, of: int) -> tuple[Follows, Row]:
        common = math.gcd(size, of)
        follows = Follows(self._axes[k], size // common, of // common)
        return follows, self._rows[k] * follows.multiply // follows.divide


def counts_of(analysis: Analysis, widths: Mapping[str, int]) -> list[int]:
    """Positions left per leaf when groups keep `widths` units (others: all they have)."""
    counts = list(analysis.cost.full)
    for group in analysis.groups:
        for leaf, n in group.leaves.items() if group.name in widths else ():
            counts[leaf] -= n * (group.units - widths[group.name])
    return counts


def _normal(row: Sequence[int]) -> tuple[int, ...]:
    """Values without their common divisor."""
    divisor = max(math.gcd(*row), 1)
    return tuple(v // divisor for v in row)
