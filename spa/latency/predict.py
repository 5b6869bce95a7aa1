"""From a table to a cost: the latency of a model as a function of its widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spa.axes import Axis
from spa.cost import Amount, CostTerm, Metric, Sizes, Term
from spa.errors import UsageError
from spa.groups import Analysis
from spa.latency.sizes import Follows, Widths
from spa.latency.surface import Surface
from spa.latency.table import Table

_REWEIGHTED = 20


@dataclass(frozen=True, eq=False)
class OperatorTerm:
    """Milliseconds of an operator, see `spa.cost.CostTerm`."""

    surface: Surface
    """Microseconds."""
    follows: tuple[Follows, ...]
    factor: float
    """Milliseconds per microsecond, times how often the operator stands in the model."""
    metric: Metric = "latency"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What it depends on."""
        return tuple(f.axis for f in self.follows)

    def value(self, sizes: Sequence[Sizes]) -> Amount:
        """See `spa.cost.CostTerm`."""
        several = any(isinstance(size, np.ndarray) for size in sizes)
        columns = np.broadcast_arrays(*[np.atleast_1d(np.asarray(size, dtype=np.int64)) for size in sizes])
        scaled = [f.multiply * column // f.divide for f, column in zip(self.follows, columns, strict=True)]
        found = self.factor * self.surface.at([tuple(row) for row in np.stack(scaled, axis=1).tolist()])
        return found if several else float(found[0])


@dataclass(frozen=True)
class Fitness:
    """How well a table explains the models that it was measured on."""

    operators: float
    """Share of the dense model's time that operators take."""
    error: float
    """Median over the models of |predicted / measured - 1|."""
    worst: float
    """Largest of them."""


@dataclass(frozen=True)
class Prediction:
    """The latency of one model."""

    terms: tuple[CostTerm, ...]
    fitness: Fitness


def predicted(table: Table, sha256: str, analysis: Analysis) -> Prediction:
    """The latency of a model as terms of a cost.

    Args:
        table: with this model in it.
        sha256: of the file that was measured.
        analysis: of that model, or of what is left of it after some of its groups lost units.

    Raises:
        UsageError: the table does not know the model.
    """
    profile = table.models.get(sha256)
    if profile is None:
        raise UsageError("the latency table has no measurements of this model: run `spa profile` on it first")
    widths = Widths(analysis, profile.configurations)
    fixed = np.zeros(len(profile.milliseconds))
    sums = np.zeros(len(profile.milliseconds))
    found: list[tuple[Surface, tuple[Follows, ...], int]] = []
    for slot in profile.slots:
        surface = table.operators[slot.operator].surface
        rows = [widths.followed(np.array(row, dtype=np.int64)) for row in slot.sizes]
        times = 1e-3 * slot.count * surface.at(list(zip(*slot.sizes, strict=True)) or [()] * len(sums))
        follows = tuple(row[0] for row in rows if row is not None)
        if not follows or len(follows) < len(rows):
            fixed += times
        else:
            sums += times
            found.append((surface, follows, slot.count))
    measured = np.array(profile.milliseconds)
    still = float(np.median(fixed))
    rest, scale = residual(sums + still, measured)
    guess = rest + scale * (sums + still)
    errors = np.abs(guess / measured - 1)
    fitness = Fitness(float(1 - rest / guess[0]), float(np.median(errors)), float(errors.max()))
    constant = Term("latency", rest + scale * still, ())
    return Prediction((constant, *(OperatorTerm(s, f, 1e-3 * scale * n) for s, f, n in found)), fitness)


def residual(sums: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """(rest, scale): measured = rest + scale x sum of the operators, with about the least sum of relative errors.

    The rest is what a run takes besides its operators, or what they are measured too long by. It is no more than noise
    where all models take about as long.
    """
    rows = np.stack([np.ones(len(sums)), sums], axis=1) / measured[:, None]
    weights = np.ones(len(sums))
    rest, scale = 0.0, 1.0
    for _ in range(
        _REWEIGHTED
    ):  # least absolute deviations: a slow moment of the machine is no reason to turn the line
        rest, scale = np.linalg.lstsq(rows * weights[:, None], weights, rcond=None)[0].tolist()
        weights = 1 / np.sqrt(np.maximum(np.abs(rows @ (rest, scale) - 1), 0.003))
    if scale <= 0 or rest + scale * float(sums.min()) <= 0:
        return 0.0, float(np.median(measured / sums))
    return rest, scale


def extended(analysis: Analysis, terms: Sequence[CostTerm]) -> Analysis:
    """An analysis whose cost knows latency."""
    return replace(analysis, cost=analysis.cost.extended("latency", terms))
