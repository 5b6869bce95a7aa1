"""Which units leave: lowest scores first, until the true cost of the model meets every target."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spa.budget.efficient import efficient
from spa.budget.queues import (
    KERNEL,
    Align,
    MinKeep,
    Queue,
    alignment,
    lowest,
    met,
    queue,
    relaxations,
    restore,
    shift,
    state,
)
from spa.budget.targets import Target
from spa.budget.widths import Optimality, knapsack
from spa.cost import CostModel, Metric
from spa.errors import TargetError
from spa.evidence import Vector
from spa.groups import Analysis, Frozen, Group

Allocation = Literal["global", "uniform", "efficient", "knapsack"]


@dataclass(frozen=True)
class Selection:
    """The units that leave, and what the model then costs."""

    removed: tuple[tuple[Group, tuple[int, ...]], ...]
    costs: dict[Metric, float]
    original: dict[Metric, float]
    align: Align
    """The alignment that was used (smaller than asked for only under `auto`)."""
    optimality: Optimality | None = None
    """Of `knapsack`."""


def select(
    analysis: Analysis,
    groups: Sequence[Group],
    scores: Mapping[str, Vector],
    targets: Sequence[Target],
    *,
    allocation: Allocation = "global",
    align: Align = "auto",
    min_keep: MinKeep | None = None,
    spare: Mapping[Metric, float] | None = None,
    curves: Mapping[str, Vector] | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
) -> Selection:
    """Choose the units that leave.

    Args:
        analysis: the analysed model.
        groups: the groups that may be pruned.
        scores: importance per unit and group, comparable across groups, [units] each.
        targets: limits, all of which must hold.
        allocation: `global` ranks all units together, `uniform` removes the same share of every group, `efficient`
            takes what loses least per cost saved, `knapsack` the widths with the least sum of losses; to both the
            scores are losses that add up.
        align: kept units per group are a multiple of this; `auto` chooses, and yields where a target needs it.
        min_keep: units to keep at least, per group; None keeps a tenth, and yields where a target needs it.
        curves: for `efficient` and `knapsack`, the loss after the first k units of a group have left, [units + 1]; by
            default the running sum of its scores.
        spare: how far to stay below the limits, for what the written file holds beyond the estimate.
        widths: for `align="auto"`: numbers of units worth keeping, per group; where the targets can be reached with
            them they take the place of multiples.

    Raises:
        TargetError: the targets cannot be reached; names the best reachable point and what freezes the rest.
    """
    cost = analysis.cost
    original = cost.totals(cost.full) | {"units": float(sum(g.units for g in groups))}
    limits = {t: t.bound(original[t.metric]) - (spare or {}).get(t.metric, 0.0) for t in targets}
    floor: dict[Metric, float] = {}
    tries: list[tuple[int, MinKeep, Mapping[str, Sequence[int]]]]
    tries = [(step, keep, {}) for step, keep in relaxations(align, min_keep)]
    if widths is not None and align == "auto":
        tries.insert(0, (*tries[0][:2], widths))
    for step, keep, known in tries:
        queues = [
            queue(
                g,
                scores[g.name],
                min(step, alignment(g, align)),
                keep(g),
                (curves or {}).get(g.name),
                known.get(g.name),
            )
            for g in groups
        ]
        floor = lowest(cost, queues)
        if all(floor[t.metric] <= limit for t, limit in limits.items()):
            optimality = None
            if allocation == "knapsack":
                costs, optimality = knapsack(cost, queues, limits)
            else:
                solve = {"uniform": _uniform, "global": _global, "efficient": efficient}[allocation]
                costs = solve(cost, queues, limits)
            removed = tuple((q.group, tuple(sorted(q.order[: q.removed]))) for q in queues if q.taken)
            used = align if align != "auto" or step == KERNEL else step
            return Selection(removed, costs, original, used, optimality)
    missed = [t for t, limit in limits.items() if floor[t.metric] > limit]
    best = {m: value + (spare or {}).get(m, 0.0) for m, value in floor.items()}
    raise TargetError(_unreachable(missed, best, original, analysis.frozen, bool(groups)))


def _global(cost: CostModel, queues: Sequence[Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
    counts, costs = state(cost, queues)
    heap = [(q.scores[0], k) for k, q in enumerate(queues) if q.chunks]
    heapq.heapify(heap)
    while heap and not met(costs, limits):
        _, k = heapq.heappop(heap)
        q = queues[k]
        shift(cost, counts, costs, q.group, q.chunks[q.taken])
        q.taken += 1
        if q.taken < len(q.chunks):
            heapq.heappush(heap, (max(q.scores[q.taken], q.scores[q.taken - 1]), k))
    restore(cost, counts, costs, queues, limits, most=max((q.taken for q in queues), default=0))
    return costs


def _uniform(cost: CostModel, queues: Sequence[Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
    """The smallest share that meets the targets, by bisection: costs fall with it. Up to one chunk per group."""
    counts = list(cost.full)

    def at(share: float) -> dict[Metric, float]:
        counts[:] = cost.full
        for q in queues:
            wanted = share * q.group.units
            bounds = np.cumsum([0, *q.chunks])
            q.taken = int(np.searchsorted(bounds, wanted + 1e-9, side="right")) - 1
            for leaf, n in q.group.leaves.items():
                counts[leaf] -= n * q.removed
        return cost.totals(counts) | {"units": float(sum(q.group.units - q.removed for q in queues))}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if met(at(middle), limits) else (middle, high)
    costs = at(high)
    restore(cost, counts, costs, queues, limits, most=1)
    return costs


def _unreachable(
    missed: Sequence[Target],
    best: Mapping[Metric, float],
    original: Mapping[Metric, float],
    frozen: Sequence[Frozen],
    prunable: bool,
) -> str:
    if not prunable:
        why = f"; {_why(frozen)}" if frozen else ""
        return f"nothing in this model can be pruned with these options{why}"
    parts = [
        f"{t.text} cannot be reached: the best is {t.metric}={_up(best[t.metric], 4):.4g} "
        f"({_up(best[t.metric] / original[t.metric], 3):.3g} of the original)"
        for t in missed
    ]
    return f"{' and '.join(parts)}; {_why(frozen)}"


def _up(number: float, digits: int) -> float:
    """Rounded up, so that what a message names as reachable is."""
    unit = 10.0 ** (math.floor(math.log10(number)) + 1 - digits) if number > 0 else 1.0
    return math.ceil(number / unit * (1 - 1e-12)) * unit


def _why(frozen: Sequence[Frozen]) -> str:
    """What stands in the way, largest first; kernel windows and the like could never leave."""
    parts = []
    for f in [f for f in frozen if not f.reason.text.endswith("as a whole")][:3]:
        node = f" at {f.reason.node}" if f.reason.node else ""
        parts.append(f"{f.tensor} axis {f.axis} ({f.reason.text}{node})")
    rest = f"what cannot leave: {', '.join(parts)}" if parts else "all groups are at their minimum"
    return f"{rest}; try --scope all, a smaller --align or --min-keep, or see `spa inspect`"


__all__ = ["Align", "Allocation", "MinKeep", "Optimality", "Selection", "alignment", "select"]
