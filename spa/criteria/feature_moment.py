"""Denoised variance: the covariance without what a finite sample makes up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa.criteria.base import Criterion
from spa.criteria.variance import VARIANCE
from spa.evidence import Evidence, Vector
from spa.groups import Group

_ROUNDS = 20


def denoised_diagonal(covariance: NDArray[np.float64], rows: int) -> Vector:
    """Diagonal of the covariance restricted to eigenvectors above the Marchenko-Pastur edge, [d].

    The edge of pure noise is s^2 (1 + sqrt(d / rows))^2 with s^2 the mean eigenvalue below it, found by iteration.
    """
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0.0)
    ratio = (1 + np.sqrt(len(values) / max(rows, 1))) ** 2
    noise = float(np.median(values))
    for _ in range(_ROUNDS):
        below = values[values <= noise * ratio]
        new = float(below.mean()) if len(below) else 0.0
        if abs(new - noise) <= 1e-9 * abs(noise):
            break
        noise = new
    signal = values > noise * ratio
    return np.asarray((np.square(vectors[:, signal]) * values[signal]).sum(axis=1))


def _feature_moment(group: Group, evidence: Evidence) -> Sequence[Vector]:
    measured, rows = evidence.measured, []
    for tap in measured.readers(group):
        site = tap.site
        assert site is not None
        joint = measured.joint(site)
        diagonals = [denoised_diagonal(c, joint.rows) for c in joint.covariance]
        by_channel = np.stack(diagonals).reshape(site.groups, site.taps, site.channels).mean(axis=1)
        rows.append(tap.per_unit(by_channel.reshape(-1), group.units))
    return rows or VARIANCE.members(group, evidence)


FEATURE_MOMENT = Criterion(
    "feature-moment", "diagonal of the denoised covariance (DVBP, arXiv 2608.17657)", _feature_moment, "data"
)
