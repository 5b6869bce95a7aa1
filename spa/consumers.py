"""Which columns of which sites the units of a group feed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.groups import Analysis, Group
from spa.sites import Site, constant_of


@dataclass(frozen=True, eq=False)
class Reader:
    """A site that contracts over the units of a group."""

    site: Site
    units: NDArray[np.int64]
    """Per input channel [groups x channels]: the unit it belongs to, -1 for none."""

    @property
    def weight(self) -> NDArray[np.float64]:
        """[g, m, k c]"""
        tensor = constant_of(self.site.weight)
        assert tensor is not None
        return self.site.matrix(tensor.numpy())

    def columns(self, count: int) -> NDArray[np.int64]:
        """Columns of the site's matrix per group of the operator and unit, [g, count, b]; -1 pads."""
        site = self.site
        table = self.units.reshape(site.groups, site.channels)
        width = max(int(np.bincount(row[row >= 0], minlength=count).max()) for row in table)
        out = np.full((site.groups, count, width * site.taps), -1, dtype=np.int64)
        for g, row in enumerate(table):
            order = np.argsort(row, kind="stable")
            order = order[row[order] >= 0]
            owner = row[order]
            rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
            for tap in range(site.taps):
                out[g, owner, rank * site.taps + tap] = tap * site.channels + order
        return out


def readers(analysis: Analysis, groups: Sequence[Group], sites: Sequence[Site]) -> Mapping[str, list[Reader]]:
    """Per group (by name) the sites that contract over it; a unit that is only passed on there does not count."""
    coupling = analysis.coupling
    solution = coupling.solution
    out: dict[str, list[Reader]] = {group.name: [] for group in groups}
    axes = []
    for site in sites:
        inputs, outputs = coupling.dims(site.data), coupling.dims(site.output)
        if inputs is None or outputs is None:
            continue
        at = -1 if site.layout == "tokens" else 1
        inner = set(solution.leaves(inputs[at])) - set(solution.leaves(outputs[at]))
        axes.append((site, inputs[at], inner))
    for group in groups:
        unit = np.full(solution.positions, -1, dtype=np.int64)
        unit[group.positions] = np.arange(group.units)[:, None]
        for site, axis, inner in axes:
            if inner & group.leaves.keys():
                mine = unit.copy()
                for leaf in group.leaves.keys() - inner:
                    mine[solution.base[leaf] : solution.base[leaf + 1]] = -1
                found = solution.spread(axis, mine)
                if (found >= 0).any():
                    out[group.name].append(Reader(site, found))
    return out
