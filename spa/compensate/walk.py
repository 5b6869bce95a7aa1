"""The optimal refit, site after site: on the already pruned prefix, towards the outputs of the original model.

Source: `least_squares.refit` on Cov(x'), Cov(y, x') with x' the pruned model's inputs and y the original's outputs
(asymmetric reconstruction: ThiNet and He et al. 2017 for channels, GPTAQ, arXiv 2504.02692, for quantisation). Where a
residual connection follows, the target is what makes the *sum* right: the error of the other branch is corrected, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.compensate.pairs import Pair, pair_up, site_ancestors, steps
from spa.executors.collect import Setup
from spa.executors.meter import Meter
from spa.executors.segments import Segments, placed
from spa.groups import Analysis
from spa.least_squares import Refitter
from spa.moments import Joint
from spa.removal import Mask
from spa.rewrite import Twin
from spa.runtime import Value, place
from spa.sites import Site, constant_of, exchange

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Refit:
    """What the refit did to one site."""

    site: str
    before: float
    """Relative squared error of its outputs with the weights it had."""
    after: float
    """... and with the new ones."""


@dataclass
class _Walk:
    analysis: Analysis
    kept: Mask
    twin: Twin
    data: Calibration
    setup: Setup
    damping: float
    residual: bool
    bends: int
    found: list[Refit] = field(default_factory=list)


def refit_sites(
    analysis: Analysis,
    kept: Mask,
    twin: Twin,
    data: Calibration,
    setup: Setup,
    *,
    damping: float = 1e-2,
    residual: bool = True,
    bends: int = 4,
    progress: Progress | None = None,
) -> list[Refit]:
    """Refit every site of the pruned model (`twin`, which is changed) whose inputs differ from the original's.

    Args:
        analysis: of the original model.
        kept: what was kept.
        twin: the pruned model.
        data: calibration samples.
        setup: how the models are run.
        damping: ridge towards the weights there are, relative to the mean variance of the inputs.
        residual: also correct the error of the branch that is added to a site's output.
        bends: rounds that adapt the targets to a clipping activation behind a site.
    """
    walk = _Walk(analysis, kept, twin, data, setup, damping, residual, bends)
    pairs = pair_up(analysis, kept, twin)
    biases = {pair: _biased(twin, pair.pruned) for pair in pairs}
    before = Segments.of(analysis.coupling.model, setup.provider, setup.threads)
    after = Segments.of(twin.model, setup.provider, setup.threads)
    ancestors = site_ancestors(twin.model, {pair.pruned.name for pair in pairs})
    anchor = [(placed(b), placed(b)) for b in data.batches(setup.batch)]
    done = 0
    for step in steps(pairs, ancestors):
        lives = before.live(_first(before, step, 0)), after.live(_first(after, step, 1))
        wanted = list(lives[0]), list(lives[1])
        tasks = []
        for pair in step:
            skip = pair.behind.skip if residual else None
            if skip is not None and ancestors.get(skip[1], frozenset()) & _pending(pairs, done):
                skip = None
            tasks.append(_Task(pair, skip, _meter(pair, skip is not None, data, setup, before, after)))
            wanted[0].extend((pair.original.name, *(skip or ())[:1]))
            wanted[1].extend((pair.pruned.data.name or "", *(skip or ())[1:]))
        runs = before.runner(wanted[0], anchor[0][0]), after.runner(wanted[1], anchor[0][1])

        def values() -> Iterator[_Both]:
            for left, right in anchor:
                yield runs[0](left), runs[1](right)

        moved = _held(values(), wanted, setup.memory // 2)
        for task in tasks:
            for dense, small in moved or values():
                task.add(dense, small)
            _solve(walk, task, moved or values, biases[task.pair], after)
        if moved is not None:  # else the next step starts where this one did
            anchor = [({n: d[n] for n in lives[0]}, {n: s[n] for n in lives[1]}) for d, s in moved]
        done += len(step)
        if progress is not None:
            progress(done / len(pairs))
    return walk.found


_Both = tuple[dict[str, Value], dict[str, Value]]


def _held(values: Iterable[_Both], wanted: tuple[list[str], list[str]], memory: int) -> list[_Both] | None:
    """All batches, if they fit."""
    out, taken = [], 0
    for both in values:
        taken += sum(v.tensor_size_in_bytes() for part in both for v in part.values())
        if taken > memory:
            return None
        out.append(both)
    return out


def _first(parts: Segments, step: Sequence[Pair], which: int) -> int:
    return min(parts.producer[(pair.original, pair.pruned)[which].name] for pair in step)


@dataclass
class _Task:
    """One site on its way to new weights."""

    pair: Pair
    skip: tuple[str, str] | None
    meter: Meter

    def targets(self, dense: dict[str, Value], small: dict[str, Value]) -> dict[str, Value]:
        out = {"t": dense[self.pair.original.name]}
        if self.skip is not None:
            out |= {"plus": dense[self.skip[0]], "minus": small[self.skip[1]], "scale": self.scale}
        return out

    def add(self, dense: dict[str, Value], small: dict[str, Value], more: Mapping[str, Value] | None = None) -> None:
        self.meter.add(small[self.pair.pruned.data.name or ""], {**self.targets(dense, small), **(more or {})})

    @cached_property
    def scale(self) -> Value:
        return place(self.pair.behind.scale.astype(np.float32))


def _pending(pairs: list[Pair], done: int) -> frozenset[str]:
    """Sites that have not been refit yet."""
    return frozenset(p.pruned.name for p in pairs[done:])


def _meter(pair: Pair, skip: bool, data: Calibration, setup: Setup, before: Segments, after: Segments) -> Meter:
    kinds = [
        ir.DataType(parts.types.get(v.name or "", 0) or int(ir.DataType.FLOAT))
        for parts, v in ((after, pair.pruned.data), (before, pair.original.output))
    ]
    return Meter(
        pair.pruned,
        data.samples,
        select=pair.outputs,
        width=pair.original.groups * pair.original.rows,
        skip=skip,
        dtypes=(kinds[0], kinds[1]),
        provider=setup.provider,
        threads=setup.threads,
    )


def _solve(walk: _Walk, task: _Task, values: Iterable[_Both] | Callable[[], Iterable[_Both]], bias: _Bias,
           parts: Segments) -> None:  # fmt: skip
    site, moments = task.pair.pruned, task.meter.total
    assert moments is not None
    tensor = constant_of(site.weight)
    assert tensor is not None
    prior = site.matrix(tensor.numpy())
    solved = [Refitter(moments.covariance[k], prior[k], walk.damping) for k in range(site.groups)]
    new = np.stack([s(moments.cross[k]) for k, s in enumerate(solved)])
    offset = moments.mean_t - np.einsum("gmd,gd->gm", new, moments.mean_x)
    before, after = _error(moments, prior), _error(moments, new)
    for _ in range(walk.bends if task.pair.behind.bends else 0):
        task.meter.total = None
        more = _bend(task, new, offset)
        for dense, small in values() if callable(values) else values:
            task.add(dense, small, more)
        bent = task.meter.total
        assert bent is not None
        new = np.stack([s(bent.cross[k]) for k, s in enumerate(solved)])
        offset = bent.mean_t - np.einsum("gmd,gd->gm", new, bent.mean_x)
    walk.found.append(Refit(site.name, before, after))
    array = site.stored(new)
    exchange(site.weight, array)
    parts.override(site.weight.name or "", array.reshape(tensor.shape.numpy()))
    bias.write(offset.reshape(-1), parts)


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


def _error(moments: Joint, weight: NDArray[np.float64]) -> float:
    """E||t - W x||^2 with the best bias, relative to the variance of t."""
    covariance, cross = moments.covariance, moments.cross
    explained = 2 * np.einsum("gmd,gmd->", weight, cross) - np.einsum(
        "gmd,gde,gme->", weight, covariance, weight, optimize=True
    )
    total = float(moments.variance_t.sum())
    return float(1 - explained / total) if total > 0 else 0.0


@dataclass(frozen=True)
class _Bias:
    """Where the bias of a site goes."""

    value: ir.Value
    inside: bool
    """Added by the node itself: the site's output contains it."""
    scale: float

    def write(self, offset: NDArray[np.float64], parts: Segments) -> None:
        """`offset` is what the output needs beside W x."""
        tensor = constant_of(self.value)
        assert tensor is not None
        new = offset / self.scale
        if not self.inside:
            new = new + tensor.numpy().astype(np.float64).reshape(-1)
        array = new.reshape(tensor.shape.numpy())
        exchange(self.value, array)
        parts.override(self.value.name or "", array)


