"""Which columns of linear layers can leave at least loss, and the best weights for those that stay. Pure numpy.

A linear layer y = W x + b reads inputs with covariance C. If the columns P of W leave and the others are refit with a
free bias, the expected squared error is

    tr(W_P G W_P^T),   G = ((C^-1)_PP)^-1 = C_PP - C_PS C_SS^-1 C_SP,

the part of x_P that x_S cannot explain (optimal brain surgeon with a block of columns: Hassibi & Stork, 1992;
structured: ZipLM, arXiv 2302.04089; with covariances in place of second moments: arXiv 2608.17657).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer (or one group of a grouped one) that reads the units."""

    weight: Array
    """[m, d]"""
    inverse: Array
    """(C + ridge)^-1 for the covariance C of its inputs, [d, d]."""
    columns: Index
    """[units, b]: the columns that each unit feeds; -1 where it feeds fewer than others."""
    importance: float = 1.0
    """What its squared error counts."""

    @staticmethod
    def of(
        weight: Array, covariance: Array, columns: Index, importance: float = 1.0, damping: float = 0.01
    ) -> Consumer:
        """From a covariance; `damping` is the ridge relative to the mean variance."""
        return Consumer(weight, np.asarray(np.linalg.inv(damped(covariance, damping))), columns, importance)

    @cached_property
    def rows(self) -> Array:
        """The weight up to a rotation of its rows, which no loss sees: at most d of them."""
        tall = len(self.weight) > 2 * self.weight.shape[1]
        return np.asarray(np.linalg.qr(self.weight, mode="r")) if tall else self.weight


@dataclass(frozen=True)
class Elimination:
    """The order in which units leave, and what that costs."""

    order: Index
    """[units]: first to leave first; the last ones never leave in `greedy` with `keep` > 0."""
    loss: Array
    """[units + 1]: loss after the first k units of `order` have left."""


def damped(covariance: Array, damping: float) -> Array:
    """C + damping x mean diagonal x I: a ridge that makes a rank-deficient estimate invertible."""
    scale = float(np.trace(covariance)) / max(len(covariance), 1)
    return covariance + (damping * scale + 1e-30) * np.eye(len(covariance))


class Refitter:
    """Weights [m, d] that minimise E||t - W x||^2 + damping x mean diagonal x ||W - prior||^2, with a free bias.

    The prior holds where the data says nothing. Factorised once, for any number of targets.
    """

    def __init__(self, covariance: Array, prior: Array, damping: float) -> None:
        """`covariance` is Cov(x), [d, d]; `prior` [m, d]; `damping` the relative ridge."""
        self.covariance, self.prior = covariance, prior
        self.inverse = np.linalg.inv(damped(covariance, damping))

    def __call__(self, cross: Array) -> Array:
        """`cross` is Cov(t, x), [m, d]."""
        return np.asarray(self.prior + (cross - self.prior @ self.covariance) @ self.inverse)


DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1000.0)
"""Ridges to choose from, weakest first; the last one all but keeps the prior."""


def transfer(
    fit_xx: NDArray[np.floating], fit_tx: NDArray[np.floating], test_xx: NDArray[np.floating],
    test_tx: NDArray[np.floating], prior: NDArray[np.floating],
) -> Array:  # fmt: skip
    """Squared error on test moments, up to a constant, of `Refitter` on fit moments, per damping of `DAMPINGS`.

    Args:
        fit_xx: Cov(x) to fit on, [d, d]; `fit_tx` is Cov(t, x), [m, d].
        fit_tx: see above.
        test_xx: Cov(x) to test on; `test_tx` likewise.
        test_tx: see above.
        prior: weights the ridge pulls to, [m, d].
    """
    # single precision is enough to choose among ridges that are ten times apart, and twice as fast
    fit_xx, fit_tx, test_xx, test_tx, prior = (a.astype(np.float32) for a in (fit_xx, fit_tx, test_xx, test_tx, prior))
    values, vectors = np.linalg.eigh(fit_xx)
    scale = max(float(values.mean()), 0.0)
    step = (fit_tx - prior @ fit_xx) @ vectors
    # with W = prior + step / (values + ridge): tr(W T W^T) - 2 tr(W t^T), in the basis of the eigenvectors
    turned = vectors.T @ test_xx @ vectors
    slope = (prior @ test_xx - test_tx) @ vectors
    out = []
    for damping in DAMPINGS:
        change = step / (np.maximum(values, 0) + damping * scale + 1e-30)
        out.append(float(np.sum((change @ turned) * change) + 2 * np.sum(slope * change)))
    return np.array(out)


