"""The optimal refit, site after site: on the already pruned prefix, towards the outputs of the original model.

Source: `least_squares.refit` on Cov(x'), Cov(y, x') with x' the pruned model's inputs and y the original's outputs
(asymmetric reconstruction: ThiNet and He et al. 2017 for channels, GPTAQ, arXiv 2504.02692, for quantisation). Where a
residual connection follows, the target is what makes the *sum* right: the error of the other branch is corrected, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.compensate.bias import Bias, bias_of
from spa.compensate.pairs import Pair, pair_up, site_ancestors, steps
from spa.compensate.rotation import Mixer
from spa.executors.collect import Setup
from spa.executors.front import Front, Values, Window
from spa.executors.meter import Meter
from spa.executors.segments import Segments
from spa.groups import Analysis
from spa.heap import Trim
from spa.least_squares import DAMPINGS, Refitter, transfer
from spa.moments import Joint
from spa.progress import Progress, silent
from spa.removal import Mask
from spa.runtime import Value, place
from spa.shelf import Shelf
from spa.sites import constant_of, exchange
from spa.twin import Twin

LARGEST = 1024
"""Columns above which one half is used for fitting only, to save time."""


def refit_sites(
    analysis: Analysis,
    kept: Mask,
    twin: Twin,
    data: Calibration,
    setup: Setup,
    *,
    damping: float | None = None,
    residual: bool = True,
    bends: int = 2,
    mixer: Mixer | None = None,
    ready: Callable[[], object] = lambda: None,
    progress: Progress = silent,
) -> None:
    """Refit every site of the pruned model (`twin`, which is changed) whose inputs differ from the original's.

    Args:
        analysis: of the original model.
        kept: what was kept.
        twin: the pruned model.
        data: calibration samples.
        setup: how the models are run.
        damping: ridge towards the weights there are, relative to the mean variance of the inputs; None chooses it
            for each site by cross-validation over two halves of the samples.
        residual: also correct the error of the branch that is added to a site's output.
        mixer: mixes the outputs of projections within attention heads.
        bends: rounds that adapt the targets to a clipping activation behind a site.
        ready: called when all new biases are in place, before anything is measured.
        progress: told how many sites are done (`refit`).
    """
    if mixer is not None:
        mixer.write(twin)
    pairs = pair_up(analysis, kept, twin)
    biases = {pair: bias_of(twin, pair.pruned) for pair in pairs}
    ready()
    after = Segments.of(twin.model, setup.provider, setup.threads)
    before = Segments.of(analysis.coupling.model, setup.provider, setup.threads)
    first = Front(before, data, setup.batch, setup.memory // 8)
    fronts = [first, Front(after, data, setup.batch, setup.memory // 8, beside=first)]
    ancestors = site_ancestors(twin.model, {pair.pruned.name for pair in pairs})
    trim, shelf = Trim(setup.memory // 8), Shelf(setup.memory // 8)
    done = 0
    progress("refit", done, len(pairs))
    for step in steps(pairs, ancestors):
        wanted: tuple[list[str], list[str]] = [], []
        tasks = []
        for pair in step:
            mix = mixer.rows(pair.original) if mixer is not None else None
            skip = pair.behind.skip if residual and mix is None else None
            if skip is not None and ancestors.get(skip[1], frozenset()) & _pending(pairs, done):
                skip = None
            meter = _meter(pair, mix is not None, skip is not None, data, setup, before, after)
            tasks.append(_Task(pair, skip, meter, mix))
            wanted[0].extend((pair.target, *(skip or ())[:1]))
            wanted[1].extend((pair.pruned.data.name or "", *(skip or ())[1:]))
        starts = (
            min(before.producer[pair.target] for pair in step),
            min(after.producer[pair.pruned.name] for pair in step),
        )
        dense, small = (front.at(at, names) for front, at, names in zip(fronts, starts, wanted, strict=True))
        for task in tasks:
            for left, right in zip(dense, small, strict=True):
                task.split(left, right)
                trim()
            _solve(task, (dense, small), biases[task.pair], after, shelf, damping, bends)
        done += len(step)
        progress("refit", done, len(pairs))


def _pending(pairs: list[Pair], done: int) -> frozenset[str]:
    """Sites that have not been refit yet."""
    return frozenset(p.pruned.name for p in pairs[done:])


@dataclass
class _Task:
    """One site on its way to new weights."""

    pair: Pair
    skip: tuple[str, str] | None
    meter: Meter
    mix: NDArray[np.float64] | None
    """What its outputs are made of, [outputs, outputs of the original]; None where they are some of these."""

    def split(self, dense: Values, small: Values) -> None:
        """Measure one batch, in halves: values of the original and of the pruned model."""
        self.meter.split(*self.batch(dense, small))

    def batch(self, dense: Values, small: Values) -> tuple[Value, dict[str, Value]]:
        """Inputs of the site, and what its outputs should be."""
        return small[self.pair.pruned.data.name or ""], self.targets(dense, small)

    def targets(self, dense: Values, small: Values) -> dict[str, Value]:
        """What the site's outputs should be."""
        targets = {"t": dense[self.pair.target]}
        if self.skip is not None:
            targets |= {"plus": dense[self.skip[0]], "minus": small[self.skip[1]], "scale": self.scale}
        return targets

    @cached_property
    def scale(self) -> Value:
        return place(self.pair.behind.scale.astype(np.float32))


