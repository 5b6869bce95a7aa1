"""From a record to a model: what leaves leaves, convolutions are split, the result is proved and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa.cache import Cache
from spa.calibration import Calibration
from spa.cost import parameters_of
from spa.executors.collect import Setup
from spa.graph import restore
from spa.groups import Analysis, analyze_model
from spa.implant.job import Job, base_of, located
from spa.implant.proof import proof
from spa.implant.record import Record
from spa.implant.rewrite import Choice, Kernel, split
from spa.implant.weights import Weights, kernel_of
from spa.measured import Measured
from spa.pipeline import Change
from spa.progress import Progress
from spa.store import save
from spa.verify import Verification, require


@dataclass(frozen=True)
class Report:
    """What implanting did, in numbers."""

    macs: Change
    """Multiply-accumulates of one forward pass (batch 1 unless `dims` says otherwise)."""
    parameters: Change
    bytes: Change
    """Of the model with its external data."""
    convolutions: int
    """How many were split."""
    implants: int
    """Their channels that are 1 x 1 now."""
    weights: Weights
    """Where the implants' weights are from."""
    refused: Mapping[str, str]
    """By the output of a convolution with a larger kernel why it can hold no implants."""
    verify: Verification | None
    """None if verification was switched off."""

    def to_json(self) -> dict[str, Any]:
        """As `spa implant --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Implanted:
    """A model with implants and how it came about."""

    model: Any
    """Of the same kind as the source; None if it was written to a file."""
    output: Path | None
    record: Record
    report: Report


def finish(
    job: Job,
    weights: Weights,
    data: Calibration | None,
    setup: Setup,
    *,
    check: bool,
    output: str | os.PathLike[str] | None,
    refused: Mapping[str, str],
) -> Implanted:
    """Cut what leaves, split, prove, write.

    Raises: as `spa.implant`.
    """
    job.progress("rewrite", 0, 1)
    base = base_of(job)
    chosen = located(job, base)
    kernels = _kernels(base, chosen, weights, data, setup, job.progress)
    model = split(base, chosen, kernels)
    path = None if output is None else Path(output)
    found = None
    if check:
        job.progress("verify", 0, 1)
        found = proof(job, kernels, model)
        require(found, str(path or "the model with implants"))
    job.progress("save", 0, 1)
    after = analyze_model(model, job.dims)
    size = round(after.cost.totals(after.cost.full)["bytes"])
    if path is not None:
        size = save(model, path, external=job.graph.external, shard=job.graph.shard)
    report = Report(
        Change(round(job.analysis.macs), round(after.macs)),
        Change(job.analysis.parameters, parameters_of(model)),
        Change(job.graph.file_bytes, size),
        len(job.record.implants),
        sum(len(place.channels) for place in job.record.implants),
        weights,
        dict(refused),
        found,
    )
    return Implanted(restore(job.graph, model) if path is None else None, path, job.record, report)


def _kernels(
    base: Analysis, chosen: Choice, weights: Weights, data: Calibration | None, setup: Setup, progress: Progress
) -> dict[str, Kernel]:
    measured = None
    holders = [holder for candidate, _ in chosen for holder in candidate.holders]
    if weights == "fit" and data is not None:
        measured = Measured(base, [c.group for c, _ in chosen], data, setup, Cache(), progress)
        measured.measure([holder.site for holder in holders])
    return {
        holder.name: kernel_of(holder, np.sort(candidate.channels[units]), weights, measured)
        for candidate, units in chosen
        for holder in candidate.holders
    }
