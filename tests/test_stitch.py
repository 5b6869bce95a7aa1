"""Weights without a forward pass: refit consumers and mixed heads together, where one layer takes part in both."""

from __future__ import annotations

import numpy as np
import pytest

import spa
from spa.compensate.closed import refit_readers
from spa.compensate.rotation import find_rotations
from spa.executors.segments import Segments
from spa.measured import Measured
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.sensitivity import divergence, outputs
from spa.stitch import stitch
from spa.twin import Twin
from tests.trained import images, trained


@pytest.mark.parametrize("kinds", [("hidden", "qk-dim"), ("head", "qk-dim"), ("qk-dim",), ("neuron",)])
def test_stitched_weights(kinds: tuple[str, ...]) -> None:
    """Never worse than refitting consumers alone, and far better where heads are mixed.

    With `hidden` the projections that are mixed have lost inputs; with `head` the layer behind the mixed values has.
    """
    model = trained("vit")
    graph = spa.load(model)
    analysis = spa.analyze(graph)
    data = spa.load_calibration({"image": images(160)}, graph.model)
    groups = [g for g in analysis.groups if g.kind in kinds]
    measured = Measured(analysis, groups, data)
    rotations = find_rotations(groups, measured)
    assert bool(rotations) == ("qk-dim" in kinds)
    removed = [(g, list(range(max(1, g.units // 4)))) for g in groups]
    kept = kept_without(analysis, removed)
    parts = Segments.of(graph.model)
    dense = outputs(parts, data, 32)

    def error(twin: Twin) -> float:
        return divergence(dense, outputs(Segments.of(twin.model), data, 32))

    plain, refit, stitched = (rewritten(analysis, kept) for _ in range(3))
    refit_readers(refit, measured, removed)
    stitch(stitched, measured, kept, removed, rotations)
    errors = [error(t) for t in (plain, refit, stitched)]
    assert errors[2] <= errors[1] * (1 + 1e-9)
    if kinds == ("neuron",):
        assert errors[2] == pytest.approx(errors[1])
    elif kinds == ("qk-dim",):
        assert errors[2] < 0.2 * errors[1]
    assert errors[2] < 0.7 * errors[0]
    assert np.isfinite(errors).all()
