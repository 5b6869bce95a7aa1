"""Which units leave: lowest scores first, until the true cost of the model meets every target.

Units leave in chunks, so that what is kept is a multiple of what kernels like. Costs are exact at every step (the
cost of a layer falls with both its producer and its consumer), never a sum of independent savings.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spa.budget.targets import Target
from spa.cost import CostModel, Metric
from spa.errors import TargetError
from spa.evidence import Vector
from spa.groups import Analysis, Frozen, Group

Allocation = Literal["global", "uniform", "efficient"]
Align = int | Literal["auto"]
MinKeep = Callable[[Group], int]
_FLOOR = 0.1
"""Share of a group that `min_keep=None` keeps as long as the targets allow: global rankings empty layers otherwise."""
_KERNEL = 8
"""ONNX Runtime's CPU kernels work in blocks of 8 channels: odd widths are slower than full ones."""


@dataclass(frozen=True)
class Selection:
    """The units that leave, and what the model then costs."""

    removed: tuple[tuple[Group, tuple[int, ...]], ...]
    costs: dict[Metric, float]
    original: dict[Metric, float]
    align: Align
    """The alignment that was used (smaller than asked for only under `auto`)."""


@dataclass
class _Queue:
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
        return sum(self.chunks[: self.taken])


def alignment(group: Group, align: Align) -> int:
    """What the kept number of units should be a multiple of.

    `auto`: 8 for channels, neurons and dims, less in narrow layers (four steps remain); 1 for heads.
    """
    if align != "auto":
        return align
    if group.kind in ("head", "kv-head", "expert"):
        return 1
    step = _KERNEL
    while step > 1 and step * 4 > group.units:
        step //= 2
    return step


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
) -> Selection:
    """Choose the units that leave.

    Args:
        analysis: the analysed model.
        groups: the groups that may be pruned.
        scores: importance per unit and group, comparable across groups, [units] each.
        targets: limits, all of which must hold.
        allocation: `global` ranks all units together, `uniform` removes the same share of every group, `efficient`
            takes what loses least per cost saved, the scores being losses that add up.
        align: kept units per group are a multiple of this; `auto` chooses, and yields where a target needs it.
        min_keep: units to keep at least, per group; None keeps a tenth, and yields where a target needs it.
        curves: for `efficient`, the loss after the first k units of a group have left, [units + 1]; by default the
            running sum of its scores.
        spare: how far to stay below the limits, for what the written file holds beyond the estimate.

    Raises:
        TargetError: the targets cannot be reached; names the best reachable point and what freezes the rest.
    """
    cost = analysis.cost
    original = cost.totals(cost.full) | {"units": float(sum(g.units for g in groups))}
    limits = {t: t.bound(original[t.metric]) - (spare or {}).get(t.metric, 0.0) for t in targets}
    floor: dict[Metric, float] = {}
    for step, keep in _relaxations(align, min_keep):
        queues = [
            _queue(g, scores[g.name], min(step, alignment(g, align)), keep(g), (curves or {}).get(g.name))
            for g in groups
        ]
        floor = _floor(cost, queues)
        if all(floor[t.metric] <= limit for t, limit in limits.items()):
            costs = {"uniform": _uniform, "global": _global, "efficient": _efficient}[allocation](cost, queues, limits)
            removed = tuple((q.group, tuple(sorted(q.order[: q.removed]))) for q in queues if q.taken)
            return Selection(removed, costs, original, align if align != "auto" or step == _KERNEL else step)
    missed = [t for t, limit in limits.items() if floor[t.metric] > limit]
    best = {m: value + (spare or {}).get(m, 0.0) for m, value in floor.items()}
    raise TargetError(_unreachable(missed, best, original, analysis.frozen, bool(groups)))


def _relaxations(align: Align, min_keep: MinKeep | None) -> list[tuple[int, MinKeep]]:
    """(largest alignment, floor) to try in turn: what is automatic yields, what the user said does not."""
    steps = [_KERNEL, 4, 2, 1] if align == "auto" else [align]
    if min_keep is not None:
        return [(step, min_keep) for step in steps]

    def tenth(group: Group) -> int:
        return max(1, round(_FLOOR * group.units))

    return [*((step, tenth) for step in steps), (steps[-1], lambda group: 1)]


def _queue(group: Group, scores: Vector, step: int, keep: int, curve: Vector | None = None) -> _Queue:
    order = np.argsort(scores, kind="stable").tolist()
    chunks: list[int] = []
    left = group.units
    size = left % step or step
    while left - size >= max(keep, 1):
        chunks.append(size)
        left -= size
        size = step
    starts = np.cumsum([0, *chunks])[:-1]
    ranked = np.asarray(scores, dtype=np.float64)[order[: sum(chunks)]]
    means = (np.add.reduceat(ranked, starts) / chunks).tolist() if chunks else []
    running = np.concatenate([[0.0], np.cumsum(np.asarray(scores, dtype=np.float64)[order])])
    losses = (running if curve is None else curve)[np.cumsum([0, *chunks])].tolist()
    return _Queue(group, order, chunks, means, losses)


