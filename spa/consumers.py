"""Where the units of a group are consumed: columns of sites, and positions of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.groups import Analysis, Group
from spa.rules import Operand
from spa.sites import Site

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tap:
    """An activation that carries units to where they are summed over."""

    value: ir.Value
    axis: int
    rank: int
    units: Index
    """Per position of the axis the unit it belongs to, -1 for none."""
    site: Site | None
    """The linear operator that sums, None for a product of two activations and the like."""

    @property
    def key(self) -> tuple[str, int]:
        """Names the activation and its axis."""
        return self.value.name or "", self.axis

    def per_unit(self, values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Sum per-position values into units, [count]."""
        inside = self.units >= 0
        return np.bincount(self.units[inside], weights=values[inside], minlength=count).astype(np.float64)

    def columns(self, count: int) -> Index:
        """Columns of the site's matrix per group of the operator and unit, [g, count, b]; -1 pads."""
        site = self.site
        assert site is not None
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


def taps(analysis: Analysis, groups: Sequence[Group], sites: Sequence[Site]) -> Mapping[str, list[Tap]]:
    """Per group (by name) the activations of the main graph that carry it into a sum, in execution order.

    An operator that only passes a unit on is none of them; a weight is none.
    """
    coupling = analysis.coupling
    solution = coupling.solution
    by_node = {site.node: site for site in sites}
    ops = {op.node: op for op in coupling.ops if op.node.graph is coupling.model.graph}
    out: dict[str, list[Tap]] = {group.name: [] for group in groups}
    owner: dict[int, list[Group]] = {}
    for group in groups:
        for leaf in group.leaves:
            owner.setdefault(leaf, []).append(group)
    found: dict[tuple[str, ir.Node, int, int], set[int]] = {}
    operands: dict[tuple[ir.Node, int], Operand] = {}
    for flow in coupling.relations.flows:
        if flow.leaving != "sum" or flow.node not in ops:
            continue
        for leaf in set(solution.leaves(flow.axis)) & owner.keys():
            for slot, d in flow.inputs:
                operand = ops[flow.node].inputs[slot]
                if operand is not None and not operand.constant:
                    operands[flow.node, slot] = operand
                    for group in owner[leaf]:
                        found.setdefault((group.name, flow.node, slot, d), set()).add(leaf)
    by_name = {group.name: group for group in groups}
    for (name, node, slot, d), leaves in found.items():
        group, operand = by_name[name], operands[node, slot]
        unit = np.full(solution.positions, -1, dtype=np.int64)
        unit[group.positions] = np.arange(group.units)[:, None]
        mine = np.full_like(unit, -1)
        for leaf in leaves:
            span = slice(solution.base[leaf], solution.base[leaf + 1])
            mine[span] = unit[span]
        units = solution.spread(operand.dims[d], mine)
        if (units >= 0).any():
            site = by_node.get(node)
            site = site if site is not None and operand.value is site.data else None
            out[name].append(Tap(operand.value, d, len(operand.dims), units, site))
    return out
