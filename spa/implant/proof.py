"""The proof: a model with implants against the original whose kernels are zero around the implants' weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.errors import PlanError, SpaError
from spa.feeds import load_feeds, runnable_feeds
from spa.implant.job import Job, base_of, inputs_left, located
from spa.implant.reference import embedded
from spa.implant.rewrite import Kernel, inputs_of, new_orders
from spa.pipeline import is_exact
from spa.runtime import open_session
from spa.signature import inputs_of as fed_by
from spa.sites import constant_of
from spa.store import to_proto
from spa.verify import LARGE, Verification, compare, masked, measure, zeroed


def proof(job: Job, kernels: Mapping[str, Kernel], model: ir.Model) -> Verification:
    """Compare a model with implants with the original whose kernels are zero around the implants' weights."""
    original = job.analysis.coupling.model
    exact = job.kept is None or is_exact(job.analysis, job.kept)
    reference = original
    if job.kept is not None:
        reference = zeroed(original, job.record.removed) if exact else masked(job.analysis, job.kept)
    channels = {place.output: place.channels for place in job.record.implants}
    reference = embedded(reference, channels, kernels, {name: inputs_left(job, name) for name in channels})
    feeds = load_feeds(Path(job.inputs), fed_by(original)) if job.inputs is not None else None
    found = compare(reference, model, exact=exact, seed=job.seed, dims=job.dims, feeds=feeds, original=original)
    return found if found.passed else _in_double(job, reference, model, feeds, found)


def _in_double(
    job: Job, reference: ir.Model, model: ir.Model, feeds: Mapping[str, NDArray[Any]] | None, found: Verification
) -> Verification:
    """The comparison in float64 by the torch executor, where it can be made; else what was found.

    Sums run in another order here, and an output that is nearly zero (behind a sigmoid) shows the rounding of float32:
    more digits tell that from an error.
    """
    original = job.analysis.coupling.model
    if job.graph.file_bytes > LARGE:
        return found
    try:
        from spa.interpreter import Interpreter

        if feeds is None:
            session = open_session(to_proto(original).SerializeToString(), provider="cpu", optimize=False)
            feeds = runnable_feeds(original, session, job.seed, dict(job.dims or {}))
        networks = (Interpreter(part).double().eval().requires_grad_(False) for part in (reference, model))
        want, have = ({name: y.cpu().numpy() for name, y in network(feeds).items()} for network in networks)
    except SpaError:  # no torch, or an operator that it does not have
        return found
    return measure(want, have, found.exact, found.tolerance)


def kernels_in(job: Job, model: ir.Model) -> dict[str, Kernel]:
    """The implants' weights as they stand in a model, inputs in the order of the original.

    Raises: PlanError if it has not the implants of the record.
    """
    found: dict[str, Kernel] = {}
    base = base_of(job)
    chosen = located(job, base)
    orders = new_orders(base, chosen)
    moved = {h.name: inputs_of(base, h, orders) for candidate, _ in chosen for h in candidate.holders}
    made = {node.outputs[0].name or "": node for node in model.graph}
    for place in job.record.implants:
        joined = made.get(place.output)
        last = joined.inputs[-1] if joined is not None and joined.op_type == "Concat" else None
        node = None if last is None else last.producer()
        arrays = [] if node is None else [_array(v) for v in node.inputs[1:]]
        count = len(place.channels)
        if node is None or node.op_type != "Conv" or any(a is None or len(a) != count for a in arrays):
            raise PlanError(f"{place.output!r} is not made with {count} implants in this model; {job.label} says so")
        weight, bias = (*arrays, None)[:2]
        assert weight is not None
        if weight.size != count * len(moved[place.output]):
            raise PlanError(f"the implants of {place.output!r} do not read what {job.label} says; make it anew")
        straight = weight.reshape(count, -1)[:, np.argsort(moved[place.output])]
        found[place.output] = Kernel(straight, np.zeros(count) if bias is None else bias)
    return found


def _array(value: ir.Value | None) -> NDArray[np.float64] | None:
    tensor = None if value is None else constant_of(value)
    return None if tensor is None else tensor.numpy().astype(np.float64)
