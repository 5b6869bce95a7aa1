"""Groups on their way out: units in the order in which they leave, in chunks, and the model's cost meanwhile.

Units leave in chunks, so that what is kept is a multiple of what kernels like. Costs are exact at every step (the
cost of a layer falls with both its producer and its consumer), never a sum of independent savings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spa.budget.targets import Target
from spa.cost import CostModel, Metric
from spa.evidence import Vector
from spa.groups import Group

Align = int | Literal["auto"]
MinKeep = Callable[[Group], int]
_CHANNELS = ((16, 96), (8, 24), (4, 16), (2, 8))
_OTHERS = ((8, 32), (4, 16), (2, 8))
"""(multiple, least units of a group for it), what kernels like best first. ONNX Runtime computes convolutions in blocks
of 8 channels (AVX2) or 16 (AVX-512): what does not fill them is padded, or leaves the fast layout. Matrix products
gain nothing beyond 8. In narrow layers a choice of widths is worth more."""
KERNEL = _CHANNELS[0][0]
"""The largest automatic alignment."""
_FLOOR = 0.1
"""Share of a group that `min_keep=None` keeps as long as the targets allow: global rankings empty layers otherwise."""


@dataclass
class Queue:
    """One group on its way out: its units in removal order, cut into chunks."""

    group: Group
    order: list[int]
    chunks: list[int]
    """Number of units per chunk."""
    scores: list[float]
    """Mean score per chunk."""
    losses: list[float]
    """Loss after so many chunks have left, one more entry than chunks."""
    taken: int = 0
    """Chunks removed so far."""

    @property
    def removed(self) -> int:
        """Units removed so far."""
        return sum(self.chunks[: self.taken])

    @property
    def last_loss(self) -> float:
        """What the last chunk that left costs per unit."""
        return (self.losses[self.taken] - self.losses[self.taken - 1]) / self.chunks[self.taken - 1]


def alignment(group: Group, align: Align) -> int:
    """What the kept number of units should be a multiple of.

    `auto`: 16 for channels, 8 for neurons and dims, less in narrow layers; 1 for heads.
    """
    if align != "auto":
        return align
    if group.kind in ("head", "kv-head", "expert"):
        return 1
    known = _CHANNELS if group.kind == "channel" else _OTHERS
    return next((step for step, least in known if group.units >= least), 1)


def relaxations(align: Align, min_keep: MinKeep | None) -> list[tuple[int, MinKeep]]:
    """(largest alignment, floor) to try in turn: what is automatic yields, what the user said does not."""
    steps = [*(step for step, _ in _CHANNELS), 1] if align == "auto" else [align]
    if min_keep is not None:
        return [(step, min_keep) for step in steps]

    def tenth(group: Group) -> int:
        return max(1, round(_FLOOR * group.units))

    return [*((step, tenth) for step in steps), (steps[-1], lambda group: 1)]


def queue(
    group: Group,
    scores: Vector,
    step: int,
    keep: int,
    curve: Vector | None = None,
    widths: Sequence[int] | None = None,
) -> Queue:
    """A group with all its units still there.

    Args:
        group: the group.
        scores: importance of its units, [units]; the lowest leave first.
        step: units kept are a multiple of this once any have left.
        keep: units kept at least.
        curve: loss after the first k units have left, [units + 1]; by default the running sum of the scores.
        widths: numbers of units that may be kept besides all, instead of multiples of `step`.
    """
    order = np.argsort(scores, kind="stable").tolist()
    if widths is None:
        widths = range(step, group.units, step)
    stops = [group.units, *sorted((w for w in widths if max(keep, group.least) <= w < group.units), reverse=True)]
    chunks = [a - b for a, b in itertools.pairwise(stops)]
    starts = np.cumsum([0, *chunks])[:-1]
    ranked = np.asarray(scores, dtype=np.float64)[order[: sum(chunks)]]
    means = (np.add.reduceat(ranked, starts) / chunks).tolist() if chunks else []
    running = np.concatenate([[0.0], np.cumsum(np.asarray(scores, dtype=np.float64)[order])])
    losses = (running if curve is None else curve)[np.cumsum([0, *chunks])].tolist()
    return Queue(group, order, chunks, means, losses)


def state(cost: CostModel, queues: Sequence[Queue]) -> tuple[list[int], dict[Metric, float]]:
    """Counts per leaf, and costs, with what has left so far."""
    counts = list(cost.full)
    for q in queues:
        for leaf, n in q.group.leaves.items():
            counts[leaf] -= n * q.removed
    return counts, cost.totals(counts) | {"units": float(sum(q.group.units - q.removed for q in queues))}


def shift(cost: CostModel, counts: list[int], costs: dict[Metric, float], group: Group, units: int) -> None:
    """Take `units` more units of a group out (negative: put them back) and update the costs."""
    new = {leaf: counts[leaf] - n * units for leaf, n in group.leaves.items()}
    for metric, delta in cost.change(counts, new).items():
        costs[metric] += delta
    costs["units"] -= units
    for leaf, count in new.items():
        counts[leaf] = count


def met(costs: Mapping[Metric, float], limits: Mapping[Target, float]) -> bool:
    """Whether costs are within all limits, up to rounding."""
    return all(costs[t.metric] <= limit * (1 + 1e-12) for t, limit in limits.items())


def lowest(cost: CostModel, queues: Sequence[Queue]) -> dict[Metric, float]:
    """The costs when all chunks have left."""
    counts = list(cost.full)
    for q in queues:
        for leaf, n in q.group.leaves.items():
            counts[leaf] -= n * sum(q.chunks)
    left = float(sum(q.group.units - sum(q.chunks) for q in queues))
    return cost.totals(counts) | {"units": left}


def restore(
    cost: CostModel,
    counts: list[int],
    costs: dict[Metric, float],
    queues: Sequence[Queue],
    limits: Mapping[Target, float],
    most: int,
    worth: Callable[[Queue], float] = lambda q: q.scores[q.taken - 1],
) -> None:
    """Put the most important chunks back (`most` per group) while the targets hold: the last step overshoots."""
    candidates = sorted((q for q in queues if q.taken), key=lambda q: -worth(q))
    for q in candidates:
        for _ in range(min(most, q.taken)):
            size = q.chunks[q.taken - 1]
            shift(cost, counts, costs, q.group, -size)
            if not met(costs, limits):
                shift(cost, counts, costs, q.group, size)
                break
            q.taken -= 1
