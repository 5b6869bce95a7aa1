"""How long one operator takes as a function of its sizes, from scattered and noisy samples.

A non-negative least-squares fit says what more work costs, also where nothing was measured. Its features are sizes and
products of sizes, as they are and rounded up to what kernels work in, and sizes that are no such multiple: these need
another layout first, or a slower kernel, so that 12 channels may take longer than 16. What the samples say differently
nearby is put on top. Samples are first made monotone among equally aligned sizes: an operator with more to do is not
faster, and where it seems to be that is noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Points = NDArray[np.int64]

_BLOCKS = (4, 8, 16)
"""Multiples that kernels care about."""
_REACH = 0.12
"""Over which distance in log size a sample counts for its neighbours."""
_STRANGER = 0.15
"""How much a sample counts whose sizes are aligned differently."""
_DOUBT = 0.3
"""Samples that the fit is worth where it meets others."""


class Surface:
    """A positive function of sizes.

    Args:
        points: sizes that were measured, [samples, axes], at least 1, all different.
        values: [samples], at least 0.
    """

    def __init__(self, points: Points, values: Floats) -> None:
        self.points, self.values = points, monotone(points, values)
        self._known: dict[tuple[int, ...], float] = {}
        if not points.shape[1]:
            self._known[()] = float(np.median(values))
            return
        self._classes = alignments(points)
        self._weights = _fit(points, self.values)
        self._rest = self.values - self._base(points)
        self._logs = np.log(points)

    def at(self, points: Sequence[tuple[int, ...]]) -> Floats:
        """The values at some sizes, [points]."""
        new = [p for p in dict.fromkeys(points) if p not in self._known]
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            self._known.update(zip(part, self._interpolated(np.array(part, dtype=np.int64)).tolist(), strict=True))
        return np.array([self._known[p] for p in points])

    def _base(self, points: Points) -> Floats:
        out: Floats = _features(points) @ self._weights
        return out

    def _interpolated(self, points: Points) -> Floats:
        away = (np.log(np.maximum(points, 1))[:, None, :] - self._logs[None, :, :]) / _REACH
        near = np.exp(-0.5 * np.square(away).sum(axis=2))
        near *= np.where((alignments(points)[:, None, :] == self._classes[None, :, :]).all(axis=2), 1.0, _STRANGER)
        out: Floats = self._base(points) + (near @ self._rest) / (near.sum(axis=1) + _DOUBT)
        return np.maximum(out, 0.0)


def alignments(points: Points) -> Points:
    """The largest of 1, 4, 8, 16 that divides each size, [points, axes]."""
    out = np.ones_like(points)
    for block in _BLOCKS:
        out[points % block == 0] = block
    return out


def monotone(points: Points, values: Floats) -> Floats:
    """Values near the given ones that do not fall with any size, among sizes of equal alignment.

    The mean of the largest value that is not above, and the smallest that is not below: both do not fall.
    """
    if not points.shape[1]:
        return values
    kinds = alignments(points)
    alike = (kinds[:, None, :] == kinds[None, :, :]).all(axis=2)
    below = alike & (points[:, None, :] >= points[None, :, :]).all(axis=2)
    lower = np.where(below, values[None, :], -np.inf).max(axis=1)
    upper = np.where(below.T, values[None, :], np.inf).min(axis=1)
    return np.asarray((lower + upper) / 2)


def _features(points: Points) -> Floats:
    """What the time is a sum of, [points, features], none falling with a size but where it comes to be aligned."""
    x = points.astype(np.float64)
    axes = range(x.shape[1])
    columns = [np.ones(len(x))]
    rounded = [[x[:, k], *(np.ceil(x[:, k] / b) * b for b in _BLOCKS[1:])] for k in axes]
    odd = [[x[:, k] * (points[:, k] % b != 0) for b in _BLOCKS] for k in axes]
    for k in axes:
        columns += [*rounded[k], *odd[k]]
        columns += [o * x[:, j] for o in odd[k] for j in axes if j != k]
    for count in range(2, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            several = itertools.product(*(rounded[k] if len(axes) <= 2 else rounded[k][:1] for k in chosen))
            columns += [np.prod(parts, axis=0) for parts in several]
    return np.stack(columns, axis=1)


def _fit(points: Points, values: Floats) -> Floats:
    """Weights of the features, at least 0, with the least relative error."""
    from scipy.optimize import nnls  # half a second to import, which other commands need not wait

    known = np.maximum(values, 0.1 * max(float(np.median(values)), 1e-6))
    rows = _features(points) / known[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-30)
    weights: Floats = nnls(rows / scale, values / known)[0] / scale
    return weights
