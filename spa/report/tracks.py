"""The coupling of a model as tracks beside the list of its layers.

Every group is a track, from the first operator that has its units to the last one; every layer is a line of the list,
joined with the tracks whose units it sums over and with those that it makes. That is the graph of groups (nodes) and
layers (edges), laid out in the order of execution: two tracks share a column where one ends before the other begins,
as intervals are coloured, so that a chain of any length needs few columns.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from spa.axes import Axis
from spa.coupling import Coupling
from spa.explain import because, is_window
from spa.groups import Analysis, Group, Member
from spa.rules import Flow, Op

GROUPS = 2500
"""Drawn at most, those with most parameters."""
LAYERS = 10_000
"""Listed at most."""


@dataclass(frozen=True)
class Part:
    """One axis of a weight that loses slices with a group."""

    tensor: str
    axis: int
    role: str
    """See `spa.groups.Member`."""
    node: str
    """That reads it."""


@dataclass(frozen=True)
class Track:
    """One group."""

    name: str
    kind: str
    units: int
    exact: bool
    why: str
    """Why it is not exact."""
    parameters: int
    unit_parameters: int
    unit_macs: int
    parts: tuple[Part, ...]
    first: int
    """Line where it begins, its own."""
    last: int
    """Line where it ends."""
    column: int


@dataclass(frozen=True)
class Layer:
    """One operator that multiplies."""

    name: str
    operator: str
    sums: tuple[int, ...]
    """Tracks whose units it sums over."""
    makes: tuple[int, ...]
    """Tracks whose units it makes."""
    passes: tuple[int, ...]
    """Tracks that go through it with weights of their own, as through a depthwise convolution."""


@dataclass(frozen=True)
class Name:
    """Something to search for."""

    text: str
    what: str
    """node, weight, input, output or activation."""
    tracks: tuple[int, ...]
    frozen: tuple[str, ...]
    """Why axes of it cannot be pruned."""


@dataclass(frozen=True)
class Tracks:
    """What is coupled with what in a model."""

    tracks: tuple[Track, ...]
    lines: tuple[Layer | int, ...]
    """Layers in the order of execution; the number of a track where it begins."""
    columns: int
    names: tuple[Name, ...]
    """Weights, inputs and outputs, nodes, then activations: what is left out first is asked for least."""
    left_out: int
    """Groups that are not drawn."""
    unlisted: int
    """Layers that have no line."""


def tracks(analysis: Analysis) -> Tracks:
    """Lay out the groups and layers of a model."""
    coupling = analysis.coupling
    ranked = sorted(analysis.groups, key=lambda g: -g.parameters)
    drawn = {id(g) for g in ranked[:GROUPS]}
    groups = [g for g in analysis.groups if id(g) in drawn]
    owners = _owners(groups)
    spans = _spans(coupling, owners, len(groups))
    lines, starts, unlisted = _lines(coupling, owners, spans)
    ends = _ends(coupling, lines, spans)
    columns = _columns(starts, ends)
    return Tracks(
        tuple(_track(g, starts[k], ends[k], columns[k]) for k, g in enumerate(groups)),
        tuple(layer for layer, _ in lines),
        max(columns, default=-1) + 1,
        tuple(_names(analysis, owners)),
        len(analysis.groups) - len(groups),
        unlisted,
    )


def _track(group: Group, first: int, last: int, column: int) -> Track:
    return Track(
        group.name,
        group.kind,
        group.units,
        group.exact,
        group.inexact,
        group.parameters,
        round(group.unit_parameters),
        round(group.unit_macs),
        tuple(dict.fromkeys(Part(m.tensor, m.axis, m.role, _reader(m)) for m in group.members)),
        first,
        last,
        column,
    )


def _reader(member: Member) -> str:
    use = member.use or next(iter(member.value.uses()), None)
    return (use[0].name or "") if use is not None else ""


Owners = Mapping[int, Sequence[int]]
"""Leaf -> the groups that own positions of it."""


def _owners(groups: Sequence[Group]) -> Owners:
    out: dict[int, list[int]] = {}
    for k, group in enumerate(groups):
        for leaf in group.leaves:
            out.setdefault(leaf, []).append(k)
    return out


def _groups_of(coupling: Coupling, owners: Owners, dims: Iterable[Axis]) -> set[int]:
    found = set[int]()
    for dim in dims:
        if dim < len(coupling.solution.terms):
            for leaf in coupling.solution.leaves(dim):
                found.update(owners.get(leaf, ()))
    return found


def _dims(op: Op) -> Iterator[Axis]:
    for operand in (*op.inputs, *op.outputs):
        if operand is not None:
            yield from operand.dims


# -- lines -------------------------------------------------------------------------------------------------------------


def _spans(coupling: Coupling, owners: Owners, count: int) -> list[tuple[int, int]]:
    """First and last operator that has units of each group."""
    first, last = [len(coupling.ops)] * count, [-1] * count
    for k, op in enumerate(coupling.ops):
        for group in _groups_of(coupling, owners, _dims(op)):
            first[group] = min(first[group], k)
            last[group] = k
    return [(a, max(a, b)) for a, b in zip(first, last, strict=True)]


def _lines(
    coupling: Coupling, owners: Owners, spans: Sequence[tuple[int, int]]
) -> tuple[list[tuple[Layer | int, int]], list[int], int]:
    """Lines with the operator they belong to, the line at which each group begins, and how many layers have none.

    Of groups that begin at the same operator, the one that lives longest comes first.
    """
    flows: dict[ir.Node, list[Flow]] = {}
    for flow in coupling.relations.flows:
        flows.setdefault(flow.node, []).append(flow)
    costly = {cost.node for cost in coupling.relations.costs}
    begin: dict[int, list[int]] = {}
    for group in sorted(range(len(spans)), key=lambda g: -spans[g][1]):
        begin.setdefault(spans[group][0], []).append(group)
    lines: list[tuple[Layer | int, int]] = []
    starts = [0] * len(spans)
    layers = 0
    for k in range(len(coupling.ops) + 1):
        for group in begin.get(k, ()):
            starts[group] = len(lines)
            lines.append((group, k))
        if k < len(coupling.ops) and coupling.ops[k].node in costly:
            layer = _layer(coupling, owners, coupling.ops[k], flows.get(coupling.ops[k].node, ()))
            if layer.sums or layer.makes or layer.passes:
                layers += 1
                if layers <= LAYERS:
                    lines.append((layer, k))
    return lines, starts, max(layers - LAYERS, 0)


def _layer(coupling: Coupling, owners: Owners, op: Op, flows: Iterable[Flow]) -> Layer:
    sums, makes, passes = set[int](), set[int](), set[int]()
    for flow in flows:
        found = _groups_of(coupling, owners, (flow.axis,))
        operands = [op.inputs[slot] for slot, _ in flow.inputs]
        fixed = [operand is not None and operand.value in coupling.weights for operand in operands]
        if flow.leaving == "sum":
            sums |= found
        elif fixed and all(fixed):
            makes |= found
        elif any(fixed):
            passes |= found
    label = op.node.name or (op.node.outputs[0].name if op.node.outputs else "") or ""
    ordered = (tuple(sorted(found)) for found in (sums, makes, passes - makes))
    return Layer(label, op.node.op_type, *ordered)


def _ends(coupling: Coupling, lines: Sequence[tuple[Layer | int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The last line at or before the last operator of each group, not before its own."""
    last_line = [0] * (len(coupling.ops) + 1)
    for position, (_, k) in enumerate(lines):
        last_line[k] = position
    for k in range(1, len(last_line)):
        last_line[k] = max(last_line[k], last_line[k - 1])
    return [last_line[min(last, len(coupling.ops))] for _, last in spans]


