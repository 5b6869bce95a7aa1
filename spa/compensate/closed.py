"""Compensation from statistics of the original model alone: no further pass over the data.

`shift_means`: removed inputs count with their mean, which goes into the consumer's bias (VBP, FLAP):
b' = b + W_P mu_P. Where a convolution pads with zeros the mean is that of patches, zeros included: exact on average
over all output positions, not at each border position.

`refit_readers`: the optimal weights as well, W'_S = W C_:S (C_SS)^-1 with a free bias (OB2C, arXiv 2608.17657;
one layer of `walk`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.compensate.bias import bias_of
from spa.compensate.pairs import kept_outputs
from spa.consumers import Tap
from spa.groups import Group
from spa.measured import Measured
from spa.removal import kept_without
from spa.sites import Site, exchange, site_of
from spa.twin import Twin

Index = NDArray[np.int64]
Removed = tuple[Group, Sequence[int]]


def shift_means(twin: Twin, measured: Measured, removed: Sequence[Removed]) -> None:
    """Put the mean of what was removed into the biases of the pruned model `twin`."""
    for reader in _readers(twin, measured, removed):
        site, weight = reader.site, reader.site.weights
        if site.layout == "tokens":  # a mean of channels is cheaper than their covariance
            mean = measured.profile(reader.tap).pooled()[0].reshape(1, -1)
        else:
            mean = measured.joint(site).mean_x
        lost = np.where(reader.gone[:, None, :], weight, 0.0)
        reader.add(twin, np.einsum("gmd,gd->gm", lost, mean))


def refit_readers(twin: Twin, measured: Measured, removed: Sequence[Removed], damping: float = 1e-2) -> None:
    """Refit what reads removed units, towards the original's outputs on the original's inputs."""
    for reader in _readers(twin, measured, removed):
        joint, weight = measured.joint(reader.site), reader.site.weights
        new = weight.copy()
        for g, gone in enumerate(reader.gone):
            out = np.flatnonzero(gone)
            if len(out):
                inverse = measured.inverse(reader.site, g, damping)
                new[g] -= weight[g][:, out] @ np.linalg.solve(inverse[np.ix_(out, out)], inverse[out])
            new[g][:, out] = 0.0
        reader.write(new)
        reader.add(twin, np.einsum("gmd,gd->gm", weight - new, joint.mean_x))


@dataclass(frozen=True)
class _Reader:
    """A site that reads removed units."""

    site: Site
    mirror: Site
    """Its copy in the pruned model."""
    gone: NDArray[np.bool_]
    """[g, k c]: columns that are gone."""
    tap: Tap
    """One of the groups' taps on the site."""
    rows: Index
    """Outputs of the site that the pruned model has, of [g m]."""

    def write(self, weight: NDArray[np.float64]) -> None:
        """`weight` [g, m, k c] without what is gone."""
        group, row = self.rows // self.site.rows, self.rows % self.site.rows
        left = [weight[g, m][~self.gone[g]] for g, m in zip(group.tolist(), row.tolist(), strict=True)]
        mirror = self.mirror
        exchange(mirror.weight, mirror.stored(np.stack(left).reshape(mirror.groups, mirror.rows, mirror.columns)))

    def add(self, twin: Twin, offset: NDArray[np.float64]) -> None:
        """Add `offset` [g, m] to the bias."""
        bias = bias_of(twin, self.mirror)
        bias.write(bias.read() + offset.reshape(-1)[self.rows])


def _readers(twin: Twin, measured: Measured, removed: Sequence[Removed]) -> list[_Reader]:
    """Sites that read removed units and can be written to, in execution order."""
    coupling = measured.analysis.coupling
    kept = kept_without(measured.analysis, removed)
    lost: dict[Site, NDArray[np.bool_]] = {}
    through: dict[Site, Tap] = {}
    for group, units in removed:
        out = np.zeros(group.units, dtype=bool)
        out[list(units)] = True
        for tap in measured.readers(group):
            assert tap.site is not None
            through.setdefault(tap.site, tap)
            mask = lost.setdefault(tap.site, np.zeros(len(tap.units), dtype=bool))
            mask |= np.where(tap.units >= 0, out[np.maximum(tap.units, 0)], False)
    found = []
    for site in [s for s in measured.sites if s in lost]:
        mirror, rows = site_of(twin.node(site.node)), kept_outputs(coupling, site, kept)
        if mirror is None or rows is None:
            continue
        table = np.tile(lost[site].reshape(site.groups, 1, site.channels), (1, site.taps, 1)).reshape(site.groups, -1)
        if len(rows) == mirror.groups * mirror.rows:
            found.append(_Reader(site, mirror, table, through[site], rows))
    return found