def _meter(
    pair: Pair, mixed: bool, skip: bool, data: Calibration, setup: Setup, before: Segments, after: Segments
) -> Meter:
    kinds = [
        ir.DataType(parts.types.get(v.name or "", 0) or int(ir.DataType.FLOAT))
        for parts, v in ((after, pair.pruned.data), (before, pair.original.output))
    ]
    width = pair.original.groups * pair.original.rows
    return Meter(
        pair.pruned,
        data.samples,
        select=np.arange(width) if mixed else pair.outputs,
        width=width,
        skip=skip,
        dtypes=(kinds[0], kinds[1]),
        keep=setup.memory // 8 if pair.behind.bends and not mixed else 0,
        provider=setup.provider,
        threads=setup.threads,
    )


def _solve(
    task: _Task,
    values: tuple[Window, Window],
    bias: Bias,
    parts: Segments,
    shelf: Shelf,
    damping: float | None,
    bends: int,
) -> None:
    """Give one site its new weights and bias, in the pruned model and in `parts`, which runs it; `shelf` keeps them."""
    site = task.pair.pruned
    moments, other = task.meter.halves()
    if task.mix is not None:
        moments, other = moments.mixed(task.mix), other.mixed(task.mix) if other is not None else None
    tensor = constant_of(site.weight)
    assert tensor is not None
    prior = site.matrix(tensor.numpy())
    damping = cross_validated((moments, other), prior) if damping is None else damping
    task.meter.clear()
    if other is not None:
        moments.merge(other)
        other = None  # large, like what follows
    solved = [Refitter(c, w, damping) for c, w in zip(moments.covariance, prior, strict=True)]
    new = _refit(solved, moments)
    offset = moments.mean_t - np.einsum("gmd,gd->gm", new, moments.mean_x)
    for _ in range(bends if task.pair.behind.bends and task.mix is None else 0):
        again = (task.batch(dense, small) for dense, small in zip(*values, strict=True))
        bent = task.meter.bent(_bend(task, new, offset), again)
        assert bent is not None
        new = _refit(solved, bent)
        offset = bent.mean_t - np.einsum("gmd,gd->gm", new, bent.mean_x)
    parts.override(site.weight.name or "", exchange(site.weight, site.stored(new), shelf.keep))
    numbers = offset.reshape(-1)
    parts.override(bias.value.name or "", bias.write(numbers if bias.inside else bias.read() + numbers))


def _refit(solved: list[Refitter], moments: Joint) -> NDArray[np.float64]:
    """Weights for the targets of these moments, [g, m, d]."""
    return np.stack([s(c) for s, c in zip(solved, moments.cross, strict=True)])


def cross_validated(halves: tuple[Joint, Joint | None], prior: NDArray[np.float64]) -> float:
    """The ridge that does best on the half of the samples it was not fit on."""
    first, second = halves
    if second is None:
        return DAMPINGS[-1]
    total = np.zeros(len(DAMPINGS))
    for fit, test in ((first, second), (second, first)):
        if prior.shape[2] <= LARGEST or fit is first:
            total += transfer(fit.covariance, fit.cross, test.covariance, test.cross, prior)
    return DAMPINGS[int(np.argmin(total))]


def _bend(task: _Task, weight: NDArray[np.float64], offset: NDArray[np.float64]) -> dict[str, Value]:
    behind = task.pair.behind
    low, high = (np.float32(np.clip(v, -1e30, 1e30)) for v in (behind.low, behind.high))
    return {
        "scale": task.scale,
        "shift": place(behind.shift.astype(np.float32)),
        "low": place(np.array(low)),
        "high": place(np.array(high)),
        "weight": place(weight.astype(np.float32)),
        "offset": place(offset[:, None].astype(np.float32)),
    }
