"""Means and covariances that are merged over batches, in float64.

Source of the merge: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 2.1, for
matrices: each part is centred on its own mean first, so that nothing cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Joint:
    """Joint moments of inputs x [d] and targets t [m] of g independent groups."""

    rows: int
    """Observations."""
    mean_x: Array
    """[g, d]"""
    mean_t: Array
    """[g, m]; m is 0 without targets."""
    xx: Array
    """Sum of (x - mean)(x - mean)^T, [g, d, d]."""
    tx: Array
    """Sum of (t - mean)(x - mean)^T, [g, m, d]."""
    tt: Array
    """Sum of (t - mean)^2, [g, m]."""

    def merge(self, other: Joint) -> None:
        """Take another part of the observations in."""
        total = self.rows + other.rows
        weight = self.rows * other.rows / total
        dx, dt = other.mean_x - self.mean_x, other.mean_t - self.mean_t
        self.xx += other.xx
        self.tx += other.tx
        self.tt += other.tt + weight * dt**2
        for k in range(len(dx)):
            self.xx[k] += weight * np.outer(dx[k], dx[k])
            self.tx[k] += weight * np.outer(dt[k], dx[k])
        self.mean_x += dx * (other.rows / total)
        self.mean_t += dt * (other.rows / total)
        self.rows = total

    def mixed(self, mix: Array) -> Joint:
        """Of targets mix t, [k, m] each; their variance is not known."""
        none = np.full((len(self.mean_t), len(mix)), np.nan)
        return Joint(self.rows, self.mean_x, self.mean_t @ mix.T, self.xx, mix @ self.tx, none)

    @property
    def covariance(self) -> Array:
        """Cov(x), [g, d, d]."""
        return self.xx / self.rows

    @property
    def cross(self) -> Array:
        """Cov(t, x), [g, m, d]."""
        return self.tx / self.rows

    @property
    def variance_t(self) -> Array:
        """Var(t), [g, m]."""
        return self.tt / self.rows