def refit(covariance: Array, cross: Array, prior: Array, damping: float) -> Array:
    """`Refitter` for one target."""
    return Refitter(covariance, prior, damping)(cross)


def loss_of(consumers: Sequence[Consumer], removed: Index) -> float:
    """Loss when exactly the units `removed` leave."""
    total = 0.0
    for c in consumers:
        gone = _flat(c.columns[removed])
        if len(gone):
            w = c.rows[:, gone]
            total += c.importance * float(np.sum(w.T * np.linalg.solve(c.inverse[np.ix_(gone, gone)], w.T)))
    return total


def _flat(columns: Index) -> Index:
    flat = columns.reshape(-1)
    return flat[flat >= 0]


_COMPACT = 0.8
"""Share of columns still there below which the others are forgotten."""


class _State:
    """One consumer during elimination: inverse covariance and weights of what has not left."""

    def __init__(self, consumer: Consumer) -> None:
        self.columns = consumer.columns
        self.importance = consumer.importance
        self.inverse = consumer.inverse.copy()
        self.weight = consumer.rows.copy()
        self.left = np.ones(len(self.inverse), dtype=bool)

    def scores(self, units: Index) -> Array:
        """tr(w_u (Cinv_uu)^-1 w_u^T) of each unit, [units]."""
        columns = self.columns[units]
        present = columns >= 0
        safe = np.where(present, columns, 0)
        w = self.weight[:, safe] * present  # [m, units, b]
        if columns.shape[1] == 1:
            diagonal = self.inverse[safe[:, 0], safe[:, 0]]
            return np.asarray(self.importance * (w[:, :, 0] ** 2).sum(axis=0) / diagonal * present[:, 0])
        blocks = self.inverse[safe[:, :, None], safe[:, None, :]]
        both = present[:, :, None] & present[:, None, :]
        blocks = np.where(both, blocks, np.eye(columns.shape[1]))
        gram = np.einsum("mub,muc->ubc", w, w, optimize=True)
        return np.asarray(self.importance * np.einsum("ubc,ucb->u", gram, np.linalg.inv(blocks), optimize=True))

    def remove(self, units: Index) -> float:
        """Let units leave; returns the loss that adds."""
        gone = _flat(self.columns[units])
        if not len(gone):
            return 0.0
        block = np.linalg.inv(self.inverse[np.ix_(gone, gone)])
        w = self.weight[:, gone]
        loss = self.importance * float(np.einsum("ij,jk,ik->", w, block, w, optimize=True))
        rows = self.inverse[gone]
        self.weight -= (w @ block) @ rows
        self.inverse -= rows.T @ (block @ rows)
        self.left[gone] = False
        self.weight[:, gone] = 0.0
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.inverse[gone, gone] = 1.0
        if self.left.sum() < _COMPACT * len(self.left):
            self._compact()
        return loss

    def _compact(self) -> None:
        """Forget columns that have left: every step is quadratic in those that are there."""
        place = np.where(self.left, np.cumsum(self.left) - 1, -1)
        self.columns = np.where(self.columns >= 0, place[np.maximum(self.columns, 0)], -1)
        self.inverse = np.ascontiguousarray(self.inverse[np.ix_(self.left, self.left)])
        self.weight = np.ascontiguousarray(self.weight[:, self.left])
        self.left = np.ones(len(self.inverse), dtype=bool)


