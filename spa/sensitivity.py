"""How much the model's outputs suffer when one group loses units: real evaluations, one group at a time.

Losses of different layers cannot be compared as they are: the same relative error does little in one layer and much in
another. A few trials per group (prune it alone, refit its consumers in closed form, run the model) give the factor
between a criterion's loss and the error of the outputs, with which losses add up over the network (in the spirit of
SPDY's layer sensitivities, arXiv 2201.13096; measured instead of searched). The trials look at samples that nothing was
fit on: with fewer observations than columns, as behind a global pooling, a refit explains those it has seen whatever
leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.calibration.trials import MOST
from spa.compensate.pairs import affected
from spa.compensate.rotation import Rotation
from spa.evidence import Vector
from spa.executors.front import Front
from spa.executors.segments import Segments, placed
from spa.groups import Analysis, Group
from spa.measured import Measured
from spa.progress import Progress, silent
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.runtime import fetch
from spa.stitch import stitch

_FLOATS = {1, 10, 11, 16}
SHARES = (0.25, 0.6)
"""Of a group's units, that leave in the trials."""


def curves(
    analysis: Analysis,
    groups: Sequence[Group],
    scores: Mapping[str, Vector],
    measured: Measured,
    test: Calibration,
    rotations: Mapping[str, Rotation] | None = None,
    progress: Progress = silent,
) -> dict[str, Vector]:
    """Per group the estimated output error after its k least important units have left, [units + 1].

    Args:
        analysis: of the model.
        groups: groups to try.
        scores: losses per unit, any scale per group.
        measured: statistics, for the refit of the consumers.
        test: samples for the trials, see `spa.calibration.trials`.
        rotations: of the groups whose units are mixed within heads when some leave.
        progress: told how many groups have been tried (`weigh`).
    """
    rotations = rotations or {}
    request = [[g.name, g.units, _digest(scores[g.name]), g.name in rotations] for g in groups]
    about = [request, SHARES, MOST, test.digest]
    known = measured.cache.get("sensitivity", measured.data.digest, about)
    if known is None:
        errors = {str(k): np.zeros(len(SHARES)) for k in range(len(groups))}
        trials = Trials(analysis, few(test, MOST), measured, rotations)
        progress("weigh", 0, len(groups))
        order = sorted((trials.start(group), k) for k, group in enumerate(groups))
        for done, (start, k) in enumerate(order):
            leaving = [lowest(scores[groups[k].name], share, groups[k].least) for share in SHARES]
            errors[str(k)] = np.array([trials.error(groups[k], units, start) for units in leaving])
            progress("weigh", done + 1, len(groups))
        known = errors
        measured.cache.put("sensitivity", measured.data.digest, about, errors)
    return {g.name: _curve(scores[g.name], known[str(k)], g.least) for k, g in enumerate(groups)}


def _digest(scores: Vector) -> str:
    return str(np.argsort(scores, kind="stable").tolist())


def lowest(scores: Vector, share: float, least: int = 1) -> NDArray[np.int64]:
    """The least important share of the units: at least one, and so that `least` stay."""
    count = min(max(1, round(share * len(scores))), len(scores) - least)
    return np.sort(np.argsort(scores, kind="stable")[:count])


def _curve(scores: Vector, errors: NDArray[np.float64], least: int) -> Vector:
    """The running sum of the scores, bent so that it meets the errors of the trials (log-linear between them)."""
    loss = np.concatenate([[0.0], np.cumsum(np.maximum(np.sort(scores), 0.0))])
    loss = loss / max(loss[-1], 1e-300)
    tried = np.array([len(lowest(scores, share, least)) for share in SHARES])
    factors = np.log(np.maximum(errors, 1e-12) / np.maximum(loss[tried], 1e-12))
    factor = np.exp(np.interp(np.arange(len(loss)), tried, factors))
    return np.maximum.accumulate(loss * factor)


class Trials:
    """Runs the model with one group pruned, from where that group begins: what comes before is computed once."""

    def __init__(
        self, analysis: Analysis, data: Calibration, measured: Measured, rotations: Mapping[str, Rotation]
    ) -> None:
        self.analysis, self.data, self.measured, self.rotations = analysis, data, measured, rotations
        self.parts = Segments.of(analysis.coupling.model, measured.setup.provider, measured.setup.threads)
        self.reference = outputs(self.parts, data, measured.setup.batch)
        self.front = Front(self.parts, data, measured.setup.batch, measured.setup.memory // 4)

    def start(self, group: Group) -> int:
        """Position of the first node that changes with the group."""
        kept = kept_without(self.analysis, [(group, [0])])
        changed = affected(self.analysis, kept)
        found = [self.parts.producer[v.name] for v in changed if v.name in self.parts.producer]
        return min(found, default=0)

    def error(self, group: Group, units: NDArray[np.int64], start: int) -> float:
        """Of the outputs, when these units leave and their consumers are refit.

        `start` is that of the group; groups must come in the order of it.
        """
        measured = self.measured
        removed = [(group, units.tolist())]
        kept = kept_without(self.analysis, removed)
        twin = rewritten(self.analysis, kept)
        stitch(twin, measured, kept, removed, self.rotations)
        window = self.front.at(start, self.parts.inputs)
        parts = Segments.of(twin.model, measured.setup.provider, measured.setup.threads)
        names = floats(parts)
        run = parts.runner(names, [*self.parts.live(start), *self.parts.inputs], optimize=True)
        return divergence(
            self.reference, [fetch(out[n]).astype(np.float64) for v in window for out in (run(v),) for n in names]
        )


def few(data: Calibration, count: int) -> Calibration:
    """At most `count` of the samples, spread evenly."""
    return data if data.samples <= count else data.split(count)[1]


def outputs(parts: Segments, data: Calibration, batch: int) -> list[NDArray[np.float64]]:
    """The floating-point outputs of a model on all samples, one array [...] per batch and output."""
    names = floats(parts)
    run = parts.runner(names, (), optimize=True)
    return [fetch(run_[n]).astype(np.float64) for b in data.batches(batch) for run_ in (run(placed(b)),) for n in names]


def floats(parts: Segments) -> list[str]:
    """The outputs of a model that are floating-point numbers."""
    return [n for n in parts.outputs if parts.types.get(n) in _FLOATS]


def divergence(reference: Sequence[NDArray[np.float64]], other: Sequence[NDArray[np.float64]]) -> float:
    """Squared difference of all outputs relative to their variance over the batch."""
    error = sum(float(np.square(a - b).sum()) for a, b in zip(reference, other, strict=True))
    spread = sum(float(np.square(a - a.mean(axis=0)).sum()) for a in reference)
    return error / max(spread, 1e-30)
