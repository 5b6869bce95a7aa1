"""The smallest model whose metric gets worse by at most so much: bisection with real evaluations on held-out samples.

What a metric does on the way to smaller models is not known beforehand and not quite monotone, so that nothing is
interpolated: every point is a model that was cut, compensated and run. Where compensation takes long (the refit on the
pruned prefix), drafts in closed form narrow the interval first, and few models are refit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

from spa.budget.select import Selection
from spa.budget.targets import COSTS, Goal, Target
from spa.cost import Metric
from spa.errors import TargetError, UsageError
from spa.finish import Answer, Held, Reached
from spa.frontier.judge import Judge, chosen, tolerance
from spa.metrics import Custom, Drop
from spa.metrics import Metric as Measure
from spa.prepare import Prepared
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.study import Fit, Scored
from spa.twin import Twin

RESOLUTION = 0.01
"""Shares of the minimised cost that are closer than this count as the same."""
LEAST = 0.02
"""Share of the cost below which nothing is looked for."""
REFITS = 6
"""Models that are refit on the pruned prefix at most, in one search."""
STRIDE = 0.04
"""First step from where drafts end, in shares of the cost."""


def check_minimise(text: str) -> str:
    """Raise UsageError unless a model may be made smallest in this."""
    if text not in COSTS:
        raise UsageError(f"--minimise: unknown cost {text!r}; choose one of {', '.join(COSTS)}")
    return text


@dataclass(frozen=True)
class Candidate:
    """One model that was made and measured."""

    selection: Selection
    twin: Twin
    reached: Reached
    fit: Fit | None = None


class Search:
    """One query with a target on a metric.

    Args:
        query: the model, samples and method.
        scored: what selection needs.
        goal: the target on the metric.
        metric: the metric, where the goal does not say.
        minimised: the cost that is to be small.
        reached: told about every point.

    Raises:
        UsageError: the metric is not known, or does not fit the model or the samples.
    """

    def __init__(
        self,
        query: Prepared,
        scored: Scored,
        goal: Goal,
        metric: str | Custom | None,
        minimised: Metric,
        reached: Callable[[Reached], None] | None = None,
    ) -> None:
        assert query.held is not None
        self.query, self.scored, self.goal, self.minimised, self.told = query, scored, goal, minimised, reached
        what = chosen(metric, query.held, goal)
        self.judge = judge_of(query, what)
        self.limit = tolerance(goal, what, self.judge.before)
        self.points: list[Reached] = []
        self.fixed: list[Target] | None = None
        """Limits on costs; on latency as the table has it, once that was measured."""
        self._known: dict[Hashable, Candidate] = {}
        self._full = query.analysis.cost.totals(query.analysis.cost.full)[minimised]
        query.texts.append(goal.text)

    def answer(self, spare: Mapping[Metric, float]) -> Answer:
        """The smallest model that keeps to all targets.

        Args:
            spare: how far to stay below limits on costs.

        Raises:
            TargetError: there is none.
        """
        study, scored = self.query.study, self.scored
        targets = list(self.query.study.study.query.targets)
        if self.fixed is None:
            self.fixed = targets
            if self.query.loop is not None and any(t.metric == "latency" for t in targets):
                found = self.query.loop.select(study, scored, targets, spare)
                bound = Target("latency", found.costs["latency"], False, "latency")
                self.fixed = [*(t for t in targets if t.metric != "latency"), bound]
        top = 1.0
        if self.fixed:
            start = study.select(scored, spare, self.fixed)
            top = min(start.costs[self.minimised] / self._full, 1.0)
        best = self._drafted(top, spare)
        if self._slow:
            best = self._refitted(best.reached.share if best is not None else top, top, spare)
        if best is None:
            raise TargetError(self._missed(top))
        return self._finished(best)

    @property
    def _slow(self) -> bool:
        """Whether the method's own compensation runs the pruned model layer by layer."""
        return self.query.study.method.compensate == "obs" and self.query.data is not None

    def _drafted(self, top: float, spare: Mapping[Metric, float]) -> Candidate | None:
        """Bisection with drafts; None if not even the largest model keeps to the target."""
        best = self._try(top, spare, draft=True)
        if best is None or not best.reached.met:
            return None
        low, high = LEAST, top
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            found = self._try(middle, spare, draft=True)
            if found is not None and found.reached.met:
                best, high = found, middle
            else:
                low = middle
        return best

    def _refitted(self, start: float, top: float, spare: Mapping[Metric, float]) -> Candidate | None:
        """From where drafts ended: strides down while the target is kept to (or up until it is), then bisection."""
        best: Candidate | None = None
        low, high, share, stride = LEAST, top, start, STRIDE
        for _ in range(REFITS):
            found = self._try(share, spare, draft=False)
            if found is not None and found.reached.met:
                best, high = found, share
                share = share - stride if low == LEAST else (low + high) / 2
            else:
                low = share
                share = min(share + stride, top) if best is None else (low + high) / 2
                if low >= top:
                    break
            stride *= 2
            if best is not None and high - low <= RESOLUTION:
                break
            share = max(share, LEAST)
        return best if best is not None else self._try_largest(top, spare)

    def _try_largest(self, top: float, spare: Mapping[Metric, float]) -> Candidate | None:
        found = self._try(top, spare, draft=False)
        return found if found is not None and found.reached.met else None

    def _try(self, share: float, spare: Mapping[Metric, float], *, draft: bool) -> Candidate | None:
        """The model with at most a share of the cost; None if there is no such model."""
        assert self.fixed is not None
        targets = [*self.fixed, Target(self.minimised, share, True, f"{self.minimised}={share:g}")]
        try:
            selection = self.query.study.select(self.scored, spare, targets)
        except TargetError:
            return None
        draft = draft and self._slow
        key = (draft, tuple((g.name, units) for g, units in selection.removed))
        known = self._known.get(key)
        if known is None:
            known = made(self.query, self.judge, selection, share, draft=draft)
            met = known.reached.drop.within(self.limit)
            known = replace(known, reached=replace(known.reached, met=met))
            self._known[key] = known
            self.points.append(known.reached)
            if self.told is not None:
                self.told(known.reached)
        return replace(known, reached=replace(known.reached, share=share))

    def _finished(self, best: Candidate) -> Answer:
        held = self.query.held
        assert held is not None
        names = {metric: name for name, metric in COSTS.items()}
        found = Held(
            self.goal.text, self.limit, best.reached.drop, held.name, names[self.minimised], tuple(self.points)
        )
        return Answer(best.selection, best.twin, best.fit, found)

    def _missed(self, top: float) -> str:
        last = min((p.drop for p in self.points), key=lambda d: d.drop)
        others = " with " + " and ".join(t.text for t in self.query.study.study.query.targets) if self.fixed else ""
        error = "" if last.error is None else f" +- {last.error:.2g}"
        return (
            f"{self.goal.text} cannot be kept to{others}: the smallest drop is {last.drop:.4g}{error} over "
            f"{last.samples} held-out samples; allow a larger one, or larger costs"
        )


def judge_of(query: Prepared, metric: Measure | Custom) -> Judge:
    """Measures on the query's held-out samples."""
    assert query.held is not None
    return Judge(query.graph.model, query.held, metric, query.setup, query.store, query.clock.progress)


def made(query: Prepared, judge: Judge, selection: Selection, share: float, *, draft: bool) -> Candidate:
    """Cut the model, give it its weights, and measure it."""
    kept = kept_without(query.analysis, selection.removed)
    twin = rewritten(query.analysis, kept)
    study, fit = query.study, None
    if query.data is not None:
        if draft:
            study.adjust(kept, twin, selection.removed)
        else:
            fit = study.compensate(kept, twin, selection.removed)
    drop: Drop = judge(twin.model)
    costs = {str(m): float(v) for m, v in selection.costs.items()}
    return Candidate(selection, twin, Reached(share, costs, drop, draft), fit)
