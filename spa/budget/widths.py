"""Widths by knapsacks: each with the costs of one group at a time, around the best widths so far.

The cost of a model is a product of sizes: what a width saves depends on the others. With all other widths where they
are it is a number per width, and the best widths are a multiple-choice knapsack. Its answer is costed anew and is the
centre of the next one if it is better; if not, widths may move half as far. Widths that their own knapsack cannot
better are a fixed point, where its costs are the true ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.budget.efficient import efficient
from spa.budget.knapsack import NODES, Choice, choose, pack
from spa.budget.queues import Queue, state
from spa.budget.targets import Target
from spa.cost import CostModel, Metric
from spa.evidence import Vector

ROUNDS = 24
"""Knapsacks at most; few models need ten."""
_CORRECTIONS = 2
"""Further knapsacks per round with limits that make up for the costs that were off."""
_CELLS = 4_000_000
"""What dynamic programming may take of each of them; beyond it HiGHS is faster."""
_WIDTHS = 1500
"""Widths of all groups that a knapsack chooses from: of more, a grid that gets finer as they settle."""
_FEWEST = 5
"""Per group at least."""
_SMALL = 600
"""Widths up to which every knapsack is solved to the optimum."""
_NODES = 15
"""Relaxations in each knapsack of a larger problem: the next one starts from better widths anyway."""
_EXCHANGED = 64
"""Groups up to which pairs are tried at a fixed point: the work grows with the square."""
_BETTER = 1 - 1e-9
"""A smaller gain is rounding."""

Taken = tuple[int, ...]
"""Chunks that have left, per queue."""


@dataclass(frozen=True)
class Optimality:
    """How good the widths are by the losses that were given."""

    loss: float
    """Of these widths: sum over groups of what leaves."""
    bound: float
    """No widths have less loss if costs are what they are around these, one group changed at a time: the optimum of
    that knapsack, or of its relaxation to fractions of widths."""
    gap: float
    """(loss - bound) / loss, 0 if nothing is lost."""
    efficient: float
    """Loss of the widths that `efficient` finds."""
    reached: dict[str, float]
    """Target -> cost of the model as a share of what it allows; the tightest is near 1 if the grid of widths allows."""
    rounds: int
    """Knapsacks set up, those with corrected limits not counted."""
    settled: bool
    """Whether the last of them gave these widths again: a fixed point."""


def knapsack(
    cost: CostModel, queues: Sequence[Queue], limits: Mapping[Target, float]
) -> tuple[dict[Metric, float], Optimality]:
    """Set how many chunks of each queue leave, never with more loss than `efficient`. Returns the costs.

    The limits can be reached, or the widths are the smallest ones.
    """
    problem = _Problem(cost, queues, limits)
    for q in queues:
        q.taken = 0
    efficient(cost, queues, limits)
    best = problem.taken()
    first = loss = problem.loss(best)
    reach, rounds, settled = 1.0, 0, loss <= 0
    while loss > 0 and rounds < ROUNDS:
        rounds += 1
        answer = problem.solve(best, reach)
        found = best if answer is None else problem.finish(best, reach, answer)
        settled = answer is not None and answer.picks == best
        last = (settled and problem.whole(best, reach)) or problem.last(best, reach)
        if last and problem.loss(found) >= loss * _BETTER:
            found = problem.exchanged(best)
        now = problem.loss(found)
        if now < loss * _BETTER:
            best, loss, reach = found, now, min(1.0, 2 * reach)
        elif last:
            break
        else:
            reach /= 2
    bound = problem.bound(best) if loss > 0 else loss
    problem.take(best)
    _, costs = state(cost, queues)
    reached = {t.text: costs[t.metric] / max(limit, 1e-30) for t, limit in limits.items()}
    gap = (loss - bound) / loss if loss > 0 else 0.0
    return costs, Optimality(loss, bound, gap, first, reached, rounds, settled)


class _Problem:
    """Losses and costs of widths as arrays."""

    def __init__(self, cost: CostModel, queues: Sequence[Queue], limits: Mapping[Target, float]) -> None:
        self.cost, self.queues, self.limits = cost, queues, limits
        self.gone = [np.cumsum([0, *q.chunks]) for q in queues]
        """Units that have left after so many chunks."""
        # A unit that leaves at a gain is no reason to take more out than the targets need.
        self.losses = [np.maximum.accumulate(np.maximum(np.array(q.losses, dtype=np.float64), 0.0)) for q in queues]
        self.nodes = NODES if sum(len(v) for v in self.losses) <= _SMALL else _NODES
        tightest: dict[Metric, float] = {}
        for t, limit in limits.items():
            tightest[t.metric] = min(limit, tightest.get(t.metric, np.inf))
        self.metrics = list(tightest)
        self.room = np.array(list(tightest.values()))

    def taken(self) -> Taken:
        return tuple(q.taken for q in self.queues)

    def take(self, taken: Taken) -> None:
        for q, k in zip(self.queues, taken, strict=True):
            q.taken = k

    def loss(self, taken: Taken) -> float:
        return float(sum(v[k] for v, k in zip(self.losses, taken, strict=True)))

    def costs(self, taken: Taken) -> Vector:
        """The true costs that are limited, [limits]."""
        self.take(taken)
        costs = state(self.cost, self.queues)[1]
        return np.array([costs[m] for m in self.metrics])

    def window(self, around: Taken, reach: float) -> list[NDArray[np.int64]]:
        """Chunks that may leave: within `reach` of a group's units from where it is; of many a few, spread evenly."""
        most = max(_WIDTHS // len(around), _FEWEST)
        out = []
        for q, gone, k in zip(self.queues, self.gone, around, strict=True):
            near = np.flatnonzero(np.abs(gone - gone[k]) <= reach * q.group.units)
            near = near[np.linspace(0, len(near) - 1, min(most, len(near))).round().astype(np.int64)]
            out.append(np.unique([*near, *range(max(k - 1, 0), min(k + 2, len(gone)))]))
        return out

    def last(self, around: Taken, reach: float) -> bool:
        """Whether half the reach leaves the same widths to choose from: next to where they are."""
        pairs = zip(self.window(around, reach), self.window(around, reach / 2), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    def whole(self, around: Taken, reach: float) -> bool:
        """Whether all widths are to choose from."""
        return all(len(w) == len(gone) for w, gone in zip(self.window(around, reach), self.gone, strict=True))

    def solve(self, around: Taken, reach: float, spare: Vector | float = 0.0) -> Choice | None:
        """The knapsack around some widths; `spare` is kept free of each limit."""
        windows = self.window(around, reach)
        losses = [v[w] for v, w in zip(self.losses, windows, strict=True)]
        changes = [c[:, w] for c, w in zip(self.changes(around), windows, strict=True)]
        room = self.room - spare - self.costs(around)
        answer = _additive(losses, changes, room) or choose(losses, changes, room, self.nodes)
        if answer is None:
            return None
        picks = tuple(int(w[k]) for w, k in zip(windows, answer.picks, strict=True))
        return Choice(picks, answer.loss, answer.bound)

    def bound(self, around: Taken) -> float:
        """What no widths are below at the costs around some, all widths being allowed."""
        nodes = self.nodes if self.nodes == NODES else 1
        found = choose(self.losses, self.changes(around), self.room * (1 + 1e-12) - self.costs(around), nodes)
        loss = self.loss(around)
        return loss if found is None else min(found.bound, loss)

    def changes(self, around: Taken) -> list[NDArray[np.float64]]:
        """By how much the limited costs change with the width of one group, the others staying: [limits, widths]."""
        self.take(around)
        counts = state(self.cost, self.queues)[0]
        out = []
        for q, gone in zip(self.queues, self.gone, strict=True):
            back = (gone[q.taken] - gone).astype(np.float64)
            new = {leaf: counts[leaf] + n * back for leaf, n in q.group.leaves.items()}
            totals = self.cost.sweep(counts, new, self.metrics)
            if "units" in totals:
                totals["units"] = -gone.astype(np.float64)
            rows = np.stack(
                [np.broadcast_to(np.asarray(totals[m], dtype=np.float64), gone.shape) for m in self.metrics]
            )
            out.append(rows - rows[:, q.taken, None])
        return out

    def finish(self, around: Taken, reach: float, answer: Choice) -> Taken:
        """The best of a knapsack's answer, and of its answers to limits corrected by how far its costs were off.

        Where the true cost exceeds a limit more chunks leave, and what fits comes back.
        """
        centre, changes = self.costs(around), self.changes(around)
        found: list[Taken] = []
        next_: Choice | None = answer
        for _ in range(_CORRECTIONS + 1):
            if next_ is None:
                break
            picks = next_.picks
            true = self.costs(picks)
            efficient(self.cost, self.queues, self.limits)
            found.append(self.taken())
            off = true - centre - np.sum([c[:, k] for c, k in zip(changes, picks, strict=True)], axis=0)
            if (np.abs(off) <= 1e-4 * np.abs(self.room)).all():
                break
            next_ = self.solve(around, reach, off)
        return min(found, key=self.loss)

    def exchanged(self, around: Taken) -> Taken:
        """The best widths that differ in two groups, by one chunk in the first of them.

        At a fixed point changes of one group at a time are weighed rightly, and those of neighbours together are not.
        """
        best, least = around, self.loss(around) * _BETTER
        for k in range(len(around) if len(around) <= _EXCHANGED else 0):
            for step in (-1, 1):
                if not 0 <= around[k] + step < len(self.losses[k]):
                    continue
                centre = (*around[:k], around[k] + step, *around[k + 1 :])
                loss, room = self.loss(centre), self.room * (1 + 1e-12) - self.costs(centre)
                for h, change in enumerate(self.changes(centre)):
                    losses = loss + self.losses[h] - self.losses[h][centre[h]]
                    losses[(change > room[:, None]).any(axis=0)] = np.inf
                    pick = int(np.argmin(losses))
                    if losses[pick] < least:
                        best, least = (*centre[:h], pick, *centre[h + 1 :]), float(losses[pick])
        self.take(best)
        efficient(self.cost, self.queues, self.limits)
        return self.taken()


def _additive(losses: Sequence[Vector], changes: Sequence[NDArray[np.float64]], room: Vector) -> Choice | None:
    """The answer where chunks are independent items of whole cost under one limit; None where they are not.

    They are if a group's chunks cost the same and each loses at least what the one before it does: the first to leave
    are then the least worth keeping.
    """
    if len(room) != 1:
        return None
    values = [np.diff(v) for v in losses]
    costs = [-np.diff(c[0]) for c in changes]
    if any((np.diff(v) < 0).any() or (np.diff(c) != 0).any() for v, c in zip(values, costs, strict=True)):
        return None
    sizes = np.concatenate(costs)
    capacity = float(room[0]) - sum(float(c[0, -1]) for c in changes)
    if (sizes != np.rint(sizes)).any() or (sizes < 0).any() or capacity < 0:
        return None
    packing = pack(np.concatenate(values), sizes.astype(np.int64), int(capacity), _CELLS)
    if not packing.optimal:
        return None
    group = np.repeat(np.arange(len(values)), [len(v) for v in values])
    stay = np.bincount(group[packing.chosen], minlength=len(values))
    picks = tuple((np.array([len(v) for v in values]) - stay).tolist())
    loss = float(sum(v[k] for v, k in zip(losses, picks, strict=True)))
    return Choice(picks, loss, loss)