def greedy(consumers: Sequence[Consumer], *, steps: int = 256) -> Elimination:
    """Let units leave one by one, the cheapest first, re-scoring all others each time.

    At most `steps` rounds: with more units, several of the cheapest leave together (their joint loss is exact).
    """
    units = len(consumers[0].columns)
    states = [_State(c) for c in consumers]
    alive = np.arange(units)
    order: list[int] = []
    loss = [0.0]
    size = max(1, -(-units // steps))
    while len(alive):
        scores = np.sum([s.scores(alive) for s in states], axis=0)
        pick = np.argsort(scores, kind="stable")[: min(size, len(alive))]
        leaving = alive[pick]
        added = sum(s.remove(leaving) for s in states)
        share = np.maximum(scores[pick], 0) + 1e-300
        for unit, part in zip(leaving.tolist(), (share / share.sum()).tolist(), strict=True):
            order.append(unit)
            loss.append(loss[-1] + added * part)
        alive = np.delete(alive, pick)
    return Elimination(np.array(order), np.maximum.accumulate(np.array(loss)))


def one_shot(consumers: Sequence[Consumer]) -> Array:
    """The loss of each unit if it alone left, [units]."""
    units = np.arange(len(consumers[0].columns))
    return np.asarray(np.sum([_State(c).scores(units) for c in consumers], axis=0))


def swapped(consumers: Sequence[Consumer], removed: Index, *, rounds: int = 12) -> Index:
    """Exchange units between `removed` and the rest while that lowers the exact loss.

    The search starts from `removed`, or from as many of the units that cost least alone if those cost less together:
    it is never worse than either. Source: the local search of OSSCAR (arXiv 2403.12983), with exact acceptance.
    """
    units = len(consumers[0].columns)
    if not len(removed) or len(removed) == units:
        return np.sort(removed)
    starts = [np.sort(removed), np.sort(np.argsort(one_shot(consumers), kind="stable")[: len(removed)])]
    best, current = min(((loss_of(consumers, start), start) for start in starts), key=lambda pair: pair[0])
    for _ in range(rounds):
        gains, costs = _gains(consumers, current)
        kept = np.setdiff1d(np.arange(units), current)
        back = current[np.argsort(-gains, kind="stable")[:2]]
        out = kept[np.argsort(costs[kept], kind="stable")[:2]]
        trials = [np.append(np.setdiff1d(current, b), o) for b in back.tolist() for o in out.tolist()]
        losses = [loss_of(consumers, t) for t in trials]
        k = int(np.argmin(losses))
        if losses[k] >= best * (1 - 1e-9):
            break
        best, current = losses[k], np.sort(trials[k])
    return current


def _gains(consumers: Sequence[Consumer], removed: Index) -> tuple[Array, Array]:
    """What bringing each removed unit back alone would save [removed], and what each other's leaving costs [units]."""
    gains = np.zeros(len(removed))
    units = len(consumers[0].columns)
    costs = np.zeros(units)
    for c in consumers:
        state = _State(c)
        gone = _flat(c.columns[removed])
        if not len(gone):
            continue
        residual = np.linalg.inv(state.inverse[np.ix_(gone, gone)])
        v = state.weight[:, gone] @ residual
        place = {column: k for k, column in enumerate(gone.tolist())}
        for k, unit in enumerate(removed.tolist()):
            at = [place[column] for column in c.columns[unit].tolist() if column >= 0]
            if at:
                block = np.linalg.inv(residual[np.ix_(at, at)])
                gains[k] += c.importance * float(np.einsum("ij,jk,ik->", v[:, at], block, v[:, at]))
        state.remove(removed)
        costs += state.scores(np.arange(units))
    return gains, costs