def _columns(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A column for each track, the lowest that is free; tracks in one column do not touch."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    out = [0] * len(starts)
    used = 0
    for group in sorted(range(len(starts)), key=lambda g: starts[g]):
        while busy and busy[0][0] < starts[group]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            column = heapq.heappop(free)
        else:
            column, used = used, used + 1
        out[group] = column
        heapq.heappush(busy, (ends[group], column))
    return out


# -- names -------------------------------------------------------------------------------------------------------------


def _names(analysis: Analysis, owners: Owners) -> Iterator[Name]:
    """In the order of `Tracks.names`."""
    coupling = analysis.coupling
    graph = coupling.model.graph
    frozen: dict[str, list[str]] = {}
    for axis in analysis.frozen:
        if not is_window(axis):
            frozen.setdefault(axis.tensor, []).append(f"axis {axis.axis}: {because(axis)}")
    found: dict[ir.Value, set[int]] = {value: set() for value in coupling.weights}
    for value in (*graph.inputs, *graph.outputs):
        found.setdefault(value, set())
    nodes: list[Name] = []
    for op in coupling.ops:
        mine = set[int]()
        for operand in (*op.inputs, *op.outputs):
            if operand is not None:
                groups = _groups_of(coupling, owners, operand.dims)
                found.setdefault(operand.value, set()).update(groups)
                mine |= groups
        if op.node.name:
            nodes.append(Name(op.node.name, "node", tuple(sorted(mine)), ()))
    inputs, outputs = set(graph.inputs), set(graph.outputs)

    def name(value: ir.Value) -> Name:
        text = value.name or ""
        weight = value in coupling.weights
        what = "weight" if weight else "input" if value in inputs else "output" if value in outputs else "activation"
        return Name(text, what, tuple(sorted(found[value])), tuple(frozen.get(text, ())) if weight else ())

    values = [name(value) for value in found if value.name]
    first = ("weight", "input", "output")
    yield from (v for v in values if v.what in first)
    yield from nodes
    yield from (v for v in values if v.what not in first)
