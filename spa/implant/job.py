"""A record on the way to a model: which groups and units it means, in the original and after what leaves has left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.errors import PlanError
from spa.graph import Graph
from spa.groups import Analysis, analyze_model
from spa.implant.candidates import Candidate, Index, candidates
from spa.implant.record import Place, Record
from spa.implant.rewrite import Choice
from spa.progress import Progress, silent
from spa.removal import Mask
from spa.rewrite import rewritten


@dataclass(frozen=True)
class Job:
    """A record on its way to a file."""

    graph: Graph
    analysis: Analysis
    kept: Mask | None
    """Positions that stay; None if nothing leaves."""
    record: Record
    dims: Mapping[str, int] | None = None
    inputs: str | os.PathLike[str] | None = None
    """Feeds for verification."""
    seed: int = 0
    progress: Progress = silent
    label: str = "the record"
    """What the record is called in messages."""


def base_of(job: Job) -> Analysis:
    """The model without what leaves."""
    if job.kept is None:
        return job.analysis
    return analyze_model(rewritten(job.analysis, job.kept).model, job.dims)


def _conv(job: Job, name: str) -> ir.Node:
    for node in job.analysis.coupling.model.graph:
        if node.op_type == "Conv" and node.outputs[0].name == name:
            return node
    raise PlanError(f"{job.label} is about {name!r}, which no convolution of this model gives; make it anew")


def _kept_along(job: Job, name: str, axis: int) -> NDArray[np.bool_]:
    """What stays along an axis of a convolution's weight."""
    weight = _conv(job, name).inputs[1]
    assert weight is not None
    tensor = job.analysis.coupling.weights[weight]
    dims = job.analysis.coupling.dims(weight)
    if job.kept is None or dims is None:
        return np.ones(tensor.shape.numpy()[axis], dtype=bool)
    return job.analysis.coupling.solution.keep(dims[axis], job.kept)


def inputs_left(job: Job, name: str) -> list[int]:
    """The input channels of a convolution that stay."""
    return [int(k) for k in np.flatnonzero(_kept_along(job, name, 1))]


def located(job: Job, base: Analysis) -> Choice:
    """The groups and units of `base` (the model without what leaves) that the record means.

    Raises: PlanError if they cannot be implants there.
    """
    wanted = {place.output: _after(job, place) for place in job.record.implants}
    out: list[tuple[Candidate, Index]] = []
    for candidate in candidates(base, [g for g in base.groups if g.exact])[0]:
        channels = {wanted.pop(h.name, None) for h in candidate.holders}
        if channels == {None}:
            continue
        (mine,) = channels if len(channels) == 1 else (None,)
        if mine is None:
            raise PlanError(f"{job.label} takes channels apart that belong together; make it anew")
        unit_at = np.argsort(candidate.channels)
        if not 0 < len(mine) < len(unit_at) or max(mine) >= len(unit_at):
            raise PlanError(f"{job.label} makes implants of all channels of {candidate.group.name}; make it anew")
        out.append((candidate, np.sort(unit_at[list(mine)])))
    if wanted:
        raise PlanError(f"{job.label}: {next(iter(wanted))!r} cannot hold implants in this model; make it anew")
    return out


def _after(job: Job, place: Place) -> tuple[int, ...]:
    """Channels of a convolution when what leaves has left."""
    stays = _kept_along(job, place.output, 0)
    if not place.channels or max(place.channels) >= len(stays) or not stays[list(place.channels)].all():
        raise PlanError(f"{job.label} makes implants of channels of {place.output!r} that are not there; make it anew")
    return tuple((np.cumsum(stays) - 1)[list(place.channels)].tolist())
