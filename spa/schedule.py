"""Pruning in steps: after each, what is left is scored again on the model as it is by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spa.budget.select import Selection
from spa.budget.targets import Target
from spa.cache import Cache
from spa.cost import Metric
from spa.errors import UsageError
from spa.groups import Analysis, Group, analyze_model
from spa.removal import Mask, kept_without
from spa.rewrite import rewritten
from spa.study import Fit, Removed, Scored, Study
from spa.twin import Twin

Index = NDArray[np.int64]


@dataclass
class _Origin:
    """Where the units of a group of the current model come from."""

    group: Group
    """Of the original model."""
    units: Index
    """Unit of the original per unit of the current group."""


class Schedule:
    """As `Study`, in steps: each goes the same factor of the way to the targets (f^(k / steps) after step k).

    Between steps the model is cut and compensated as the method says, so that scores are those of the model as it is.
    What leaves in the end is one removal from the original, which is cut, proved and compensated once.

    Args:
        study: the query on the original model.
        steps: at least 1.
        dims: sizes of symbolic axes, for costs.
    """

    def __init__(self, study: Study, steps: int, dims: Mapping[str, int] | None = None) -> None:
        self.study, self.steps, self.dims = study, steps, dims
        self.method, self.data = study.method, study.data
        self._groups = {g.name: g for g in study.analysis.groups}
        self._gone: dict[str, list[int]] = {}
        self._origins = {g.name: _Origin(g, np.arange(g.units)) for g in study.analysis.groups}
        self._last = study

    def score(self) -> Scored:
        """Scores before the last step, after all others are done.

        Raises:
            UsageError: a group of the original is not found again in the pruned model.
        """
        first = self.study
        step = first if self.steps == 1 else self._step(first.analysis, 1, first.cache)
        for k in range(1, self.steps):
            first.progress("step", k, self.steps)
            chosen = step.select(step.score())
            self._note(self._gone, chosen.removed)
            kept = kept_without(step.analysis, chosen.removed)
            twin = rewritten(step.analysis, kept)
            step.compensate(kept, twin, chosen.removed)
            analysis = first.query.extend(
                analyze_model(twin.model, self.dims, first.analysis.cost.overhead, free=first.analysis.coupling.free)
            )
            self._follow(analysis, chosen.removed)
            step = self._step(analysis, k + 1, Cache())
        self._last = step
        return step.score()

    def select(
        self,
        scored: Scored,
        spare: Mapping[Metric, float] | None = None,
        targets: Sequence[Target] | None = None,
    ) -> Selection:
        """What leaves the original, all steps together; see `Study.select`. `targets` are for one step."""
        last = self._last.select(scored, spare, targets)
        if self.steps == 1:
            return last
        gone = {name: list(units) for name, units in self._gone.items()}
        self._note(gone, last.removed)
        removed = tuple((self._groups[name], tuple(sorted(units))) for name, units in gone.items() if units)
        return replace(last, removed=removed)

    def compensate(
        self, kept: Mask, twin: Twin, removed: Removed, ready: Callable[[], object] = lambda: None
    ) -> Fit | None:
        """See `Study.compensate`: from the original's weights towards the original's outputs."""
        return self.study.compensate(kept, twin, removed, ready)

    def adjust(self, kept: Mask, twin: Twin, removed: Removed) -> None:
        """A draft of `compensate`: in closed form where that refits on the pruned prefix; see `Study.adjust`."""
        self.study.adjust(kept, twin, removed, draft=True, norms=self.method.recalibrate == "norm")

    def _step(self, analysis: Analysis, k: int, cache: Cache) -> Study:
        study = self.study
        cost = study.analysis.cost
        whole = cost.totals(cost.full) | {"units": float(sum(g.units for g in study.groups))}
        targets = []
        for target in study.query.targets:
            share = min(target.bound(whole[target.metric]) / whole[target.metric], 1.0) ** (k / self.steps)
            targets.append(replace(target, limit=share * whole[target.metric], relative=False))
        query = replace(study.query, analysis=analysis, targets=targets)
        return Study(query, study.method, study.seed, study.data, study.setup, cache, study.progress)

    def _note(self, gone: dict[str, list[int]], removed: Removed) -> None:
        """Add what leaves the current model to what left the original."""
        for group, units in removed:
            origin = self._origins[group.name]
            gone.setdefault(origin.group.name, []).extend(origin.units[list(units)].tolist())

    def _follow(self, analysis: Analysis, removed: Removed) -> None:
        """Find the groups of the model before the cut in the one after it."""
        lost = {group.name: list(units) for group, units in removed}
        origins = {}
        for group in analysis.groups:
            before = self._origins.get(group.name)
            units = None if before is None else np.delete(before.units, lost.get(group.name, []))
            if before is None or units is None or len(units) != group.units:
                raise UsageError(
                    f"--steps: group {group.name!r} cannot be followed through the cuts; prune in one step"
                )
            origins[group.name] = _Origin(before.group, units)
        self._origins = origins
