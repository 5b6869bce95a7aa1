"""Criteria from the derivatives of a multiplicative gate on every unit: the change of the loss when a unit leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spa.criteria.base import Criterion
from spa.evidence import Evidence, Vector
from spa.groups import Group


def _gated(rows: Callable[[NDArray[np.float64]], Vector]) -> Callable[[Group, Evidence], Sequence[Vector]]:
    """A statistic of the gates' derivatives, [samples, units] -> [units]; zero for groups without a gate."""

    def members(group: Group, evidence: Evidence) -> Sequence[Vector]:
        found = evidence.gradients.gates.get(group.name)
        return [np.zeros(group.units) if found is None else rows(found.astype(np.float64))]

    return members


def _heads(g: NDArray[np.float64]) -> Vector:
    """Normalised by the group, which is a layer: its heads compete on equal terms with those of others."""
    mean = np.abs(g).mean(axis=0)
    return np.asarray(mean / (np.sqrt(np.square(mean).sum()) + 1e-30))


def _hap(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Half the second derivative; a negative estimate is noise around zero, not a reason to leave first."""
    found = evidence.gradients.curvature.get(group.name)
    return [np.zeros(group.units) if found is None else 0.5 * np.maximum(found[0], 0.0)]


GATES = (
    Criterion("taylor", "|E dL/dz| of a gate z (Molchanov et al., arXiv 1906.10771, gate form)",
              _gated(lambda g: np.abs(g.mean(axis=0))), "gradients"),
    Criterion("fisher", "E (dL/dz)^2 / 2 per sample (Theis et al., arXiv 1801.05787; Kwon et al., arXiv 2204.09656)",
              _gated(lambda g: 0.5 * np.square(g).mean(axis=0)), "gradients"),
    Criterion("heads", "E |dL/dz| per sample, of unit length in each layer (Michel et al., arXiv 1905.10650)",
              _gated(_heads), "gradients"),
    Criterion("hap", "d2L/dz^2 / 2 by Hutchinson over gates (HAP, arXiv 2101.08940, without its factorisation)",
              _hap, "gradients"),
)  # fmt: skip
