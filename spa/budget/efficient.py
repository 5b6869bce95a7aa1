"""Widths by least loss per cost saved: greedy along the lower convex hulls of the groups' losses."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from spa.budget.queues import Queue, met, restore, shift, state
from spa.budget.targets import Target
from spa.cost import CostModel, Metric


def efficient(cost: CostModel, queues: Sequence[Queue], limits: Mapping[Target, float]) -> dict[Metric, float]:
    """Take chunks out, from what is left of the queues on, until the limits hold, then put back what fits.

    Savings are those of the model as it then is, and only shrink while it does: a candidate is valued again before it
    is taken, and waits if another one is better by then. Returns the costs.

    Measured costs fall in stairs: a chunk may save nothing, or even cost, while the next two save much. There a
    candidate is as many chunks as are best together.
    """
    counts, costs = state(cost, queues)

    def price(q: Queue) -> tuple[float, int]:
        """Loss per saving of the next step, and how many chunks it is."""
        missed = {t.metric: limit for t, limit in limits.items() if costs[t.metric] > limit}
        return together(q, missed) if "latency" in missed else (single(q, missed), 1)

    def together(q: Queue, missed: Mapping[Metric, float]) -> tuple[float, int]:
        """Of all numbers of chunks the one with the least loss per saving."""
        gone = np.concatenate([[0], np.cumsum(q.chunks[q.taken :])]).astype(np.float64)
        new = {leaf: counts[leaf] - n * gone for leaf, n in q.group.leaves.items()}
        totals = cost.sweep(counts, new, list(missed))
        if "units" in totals:
            totals["units"] = -gone
        saved = np.zeros(len(gone))
        for metric, limit in missed.items():
            values = np.broadcast_to(totals[metric], gone.shape)
            saved += (values[0] - values) / max(limit, 1e-30)
        losses = np.maximum(np.array(q.losses[q.taken :]) - q.losses[q.taken], 0.0)
        worth = np.where(saved > 0, losses / np.maximum(saved, 1e-30), np.inf)
        best = int(np.argmin(worth))
        return (float(worth[best]), best) if np.isfinite(worth[best]) else (math.inf, 1)

    def single(q: Queue, missed: Mapping[Metric, float]) -> float:
        """Loss per saving of the next step along the hull; savings count relative to the limits still missed."""
        ends = np.cumsum(q.chunks[q.taken :])
        slope = float(((np.array(q.losses[q.taken + 1 :]) - q.losses[q.taken]) / ends).min())
        size = q.chunks[q.taken]
        new = {leaf: counts[leaf] - n * size for leaf, n in q.group.leaves.items()}
        change = cost.change(counts, new) | {"units": float(-size)}
        saved = sum(-change[m] / max(limit, 1e-30) for m, limit in missed.items())
        return max(slope, 0.0) * size / saved if saved > 0 else math.inf

    heap = [] if met(costs, limits) else [(price(q)[0], k) for k, q in enumerate(queues) if q.taken < len(q.chunks)]
    heapq.heapify(heap)
    while heap and not met(costs, limits):
        _, k = heapq.heappop(heap)
        q = queues[k]
        now, step = price(q)
        if heap and now > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (now, k))
            continue
        shift(cost, counts, costs, q.group, sum(q.chunks[q.taken : q.taken + step]))
        q.taken += step
        if q.taken < len(q.chunks):
            heapq.heappush(heap, (price(q)[0], k))
    most = max((q.taken for q in queues), default=0)
    restore(cost, counts, costs, queues, limits, most, worth=lambda q: q.last_loss)
    return costs
