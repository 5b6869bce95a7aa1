"""Statistics that were learned on the original model, estimated again on the pruned one.

BatchNormalization nodes get the mean and variance of what they now read, in forward order, as each changes what the
next one sees. Where the exporter folded them away, and behind layer norms (which have no statistics of their own, but
whose readers were trained on what they gave), every site whose input changed gets the per-channel affine map that gives
its output the original's mean and variance: y' = (y - m') s / s' + m, folded into its weights and bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.compensate.bias import Bias, bias_of
from spa.compensate.pairs import Pair, affected, pair_up
from spa.executors import kernels
from spa.executors.collect import Profile, Setup
from spa.executors.front import Front, Window
from spa.executors.segments import Segments
from spa.groups import Analysis
from spa.progress import Progress, silent
from spa.removal import Mask
from spa.sites import constant_of, exchange
from spa.twin import Twin

_LARGEST = 10.0
"""Factor by which a channel is scaled at most: a channel that has nearly died is not to be blown up."""


@dataclass(frozen=True, eq=False)
class _Point:
    """One place where statistics are taken, by position in the pruned model."""

    position: int
    value: str
    """In the pruned model."""
    norm: ir.Node | None = None
    pair: Pair | None = None
    bias: Bias | None = None


def recalibrate(
    analysis: Analysis, kept: Mask, twin: Twin, data: Calibration, setup: Setup, progress: Progress = silent
) -> int:
    """Estimate all statistics of the pruned model `twin` anew; returns how many places changed."""
    pairs = [p for p in pair_up(analysis, kept, twin) if not _normed(p)]
    biases = {pair: bias_of(twin, pair.pruned) for pair in pairs}
    after = Segments.of(twin.model, setup.provider, setup.threads)
    before = Segments.of(analysis.coupling.model, setup.provider, setup.threads) if pairs else None
    mine = {twin.value(v).name for v in affected(analysis, kept)}
    points = [
        _Point(k, node.inputs[0].name or "", norm=node)
        for k, node in enumerate(n for n in twin.model.graph)
        if node.op_type == "BatchNormalization" and node.inputs[0] is not None and node.inputs[0].name in mine
    ]
    points += [_Point(after.producer[p.matched] + 1, p.matched, pair=p, bias=biases[p]) for p in pairs]
    front = Front(after, data, setup.batch, setup.memory // 8)
    other = Front(before, data, setup.batch, setup.memory // 8, beside=front) if before is not None else None
    ordered = sorted(points, key=lambda p: p.position)
    progress("norms", 0, len(ordered))
    for k, point in enumerate(ordered):
        # the cut stays before the node that is about to change
        at = point.position if point.pair is None else point.position - 1
        axis = -1 if point.pair is not None and point.pair.pruned.layout == "tokens" else 1
        mean, variance = _moments(front.at(at, [point.value]), point.value, axis, after, setup)
        if point.norm is not None:
            _set_norm(point.norm, mean, variance, after)
        elif point.pair is not None and other is not None and before is not None and point.bias is not None:
            name = point.pair.target
            wanted = _moments(other.at(before.producer[name], [name]), name, axis, before, setup)
            rows = point.pair.outputs
            _match(point.pair, point.bias, (mean, variance), (wanted[0][rows], wanted[1][rows]), after)
        progress("norms", k + 1, len(ordered))
    return len(ordered)


def _normed(pair: Pair) -> bool:
    uses = list(pair.pruned.output.uses())
    return any(node.op_type == "BatchNormalization" for node, _ in uses)


def _moments(
    window: Window, name: str, axis: int, parts: Segments, setup: Setup
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, counts = [], []
    kind = ir.DataType(parts.types.get(name, 0) or int(ir.DataType.FLOAT))
    for values in window:
        x = values[name]
        shape = x.shape()
        rank = len(shape)
        got, positions = kernels.profile(
            rank, axis % rank, kind, x, int(shape[0]), provider=setup.provider, threads=setup.threads
        )
        rows.append(got)
        counts.append(np.full(len(got), positions, dtype=np.int64))
    joined = np.concatenate(rows)
    return Profile(joined[:, 0], joined[:, 1], joined[:, 2], np.concatenate(counts)).pooled()


def _set_norm(node: ir.Node, mean: NDArray[np.float64], variance: NDArray[np.float64], parts: Segments) -> None:
    for slot, numbers in ((3, mean), (4, variance)):
        value = node.inputs[slot]
        tensor = constant_of(value) if value is not None else None
        if value is None or tensor is None or len(value.uses()) != 1:
            return  # shared with another norm, or computed
        exchange(value, numbers)
        parts.override(value.name or "", numbers.reshape(tensor.shape.numpy()))


_Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


def _match(pair: Pair, bias: Bias, have: _Moments, want: _Moments, parts: Segments) -> None:
    """Scale and shift the outputs of a site from moments `have` to moments `want`."""
    site = pair.pruned
    factor = np.sqrt(want[1] / np.maximum(have[1], 1e-30))
    factor = np.where(have[1] > 0, np.clip(factor, 1 / _LARGEST, _LARGEST), 1.0)
    array = site.stored(site.weights * factor.reshape(site.groups, site.rows, 1))
    exchange(site.weight, array)
    stored = constant_of(site.weight)
    parts.override(site.weight.name or "", array if stored is None else array.reshape(stored.shape.numpy()))
    inner = bias.read() if bias.inside else np.zeros(len(factor))
    shift = want[0] - factor * (have[0] - inner)
    parts.override(bias.value.name or "", bias.write(shift if bias.inside else bias.read() + shift))