def _shift(cost: CostModel, counts: list[int], costs: dict[Metric, float], group: Group, units: int) -> None:
    """Take `units` more units of a group out (negative: put them back) and update the costs."""
    new = {leaf: counts[leaf] - n * units for leaf, n in group.leaves.items()}
    for metric, delta in cost.change(counts, new).items():
        costs[metric] += delta
    costs["units"] -= units
    for leaf, count in new.items():
        counts[leaf] = count


def _met(costs: Mapping[Metric, float], limits: Mapping[Target, float]) -> bool:
    return all(costs[t.metric] <= limit * (1 + 1e-12) for t, limit in limits.items())


def _units(queues: Sequence[_Queue]) -> dict[Metric, float]:
    return {"units": float(sum(q.group.units for q in queues))}


def _floor(cost: CostModel, queues: Sequence[_Queue]) -> dict[Metric, float]:
    counts = list(cost.full)
    for q in queues:
        for leaf, n in q.group.leaves.items():
            counts[leaf] -= n * sum(q.chunks)
    left = float(sum(q.group.units - sum(q.chunks) for q in queues))
    return cost.totals(counts) | {"units": left}


def _efficient(cost: CostModel, queues: Sequence[_Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
    """Greedy along the lower convex hulls of the groups' losses, by loss per cost saved.

    Savings are those of the model as it then is, and only shrink while it does: a candidate is valued again before it
    is taken, and waits if another one is better by then.
    """
    counts = list(cost.full)
    costs = cost.totals(counts) | _units(queues)

    def price(q: _Queue) -> float:
        """Loss per saving of the next step along the hull; savings count relative to the limits still missed."""
        ends = np.cumsum(q.chunks[q.taken :])
        slope = float(((np.array(q.losses[q.taken + 1 :]) - q.losses[q.taken]) / ends).min())
        size = q.chunks[q.taken]
        new = {leaf: counts[leaf] - n * size for leaf, n in q.group.leaves.items()}
        change = cost.change(counts, new) | {"units": float(-size)}
        missed = {t.metric: limit for t, limit in limits.items() if costs[t.metric] > limit}
        saved = sum(-change[m] / max(limit, 1e-30) for m, limit in missed.items())
        return max(slope, 0.0) * size / saved if saved > 0 else math.inf

    heap = [(price(q), k) for k, q in enumerate(queues) if q.chunks]
    heapq.heapify(heap)
    while heap and not _met(costs, limits):
        _, k = heapq.heappop(heap)
        q = queues[k]
        now = price(q)
        if heap and now > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (now, k))
            continue
        _shift(cost, counts, costs, q.group, q.chunks[q.taken])
        q.taken += 1
        if q.taken < len(q.chunks):
            heapq.heappush(heap, (price(q), k))
    _restore(cost, counts, costs, queues, limits, most=max((q.taken for q in queues), default=0), worth=_last_loss)
    return costs


def _last_loss(q: _Queue) -> float:
    """What the last chunk that left costs per unit."""
    return (q.losses[q.taken] - q.losses[q.taken - 1]) / q.chunks[q.taken - 1]


def _global(cost: CostModel, queues: Sequence[_Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
    counts = list(cost.full)
    costs = cost.totals(counts) | _units(queues)
    heap = [(q.scores[0], k) for k, q in enumerate(queues) if q.chunks]
    heapq.heapify(heap)
    while heap and not _met(costs, limits):
        _, k = heapq.heappop(heap)
        q = queues[k]
        _shift(cost, counts, costs, q.group, q.chunks[q.taken])
        q.taken += 1
        if q.taken < len(q.chunks):
            heapq.heappush(heap, (max(q.scores[q.taken], q.scores[q.taken - 1]), k))
    _restore(cost, counts, costs, queues, limits, most=max((q.taken for q in queues), default=0))
    return costs


def _restore(
    cost: CostModel,
    counts: list[int],
    costs: dict[Metric, float],
    queues: Sequence[_Queue],
    limits: Mapping[Target, float],
    most: int,
    worth: Callable[[_Queue], float] = lambda q: q.scores[q.taken - 1],
) -> None:
    """Put the most important chunks back (`most` per group) while the targets hold: the last step overshoots."""
    candidates = sorted((q for q in queues if q.taken), key=lambda q: -worth(q))
    for q in candidates:
        for _ in range(min(most, q.taken)):
            size = q.chunks[q.taken - 1]
            _shift(cost, counts, costs, q.group, -size)
            if not _met(costs, limits):
                _shift(cost, counts, costs, q.group, size)
                break
            q.taken -= 1


def _uniform(cost: CostModel, queues: Sequence[_Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
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
        low, high = (low, middle) if _met(at(middle), limits) else (middle, high)
    costs = at(high)
    _restore(cost, counts, costs, queues, limits, most=1)
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
