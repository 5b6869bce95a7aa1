"""Criteria from derivatives of single weights, summed over the slices of a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spa.criteria.base import Criterion
from spa.criteria.taps import nothing
from spa.evidence import Evidence, Vector
from spa.gradients import TEMPERATURE, Gradients
from spa.groups import Group

_Values = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(weight, what was measured for it) -> a score per weight."""


def _summed(
    measured: Callable[[Gradients], Mapping[str, NDArray[np.float64]]], score: _Values, *, made: bool = False
) -> Callable[[Group, Evidence], Sequence[Vector]]:
    """Per member the sum of its weights' scores over each unit's slice; `made`: in the matrices that make it only."""

    def members(group: Group, evidence: Evidence) -> Sequence[Vector]:
        found = measured(evidence.gradients)
        rows = []
        for member in group.members:
            numbers = found.get(member.value.name or "")
            if numbers is not None and (not made or (member.role == "out" and member.rank >= 2)):
                weight = evidence.analysis.coupling.weights[member.value].numpy().astype(np.float64)
                others = tuple(a for a in range(weight.ndim) if a != member.axis)
                rows.append(evidence.per_unit(group, member, score(weight, numbers).sum(axis=others)))
        return rows or nothing(group)

    return members


def _hap(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Tr(H_cc) / n_c ||W_c||^2 for the output slices c of the layers that make a unit; negative traces are noise."""
    weights = evidence.analysis.coupling.weights
    axes = {
        m.value.name or "": m.axis
        for g in evidence.gradients.groups
        for m in g.members
        if m.role == "out" and m.rank >= 2
    }
    traces = evidence.gradients.traces(axes)
    rows = []
    for member in group.members:
        name = member.value.name or ""
        if member.role == "out" and traces.get(name) is not None and axes[name] == member.axis:
            size = weights[member.value].size / len(traces[name][0])
            relative = np.maximum(traces[name][0], 0.0) / size * evidence.power_sums(member, 2)
            rows.append(0.5 * evidence.per_unit(group, member, relative))
    return rows or nothing(group)


_sensitivity = _summed(lambda g: g.weights, lambda w, g: np.abs(w * g))
"""One score with two names: a trained network's Taylor term is an untrained one's connection sensitivity."""

WEIGHT_GRADIENTS = (
    Criterion("taylor-weights", "sum |w dL/dw| of a unit's slices (GroupTaylor, arXiv 2301.12900)",
              _sensitivity, "gradients"),
    Criterion("taylor-filters", "sum |w dL/dw| of a unit's output slices (Knapsack Pruning, arXiv 2002.08258)",
              _summed(lambda g: g.weights, lambda w, g: np.abs(w * g), made=True), "gradients"),
    Criterion("hap-weights", "Tr(H) / n ||w||^2 / 2 of a unit's output slices (HAP, arXiv 2101.08940, as in its code)",
              _hap, "gradients"),
    Criterion("snip", "sum |w dL/dw| before training (SNIP, arXiv 1810.02340)",
              _sensitivity, "gradients"),
    Criterion("grasp", "sum w (H g), signed, logits / 200 (GraSP, arXiv 2002.07376; large ones stay)",
              _summed(lambda g: g.hessian_gradients(TEMPERATURE), lambda w, g: w * g), "gradients"),
    Criterion("crop", "sum |w (H g)| (CroP, arXiv 2206.10451)",
              _summed(lambda g: g.hessian_gradients(), lambda w, g: np.abs(w * g)), "gradients"),
    Criterion("synflow", "sum w dR/dw of positive weights, inputs of ones (SynFlow, arXiv 2006.05467)",
              _summed(lambda g: g.flow, lambda _, flow: flow), "gradients"),
)  # fmt: skip
