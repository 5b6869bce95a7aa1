"""Which columns of linear layers can leave at least loss, and the best weights for those that stay. Pure numpy.

A linear layer y = W x + b reads inputs with covariance C. If the columns P of W leave and the others are refit with a
free bias, the expected squared error is

    tr(W_P G W_P^T),   G = ((C^-1)_PP)^-1 = C_PP - C_PS C_SS^-1 C_SP,

the part of x_P that x_S cannot explain (optimal brain surgeon with a block of columns: Hassibi & Stork, 1992;
structured: ZipLM, arXiv 2302.04089; with covariances in place of second moments: arXiv 2608.17657).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._solve = _solver(damped(covariance, damping))

    def __call__(self, cross: Array) -> Array:
        """`cross` is Cov(t, x), [m, d]."""
        out = np.empty_like(self.prior)
        for start in range(0, len(out), _ROWS):  # there are vocabularies of a hundred thousand rows
            rows = slice(start, start + _ROWS)
            step = cross[rows] - self.prior[rows] @ self.covariance
            np.add(self.prior[rows], self._solve(step.T).T, out=out[rows])
        return out


_ROWS = 4096
"""Outputs that are refit at a time."""


def _solver(matrix: Array) -> Callable[[Array], Array]:
    """b -> matrix^-1 b for a symmetric matrix; by Cholesky factors unless rounding made it indefinite."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve, lu_factor, lu_solve  # a tenth of a second to import

    try:
        factor = cho_factor(matrix)
    except LinAlgError:
        lu = lu_factor(matrix)
        return lambda b: np.asarray(lu_solve(lu, b))
    return lambda b: np.asarray(cho_solve(factor, b, overwrite_b=True))


DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1000.0)
"""Ridges to choose from, weakest first; the last one all but keeps the prior."""
_SKETCH = 256
"""Random combinations that stand for more than twice as many outputs where ridges are compared."""


def transfer(
    fit_xx: NDArray[np.floating], fit_tx: NDArray[np.floating], test_xx: NDArray[np.floating],
    test_tx: NDArray[np.floating], prior: NDArray[np.floating],
) -> Array:  # fmt: skip
    """Squared error on test moments, up to a constant, of `Refitter` on fit moments, per damping of `DAMPINGS`.

    With many outputs it is estimated from random combinations of them, whose squares have the same mean (Johnson &
    Lindenstrauss, 1984; signs as in Achlioptas, 2003): the same ones for all ridges, which keeps their order.

    Args:
        fit_xx: Cov(x) to fit on, [..., d, d]; `fit_tx` is Cov(t, x), [..., m, d]. Errors of leading axes add up.
        fit_tx: see above.
        test_xx: Cov(x) to test on; `test_tx` likewise.
        test_tx: see above.
        prior: weights the ridge pulls to, [..., m, d].
    """
    outputs, columns = prior.shape[-2:]
    if outputs > 2 * _SKETCH:
        signs = np.random.default_rng(0).integers(0, 2, (_SKETCH, outputs), dtype=np.int8)
        sketch = (2.0 * signs - 1.0) / np.sqrt(_SKETCH)
        fit_tx, test_tx, prior = sketch @ fit_tx, sketch @ test_tx, sketch @ prior
    # single precision is enough to choose among ridges that are ten times apart, and twice as fast
    fit_xx, fit_tx, test_xx, test_tx, prior = (a.astype(np.float32) for a in (fit_xx, fit_tx, test_xx, test_tx, prior))
    step = np.swapaxes(fit_tx - prior @ fit_xx, -1, -2)
    slope = prior @ test_xx - test_tx
    ridge = np.maximum(np.trace(fit_xx, axis1=-2, axis2=-1) / columns, 0.0)[..., None]
    diagonal = np.einsum("...ii->...i", fit_xx)  # a view: each ridge is put on top of the same covariance
    plain, out = diagonal.copy(), []
    for damping in DAMPINGS:
        diagonal[...] = plain + np.float32(damping) * ridge + np.float32(1e-30)
        change = np.swapaxes(np.linalg.solve(fit_xx, step), -1, -2)
        out.append(float(np.sum((change @ test_xx) * change) + 2 * np.sum(slope * change)))
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
        return self.importance * _block_scores(self.weight, columns, _blocks(self.inverse, columns))

    def remove(self, units: Index) -> float:
        """Let units leave; returns the loss that adds."""
        gone = _flat(self.columns[units])
        if not len(gone):
            return 0.0
        block = np.linalg.inv(self.inverse[np.ix_(gone, gone)])
        w = self.weight[:, gone]
        loss = self.importance * float(np.einsum("ij,jk,ik->", w, block, w, optimize=True))
        rows = self.inverse[gone]
        _subtract(self.weight, w @ block, rows)
        _subtract(self.inverse, rows.T, block @ rows)
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