def _biased(twin: Twin, site: Site) -> _Bias:
    """The site's bias, a zero one if it had none."""
    inside = site.bias_slot is not None
    if site.bias is not None:
        at = site.node.inputs[site.bias_slot] if inside and (site.bias_slot or 0) < len(site.node.inputs) else None
        return _Bias(site.bias, site.bias is at, site.bias_scale if site.bias is at else 1.0)
    weight = constant_of(site.weight)
    assert weight is not None
    count = site.groups * site.rows
    zero = np.zeros(count, dtype=weight.dtype.numpy())
    name = f"{site.name}_bias"
    if inside:
        constant = twin.constant(ir.Tensor(zero, dtype=weight.dtype), name, like=None)
        slot = site.bias_slot or 0
        if slot >= len(site.node.inputs):
            site.node.resize_inputs(slot + 1)
        site.node.replace_input_with(slot, constant)
        return _Bias(constant, True, site.bias_scale)
    rank = 1 if site.layout == "tokens" else 1 + len(site.kernel)
    shape = (count,) + (1,) * (rank - 1)
    constant = twin.constant(ir.Tensor(zero.reshape(shape), dtype=weight.dtype), name, like=None)
    output = site.output
    readers = list(output.uses())
    added = twin.after(output, "Add", [output, constant])
    added.type = output.type
    for node, slot in readers:
        node.replace_input_with(slot, added)
    twin.publish(output, added)
    return _Bias(constant, False, 1.0)
