"""Which widths are worth having: on a given device, many are as slow as the next larger one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa.cost import CostModel
from spa.groups import Group
from spa.latency.design import step_of

_ABOVE = 0.1
"""How far the latency may lie above a straight line between two wider and narrower choices, as a share of what the
group can save at all."""


def worthwhile(cost: CostModel, groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Units that may be kept, per group: those whose latency lies near the lower hull of the group's curve.

    At such a width each MAC saved is time saved; at others the runtime pads, moves data into another layout, or falls
    back to a slower kernel. Other groups are as they are in the dense model.

    Args:
        cost: one that knows latency.
        groups: of its model.
    """
    out = {}
    for group in groups:
        step = step_of(group)
        widths = np.array([*range(step, group.units, step), group.units])
        left = {
            leaf: (cost.full[leaf] - n * (group.units - widths)).astype(np.float64) for leaf, n in group.leaves.items()
        }
        swept = np.broadcast_to(cost.sweep(cost.full, left, ["latency"])["latency"], widths.shape)
        out[group.name] = tuple(widths[near_hull(widths, np.asarray(swept))].tolist())
    return out


def near_hull(widths: NDArray[np.int64], times: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points are no slower than any to the right of them, and near the lower hull of all; the last one always is.

    Args:
        widths: ascending.
        times: at these widths.
    """
    hull: list[int] = []
    for k in range(len(widths)):
        while len(hull) > 1 and _left_of(widths, times, hull[-2], hull[-1], k):
            hull.pop()
        hull.append(k)
    line = np.interp(widths, widths[hull], times[hull])
    saving = float(times[-1] - times.min())
    best_after = np.minimum.accumulate(times[::-1])[::-1]
    keep = (times <= best_after) & (times - line <= _ABOVE * max(saving, 0.0))
    keep[-1] = True
    return np.asarray(keep)


def _left_of(widths: NDArray[np.int64], times: NDArray[np.float64], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool((times[b] - times[a]) * (widths[c] - widths[a]) >= (times[c] - times[a]) * (widths[b] - widths[a]))
