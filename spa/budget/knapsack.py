"""Knapsack problems on plain numbers: what to keep under a capacity, and one width per group under several limits.

The 0/1 problem is that of Knapsack Pruning (arXiv 2002.08258): values, integer costs, one capacity. The
multiple-choice problem picks one width per group, with any losses and several limits at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.evidence import Vector

CELLS = 50_000_000
"""Items x capacity that dynamic programming may take: about half a second, one byte per cell."""
NODES = 400
"""Relaxations that branch and bound may solve, some milliseconds each."""
GAP = 1e-5
"""Relative distance to the optimum at which it stops."""


@dataclass(frozen=True)
class Packing:
    """What a knapsack holds."""

    chosen: NDArray[np.bool_]
    """[items]"""
    value: float
    optimal: bool
    """Proved; greedy fillings are not."""


@dataclass(frozen=True)
class Choice:
    """One choice per group."""

    picks: tuple[int, ...]
    """Index of the choice, per group."""
    loss: float
    """Sum of the losses."""
    bound: float
    """No choice within the limits has less."""


def pack(values: Vector, costs: NDArray[np.int64], capacity: int, cells: int = CELLS) -> Packing:
    """The items with the largest sum of values whose costs fit: by dynamic programming, or greedily if that is too big.

    Args:
        values: worth of each item, [items], at least 0.
        costs: whole numbers, [items], at least 0.
        capacity: at least 0.
        cells: items x capacity (both divided by the costs' common divisor) up to which the optimum is found.

    Raises:
        ValueError: something is negative.
    """
    if capacity < 0 or (costs < 0).any() or (values < 0).any():
        raise ValueError("values, costs and capacity must not be negative")
    if int(costs.sum()) <= capacity:
        return Packing(np.ones(len(costs), dtype=np.bool_), float(values.sum()), True)
    unit = int(np.gcd.reduce(costs))
    sizes, room = costs // unit, capacity // unit
    if len(costs) * (room + 1) > cells:
        return _greedy(values, costs, capacity)
    best = np.zeros(room + 1)
    taken = np.zeros((len(costs), room + 1), dtype=np.bool_)
    for k, (value, size) in enumerate(zip(values.tolist(), sizes.tolist(), strict=True)):
        if size > room:
            continue
        other = best[: room + 1 - size] + value
        better = other > best[size:]
        taken[k, size:] = better
        best[size:] = np.where(better, other, best[size:])  # a new array is made before the old one is written
    chosen = np.zeros(len(costs), dtype=np.bool_)
    for k in range(len(costs) - 1, -1, -1):
        if taken[k, room]:
            chosen[k] = True
            room -= int(sizes[k])
    chosen |= costs == 0
    return Packing(chosen, float(values[chosen].sum()), True)


def _greedy(values: Vector, costs: NDArray[np.int64], capacity: int) -> Packing:
    """Best value per cost first, whatever still fits, or the one best item: at least half the optimum."""
    chosen = np.zeros(len(costs), dtype=np.bool_)
    room = capacity
    for k in np.argsort(-values / np.maximum(costs, 1e-30), kind="stable").tolist():
        if costs[k] <= room:
            chosen[k] = True
            room -= int(costs[k])
    fits = np.flatnonzero(costs <= capacity)
    if len(fits) and values[fits].max() > values[chosen].sum():
        chosen[:] = costs == 0
        chosen[fits[np.argmax(values[fits])]] = True
    return Packing(chosen, float(values[chosen].sum()), False)


def choose(
    losses: Sequence[Vector], costs: Sequence[NDArray[np.float64]], limits: Vector, nodes: int = NODES
) -> Choice | None:
    """One choice per group with the least sum of losses, the sum of costs being within all limits.

    Branch and bound over ranges of choices. HiGHS solves the relaxations to fractions of choices; each bounds the loss
    from below and, rounded, from above, and what its reduced costs say is in no better solution is left out further
    down. (HiGHS's own, `scipy.optimize.milp`, branches on single choices and takes several times as long; that of
    scipy 1.17 also prints to the process's standard output, where `--json` goes.)

    Args:
        losses: per group, [choices].
        costs: per group, [limits, choices]; any sign.
        limits: of the sums of costs, [limits].
        nodes: relaxations at most. A limit in time would make the result depend on how busy the machine is.

    Returns:
        The optimum up to `GAP`, or the best found; None if nothing that meets the limits was found.
    """
    flat, rows = np.concatenate(losses), np.concatenate(costs, axis=1)
    sizes = [len(v) for v in losses]
    group = np.repeat(np.arange(len(losses)), sizes)
    # Losses and rows of about 1: the solver's tolerances are absolute.
    worth = max(float(np.median(flat[flat > 0])) if (flat > 0).any() else 1.0, 1e-300)
    scale = np.maximum(np.abs(rows).max(axis=1), 1e-300)
    problem = _Problem(flat / worth, rows / scale[:, None], limits / scale, group)
    known, bound = _branch(problem, nodes)
    if known is None:
        return None
    loss = float(flat[known].sum())
    starts = np.cumsum([0, *sizes[:-1]])
    return Choice(tuple((known - starts).tolist()), loss, min(bound * worth, loss))


@dataclass(frozen=True)
class _Problem:
    """Choices in a row, those of a group together and in order."""

    losses: Vector
    rows: NDArray[np.float64]
    room: Vector
    group: NDArray[np.int64]
    """[choices]"""

    def only(self, some: NDArray[np.int64]) -> _Problem:
        """With these choices."""
        return _Problem(self.losses[some], self.rows[:, some], self.room, self.group[some])

    def fits(self, picks: NDArray[np.int64]) -> bool:
        """Whether choices meet the limits, up to rounding."""
        return bool((self.rows[:, picks].sum(axis=1) <= self.room + 1e-12 * (1 + np.abs(self.room))).all())


def _branch(problem: _Problem, nodes: int) -> tuple[NDArray[np.int64] | None, float]:
    """The best choices found, as indices, one per group; and what no choices are below."""
    known, most = None, np.inf
    heap: list[tuple[float, int, NDArray[np.int64]]] = [(-np.inf, 0, np.arange(len(problem.losses)))]
    pushed = 0
    while heap and nodes > 0 and heap[0][0] < most * (1 - GAP):
        _, _, some = heapq.heappop(heap)
        nodes -= 1
        here = problem.only(some)
        relaxed = _relaxed(here)
        if relaxed is None:
            continue
        bound, shares, reduced = relaxed
        picks = _rounded(here, shares)
        if picks is not None and here.losses[picks].sum() < most:
            known, most = some[picks], float(here.losses[picks].sum())
        pivot = _pivot(here.group, shares)
        if pivot is None or bound >= most:
            continue
        useful = reduced <= (most - bound) * (1 + 1e-9) + 1e-12
        order = np.arange(len(some))
        for side in (order <= pivot, order > pivot):
            part = useful & (side | (here.group != here.group[pivot]))
            if len(np.unique(here.group[part])) == int(problem.group[-1]) + 1:
                pushed += 1
                heapq.heappush(heap, (bound, pushed, some[part]))
    return known, min(heap[0][0], most) if heap else most


def _relaxed(problem: _Problem) -> tuple[float, Vector, Vector] | None:
    """The least loss of fractions of choices, the fractions, and their reduced costs; None if nothing fits."""
    from scipy.optimize import linprog  # half a second to import, which other commands need not wait
    from scipy.sparse import csr_array

    group = problem.group
    one = csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(int(group[-1]) + 1, len(group)))
    found = linprog(problem.losses, problem.rows, problem.room, one, np.ones(one.shape[0]), method="highs-ds")
    if found.x is None:
        return None
    return float(found.fun), np.asarray(found.x), np.asarray(found.lower.marginals)


def _pivot(group: NDArray[np.int64], shares: Vector) -> int | None:
    """Where to divide the group whose fractions lie furthest apart: the last choice of its first half.

    None if there are no fractions.
    """
    place = np.arange(len(group), dtype=np.float64)
    total = np.maximum(np.bincount(group, shares), 1e-30)
    mean = np.bincount(group, shares * place) / total
    spread = np.bincount(group, shares * np.abs(place - mean[group]))
    widest = int(np.argmax(spread))
    return int(mean[widest]) if spread[widest] > 1e-6 else None


def _rounded(problem: _Problem, shares: Vector) -> NDArray[np.int64] | None:
    """A choice per group near fractions of choices, within the limits, that no exchange of one of them improves.

    Of each group the last choice that is used at all is the start: in a row of growing removals the cheapest.
    """
    losses, rows, group = problem.losses, problem.rows, problem.group
    used = np.flatnonzero(shares > 1e-9)
    picks = np.zeros(int(group[-1]) + 1, dtype=np.int64)
    picks[group[used]] = used
    while problem.fits(picks):
        gain = losses[picks][group] - losses
        left = problem.room + 1e-12 * (1 + np.abs(problem.room)) - rows[:, picks].sum(axis=1)
        gain[(rows - rows[:, picks][:, group] > left[:, None]).any(axis=0)] = 0
        best = int(np.argmax(gain))
        if gain[best] <= 0:
            return picks
        picks[group[best]] = best
    return None
