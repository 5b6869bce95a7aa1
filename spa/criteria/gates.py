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


def rearranged(gradients: NDArray[np.floating], removed: NDArray[np.int64], rounds: int = 64) -> NDArray[np.int64]:
    """Exchange removed units for others while that lowers E (sum of the removed units' dL/dz)^2; never worse.

    That is the loss of removing them together, by the Fisher information of the whole group in place of its diagonal.
    Source: Kwon et al. (arXiv 2204.09656), section 4.2, mask rearrangement.

    Args:
        gradients: [samples, units].
        removed: units.
        rounds: exchanges at most.
    """
    fisher = gradients.T.astype(np.float64) @ gradients
    out = np.isin(np.arange(len(fisher)), removed)
    for _ in range(rounds):
        gone, kept = np.flatnonzero(out), np.flatnonzero(~out)
        if not len(gone) or not len(kept):
            break
        together = fisher[:, gone].sum(axis=1)
        back = np.diag(fisher)[gone] - 2 * together[gone]
        leave = np.diag(fisher)[kept] + 2 * together[kept]
        change = back[:, None] + leave[None, :] - 2 * fisher[np.ix_(gone, kept)]
        p, q = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[p, q] >= -1e-9 * max(float(together[gone].sum()), 1e-30):
            break
        out[gone[p]], out[kept[q]] = False, True
    return np.flatnonzero(out)


def _rearranged(group: Group, evidence: Evidence, removed: NDArray[np.int64]) -> NDArray[np.int64]:
    found = evidence.gradients.gates.get(group.name)
    return removed if found is None else rearranged(found, removed)


def _heads(g: NDArray[np.float64]) -> Vector:
    """Normalised by the group, which is a layer: its heads compete on equal terms with those of others."""
    mean = np.abs(g).mean(axis=0)
    return np.asarray(mean / (np.sqrt(np.square(mean).sum()) + 1e-30))


def _hap(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Half the second derivative, freed of the noise of its estimate."""
    found = evidence.gradients.curvature.get(group.name)
    return [np.zeros(group.units) if found is None else 0.5 * shrunk(*found)]


def shrunk(value: Vector, error: Vector) -> Vector:
    """Estimates of a group's units, [units], drawn to their mean as far as their standard errors `error` ask for.

    Those that leave are the lowest, so that noise picks what it made too small, and their sum says that it costs
    nothing: James and Stein's estimator with the group as its prior (Efron & Morris, 1975), never negative.
    """
    mean, noise = float(value.mean()), np.square(error)
    signal = max(float(value.var()) - float(noise.mean()), 0.0)
    share = signal / np.maximum(signal + noise, 1e-300)
    return np.maximum(mean + share * (value - mean), 0.0)


GATES = (
    Criterion("taylor", "|E dL/dz| of a gate z (Molchanov et al., arXiv 1906.10771, gate form)",
              _gated(lambda g: np.abs(g.mean(axis=0))), "gradients"),
    Criterion("fisher", "E (dL/dz)^2 / 2 per sample (Theis et al., arXiv 1801.05787; Kwon et al., arXiv 2204.09656)",
              _gated(lambda g: 0.5 * np.square(g).mean(axis=0)), "gradients", _rearranged),
    Criterion("heads", "E |dL/dz| per sample, of unit length in each layer (Michel et al., arXiv 1905.10650)",
              _gated(_heads), "gradients"),
    Criterion("hap", "d2L/dz^2 / 2 by Hutchinson over gates (HAP, arXiv 2101.08940, without its factorisation)",
              _hap, "gradients"),
)  # fmt: skip
