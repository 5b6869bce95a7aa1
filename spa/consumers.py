"""Where the units of a group are consumed: columns of sites, and positions of activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import Axis
from spa.groups import Analysis, Group
from spa.rules import Flow, Op, Operand
from spa.sites import Site

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tap:
    """An activation that carries units to where they are summed over, or chosen between."""

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

    An operator that only passes a unit on is none of them; a weight is none. Of experts it is the shares that they
    get; logits say nothing, as they may be large and negative.
    """
    by_node = {site.node: site for site in sites}
    operands: dict[tuple[ir.Node, int], Operand] = {}
    found: dict[tuple[str, ir.Node, int, int], set[int]] = {}
    for flow, op, leaf, owners in sums(analysis, groups):
        for slot, d in flow.inputs if flow.leaving == "sum" or _of_shares(flow) else ():
            operand = op.inputs[slot]
            if operand is not None and not operand.constant:
                operands[op.node, slot] = operand
                for group in owners:
                    found.setdefault((group.name, op.node, slot, d), set()).add(leaf)
    by_name = {group.name: group for group in groups}
    out: dict[str, list[Tap]] = {group.name: [] for group in groups}
    for (name, node, slot, d), leaves in found.items():
        operand = operands[node, slot]
        units = units_along(analysis, by_name[name], leaves, operand.dims[d])
        if (units >= 0).any():
            site = by_node.get(node)
            site = site if site is not None and operand.value is site.data else None
            out[name].append(Tap(operand.value, d, len(operand.dims), units, site))
    return out


def sums(analysis: Analysis, groups: Sequence[Group]) -> Iterator[tuple[Flow, Op, int, list[Group]]]:
    """Where the main graph sums over units: the flow, its operator, the leaf, and the groups that own it.

    Experts count where a router chooses from their shares; where it has only logits, in sums if there are any.
    """
    coupling = analysis.coupling
    ops = {op.node: op for op in coupling.ops if op.node.graph is coupling.model.graph}
    owner: dict[int, list[Group]] = {}
    for group in groups:
        for leaf in group.leaves:
            owner.setdefault(leaf, []).append(group)
    flows = [flow for flow in coupling.relations.flows if flow.node in ops]
    routed = {leaf for flow in flows if flow.leaving == "choice" for leaf in coupling.solution.leaves(flow.axis)}
    best: dict[int, int] = {}
    found: list[tuple[int, Flow, int]] = []
    for flow in flows:
        for leaf in set(coupling.solution.leaves(flow.axis)) & owner.keys():
            rank = _worth(flow, leaf in routed)
            best[leaf] = max(best.get(leaf, 0), rank)
            found.append((rank, flow, leaf))
    for rank, flow, leaf in found:
        if rank and rank == best[leaf]:
            yield flow, ops[flow.node], leaf, owner[leaf]


def _worth(flow: Flow, routed: bool) -> int:
    """Where to look at units first; 0 for operators that pass them on, share out between them, or only number them."""
    if flow.leaving == "sum":
        return 2
    if not routed or flow.outputs or _numbers_only(flow.node):
        return 0
    return 3 if _of_shares(flow) else int(flow.leaving == "choice")


def _numbers_only(node: ir.Node) -> bool:
    """Whether nothing but the numbers of what is chosen is used."""
    values = node.outputs[0]
    return node.op_type == "ArgMax" or (node.op_type == "TopK" and not values.uses() and not values.is_graph_output())


_SHARES = ("Softmax", "Sigmoid")
_VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose")


def _of_shares(flow: Flow) -> bool:
    """Whether an operator reads what a Softmax or Sigmoid gave."""
    value = flow.node.inputs[flow.inputs[0][0]]
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _SHARES


def units_along(analysis: Analysis, group: Group, leaves: Iterable[int], dim: Axis) -> Index:
    """Per position of a dim the unit of `group` it belongs to by one of `leaves`, -1 for none."""
    solution = analysis.coupling.solution
    unit = np.full(solution.positions, -1, dtype=np.int64)
    unit[group.positions] = np.arange(group.units)[:, None]
    mine = np.full_like(unit, -1)
    for leaf in leaves:
        span = slice(solution.base[leaf], solution.base[leaf + 1])
        mine[span] = unit[span]
    return solution.spread(dim, mine)