def _subtract(target: Array, left: Array, right: Array) -> None:
    """target -= left @ right without a matrix in between, [a, b], [a, k], [k, b]; `target` lies row by row."""
    from scipy.linalg.blas import dgemm  # a tenth of a second to import

    assert target.flags.c_contiguous
    dgemm(-1.0, right.T, left.T, beta=1.0, c=target.T, overwrite_c=True)


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
    alone = [c.importance * _block_scores(c.rows, c.columns, _blocks(c.inverse, c.columns)) for c in consumers]
    return np.asarray(np.sum(alone, axis=0))


def swapped(consumers: Sequence[Consumer], removed: Index, *, rounds: int = 12) -> Index:
    """Exchange units between `removed` and the rest while that lowers the exact loss.

    The search starts from `removed`, or from as many of the units that cost least alone if those cost less together:
    it is never worse than either. Source: the local search of OSSCAR (arXiv 2403.12983), with exact acceptance.
    """
    units = len(consumers[0].columns)
    if not len(removed) or len(removed) == units:
        return np.sort(removed)
    starts = [np.sort(removed), np.sort(np.argsort(one_shot(consumers), kind="stable")[: len(removed)])]
    begun = [[_Out(c, start) for c in consumers] for start in starts]
    best, k = min((sum(o.loss for o in row), k) for k, row in enumerate(begun))
    current, out = starts[k], begun[k]
    for _ in range(rounds):
        kept = np.setdiff1d(np.arange(units), current)
        gains, costs = (np.sum(parts, axis=0) for parts in zip(*(o.changes(current, kept) for o in out), strict=True))
        back = current[np.argsort(-gains, kind="stable")[:2]].tolist()
        leave = kept[np.argsort(costs, kind="stable")[:2]].tolist()
        less = [[o.without(unit) for o in out] for unit in back]
        trials = [(row, unit, sum(o.cost(unit) for o in row)) for row in less for unit in leave]
        losses = [sum(o.loss for o in row) + added for row, _, added in trials]
        k = int(np.argmin(losses))
        if losses[k] >= best * (1 - 1e-9):
            break
        row, unit, _ = trials[k]
        best, out = losses[k], [o.plus(unit) for o in row]
        current = np.sort(np.append(np.setdiff1d(current, back[k // len(leave)]), unit))
    return current


class _Out:
    """One consumer with some units gone: what bringing one back saves, and what another's leaving costs.

    With P the columns that are gone, R = ((C^-1)_PP)^-1 and V = W_P R, the loss is tr(V W_P^T); both follow single
    units in and out by the rules for the inverse of a bordered matrix, at a cost that is quadratic in P.
    """

    def __init__(self, consumer: Consumer, removed: Index) -> None:
        self.consumer = consumer
        self.gone = _flat(consumer.columns[removed])
        self.residual: Array = np.asarray(np.linalg.inv(consumer.inverse[np.ix_(self.gone, self.gone)]))
        self.shift: Array = consumer.rows[:, self.gone] @ self.residual
        self.loss = consumer.importance * float(np.sum(self.shift * consumer.rows[:, self.gone]))

    def _with(self, gone: Index, residual: Array, shift: Array, loss: float) -> _Out:
        out = object.__new__(_Out)
        out.consumer, out.gone, out.residual, out.shift, out.loss = self.consumer, gone, residual, shift, loss
        return out

    def changes(self, removed: Index, kept: Index) -> tuple[Array, Array]:
        """What each removed unit would save alone if it came back [removed], and each other cost if it left [kept]."""
        c = self.consumer
        place = np.full(len(c.inverse), -1)
        place[self.gone] = np.arange(len(self.gone))
        mine = np.where(c.columns[removed] >= 0, place[c.columns[removed]], -1)
        gains = np.zeros(len(removed))
        if len(self.gone):
            gains = _block_scores(self.shift, mine, _blocks(self.residual, mine))
        columns = c.columns[kept]
        safe = np.where(columns >= 0, columns, 0).reshape(-1)
        bridge = c.inverse[np.ix_(self.gone, safe)]
        reach = self.residual @ bridge
        weight = c.rows[:, safe] - c.rows[:, self.gone] @ reach
        shape = (len(self.gone), len(kept), columns.shape[1])
        through = np.einsum("pui,puj->uij", bridge.reshape(shape), reach.reshape(shape), optimize=True)
        own = np.where(columns >= 0, np.arange(columns.size).reshape(columns.shape), -1)
        return gains * c.importance, c.importance * _block_scores(weight, own, _blocks(c.inverse, columns) - through)

    def without(self, unit: int) -> _Out:
        """With one unit back."""
        own = self.consumer.columns[unit]
        at = np.isin(self.gone, own[own >= 0])
        if not at.any():
            return self
        rest = ~at
        block = np.linalg.inv(self.residual[np.ix_(at, at)])
        moved = block @ self.residual[np.ix_(at, rest)]
        saved = float(np.sum((self.shift[:, at] @ block) * self.shift[:, at]))
        return self._with(
            self.gone[rest],
            self.residual[np.ix_(rest, rest)] - self.residual[np.ix_(rest, at)] @ moved,
            self.shift[:, rest] - self.shift[:, at] @ moved,
            self.loss - self.consumer.importance * saved,
        )

    def _leaving(self, unit: int) -> tuple[Index, Array, Array, Array]:
        """Columns of a unit, what leads there from those that are gone, its own residual, and its weight by now."""
        c = self.consumer
        own = c.columns[unit]
        own = own[own >= 0]
        bridge = c.inverse[np.ix_(self.gone, own)]
        reach = self.residual @ bridge
        block = np.linalg.inv(c.inverse[np.ix_(own, own)] - bridge.T @ reach)
        return own, reach, block, c.rows[:, own] - self.shift @ bridge

    def cost(self, unit: int) -> float:
        """What one more unit costs."""
        own, _, block, weight = self._leaving(unit)
        return self.consumer.importance * float(np.sum((weight @ block) * weight)) if len(own) else 0.0

    def plus(self, unit: int) -> _Out:
        """With one unit more gone."""
        own, reach, block, weight = self._leaving(unit)
        if not len(own):
            return self
        side = reach @ block
        residual = np.block([[self.residual + side @ reach.T, -side], [-side.T, block]])
        shift = np.hstack([self.shift - weight @ side.T, weight @ block])
        added = self.consumer.importance * float(np.sum((weight @ block) * weight))
        return self._with(np.append(self.gone, own), residual, shift, self.loss + added)


def _blocks(matrix: Array, columns: Index) -> Array:
    """The block of each unit on the diagonal, [units, b, b]; -1 is no column."""
    safe = np.where(columns >= 0, columns, 0)
    return np.asarray(matrix[safe[:, :, None], safe[:, None, :]])


def _block_scores(weight: Array, columns: Index, blocks: Array) -> Array:
    """tr(w_u B_u^-1 w_u^T) of each unit, [units]; -1 is no column."""
    present = columns >= 0
    safe = np.where(present, columns, 0)
    if columns.shape[1] == 1:
        power = np.einsum("mc,mc->c", weight, weight)[safe[:, 0]]  # no matrix of squares
        return np.asarray(np.where(present[:, 0], power / blocks[:, 0, 0], 0.0))
    w = weight[:, safe] * present  # [m, units, b]
    blocks = np.where(present[:, :, None] & present[:, None, :], blocks, np.eye(columns.shape[1]))
    gram = np.einsum("mub,muc->ubc", w, w, optimize=True)
    return np.asarray(np.einsum("ubc,ucb->u", gram, np.linalg.inv(blocks), optimize=True))
