"""AMP: magnitude of what heads and neurons contribute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing
from spa.evidence import Evidence, Vector
from spa.groups import Group


def _amp(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """||h_n W_n||_1 of units with several columns (heads, channels of k x k kernels), mean |h| of single neurons.

    The mean of |z| over the data is taken from the second moment of z, sqrt(2/pi E[z^2]), as for a normal z: the
    paper's own sum would need the product of every head with its weights.
    """
    measured, rows = evidence.measured, []
    for tap in measured.readers(group):
        site = tap.site
        assert site is not None
        joint, weight, columns = measured.joint(site), site.weights, tap.columns(group.units)
        if columns.shape[2] == 1 and site.groups == 1:
            continue
        total = np.zeros(group.units)
        for g in range(site.groups):
            second = joint.covariance[g] + np.outer(joint.mean_x[g], joint.mean_x[g])
            for unit, mine in enumerate(columns[g]):
                c = mine[mine >= 0]
                w = weight[g][:, c]
                power = np.einsum("mi,ij,mj->m", w, second[np.ix_(c, c)], w)
                total[unit] += np.sqrt(2 / np.pi * np.maximum(power, 0)).sum()
        rows.append(total)
    if rows:
        return rows
    return activations(group, evidence, lambda tap, profile: profile.absolute.mean(axis=0)) or nothing(group)


AMP = Criterion("amp", "||h W||_1 of heads, mean |h| of neurons (AMP, arXiv 2504.21174)", _amp, "data")
