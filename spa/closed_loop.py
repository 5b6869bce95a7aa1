"""Pruning to a latency: what the table predicts is corrected by what is measured, until that is what was asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from spa.budget.select import Selection
from spa.budget.targets import Target
from spa.cost import Metric
from spa.graph import Graph
from spa.groups import Analysis
from spa.latency.align import worthwhile
from spa.latency.loop import Attempt, converge
from spa.latency.predict import extended, predicted
from spa.latency.query import LatencyReport, Setting, Stopwatch, as_measured, is_here, table_for
from spa.progress import Progress, silent
from spa.removal import Mask, kept_without
from spa.rewrite import rewritten
from spa.schedule import Schedule
from spa.study import Scored


class ClosedLoop:
    """One model whose latency is known as a function of its widths, and can be measured if this is the right machine.

    Args:
        graph: the model.
        analysis: of it.
        setting: how latency is measured.
        dims: sizes of symbolic axes.
        inputs: `.npz` file with inputs, instead of made-up ones.
        cache: folder in which tables are kept.
        progress: told how far the table (`kit`, `profile`) and the loop (`latency`) are.

    Raises:
        UsageError: the setting does not fit the model or the table.
        RuntimeFailure: the model does not run.
    """

    def __init__(
        self,
        graph: Graph,
        analysis: Analysis,
        setting: Setting,
        *,
        dims: Mapping[str, int] | None = None,
        inputs: Path | None = None,
        cache: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.sha256, self.progress = graph.sha256, progress
        self.table = table_for(graph, analysis, setting, dims=dims, inputs=inputs, cache=cache, progress=progress)
        prediction = predicted(self.table, graph.sha256, analysis)
        self.fitness = prediction.fitness
        self.analysis = extended(analysis, prediction.terms)
        self.original: float = self.analysis.cost.totals(self.analysis.cost.full)["latency"]
        """Milliseconds of the original, as the table has it."""
        self.widths = worthwhile(self.analysis.cost, analysis.groups)
        self.attempts: tuple[Attempt, ...] = ()
        self.asked: float | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="spa-latency-"))
        measured = as_measured(setting, self.table)
        self.watch = Stopwatch(graph, measured, self._folder, dims, inputs) if is_here(self.table) else None

    def close(self) -> None:
        """Remove the models that were timed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def extend(self, analysis: Analysis) -> Analysis:
        """What is left after some units have left, with latency among its costs."""
        return extended(analysis, predicted(self.table, self.sha256, analysis).terms)

    def select(
        self, study: Schedule, scored: Scored, targets: Sequence[Target], spare: Mapping[Metric, float]
    ) -> Selection:
        """What leaves so that all targets hold and the measured latency is what was asked for, or a little less.

        Raises:
            TargetError: that cannot be reached.
        """
        wanted = [t for t in targets if t.metric == "latency"]
        if not wanted or self.watch is None:
            selection = study.select(scored, spare)
            self.asked = self._goal(wanted, self.original) if wanted else None
            return selection
        bound = min(t.bound(self.original) for t in wanted)
        before = self._before()
        self.asked = self._goal(wanted, before)
        found = converge(
            self.asked,
            lambda share: study.select(scored, {**spare, "latency": bound - share * self.original}),
            lambda selection: selection.costs["latency"] / self.original,
            self._measured,
            _key,
            lambda done, total: self.progress("latency", done, total),
        )
        self.attempts = found.attempts
        return found.solution

    def _goal(self, wanted: Sequence[Target], before: float) -> float:
        """The tightest target as a share of the original's latency."""
        return min(t.limit if t.relative else t.limit / before for t in wanted)

    def _before(self) -> float:
        """Milliseconds of the original, measured now."""
        assert self.watch is not None
        return float(np.median([self.watch.times(self.watch.original)[0] for _ in range(2)]))

    def _measured(self, selection: Selection) -> float:
        assert self.watch is not None
        model = rewritten(self.analysis, kept_without(self.analysis, selection.removed)).model
        before, after = self.watch.ratio(model)
        return after / before

    def report(self, path: Path, kept: Mask) -> LatencyReport:
        """Latency of what was written, measured once more.

        Args:
            path: the pruned model.
            kept: positions that are left of the original, for what the table predicts.
        """
        counts = self.analysis.coupling.solution.counts(kept)
        full = self.analysis.cost.full
        left = [c if isinstance(c, int) else n for c, n in zip(counts, full, strict=True)]
        share = self.analysis.cost.totals(left)["latency"] / self.original
        key = self.table.key
        report = LatencyReport(
            measured=self.watch is not None,
            before_ms=self.original,
            after_ms=share * self.original,
            asked=self.asked,
            predicted=share,
            versus_original=None,
            attempts=self.attempts,
            table=self.fitness,
            device=key.device,
            runtime=key.runtime,
            provider=key.provider,
            threads=key.threads,
            batch=key.batch,
        )
        if self.watch is None:
            return report
        before, after = self.watch.times(path)
        return replace(report, before_ms=before, after_ms=after, versus_original=self.watch.comparison(path))


def _key(selection: Selection) -> Hashable:
    """Equal where as many units leave: latency does not depend on which."""
    return tuple((group.name, len(units)) for group, units in selection.removed)
