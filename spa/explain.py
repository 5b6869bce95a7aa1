"""Why a tensor can or cannot be pruned, and what it is coupled with.

The coupling graph has one vertex per axis of a tensor (a `Place`) and one edge per node that carries a common index
space from one operand's axis to another's. What is frozen was frozen somewhere: the shortest path from the tensor to
that place is the explanation.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir

from spa.axes import Axis, Reason
from spa.coupling import Coupling, Use
from spa.errors import UsageError
from spa.graph import Graph, Source
from spa.groups import Analysis, Frozen, Group, operand_roles, strongest
from spa.pipeline import analyze
from spa.rules import Op, Operand

__all__ = [
    "AxisExplanation",
    "Coupled",
    "Explanation",
    "FrozenPart",
    "GroupPart",
    "Place",
    "Step",
    "because",
    "coupling_graph",
    "explain",
    "inspection",
    "is_window",
]

_SINGLE = Reason("the only position of an axis")


@dataclass(frozen=True)
class Place:
    """One axis of a tensor: a vertex of the coupling graph."""

    value: ir.Value
    axis: int
    use: Use | None = None
    """The use meant, where uses of a constant have axes of their own."""

    @property
    def tensor(self) -> str:
        """Name of the tensor."""
        return self.value.name or ""


@dataclass(frozen=True)
class Step:
    """One edge of a path: through a node to an axis of another tensor."""

    operator: str
    node: str
    """Name of the node, empty if it has none."""
    tensor: str
    axis: int


@dataclass(frozen=True)
class GroupPart:
    """A group that an axis belongs to."""

    name: str
    kind: str
    units: int
    exact: bool
    why: str
    """Why its units are not exact; empty if they are."""


@dataclass(frozen=True)
class FrozenPart:
    """Positions of an index space of an axis that cannot be removed, and where that was decided."""

    reason: str
    operator: str
    """Type of the operator that froze it, empty if none did."""
    node: str
    """Name of that operator's node."""
    path: tuple[Step, ...]
    """From the explained axis to the axis that was frozen; empty if it is that axis itself, or no path is known."""


@dataclass(frozen=True)
class Coupled:
    """An axis that shares index spaces with the explained one."""

    tensor: str
    axis: int
    role: str
    """Of a weight in, out, scale or index (see `spa.groups.Member`); else input, output or activation."""


@dataclass(frozen=True)
class AxisExplanation:
    """One axis of the tensor."""

    axis: int
    size: int | str
    consumer: str
    """Where uses of the tensor have axes of their own: the output of the node that is meant, else empty."""
    prunable: bool
    """Whether at least a part of it can be pruned."""
    groups: tuple[GroupPart, ...]
    frozen: tuple[FrozenPart, ...]
    coupled: tuple[Coupled, ...]
    note: str
    """Why it is in no group although nothing froze it; empty otherwise."""


@dataclass(frozen=True)
class Explanation:
    """Why a tensor can or cannot be pruned, axis by axis."""

    tensor: str
    role: str
    """weight, input, output or activation."""
    shape: tuple[int | str, ...]
    axes: tuple[AxisExplanation, ...]

    def to_json(self) -> dict[str, Any]:
        """As `spa explain --json` prints it."""
        return asdict(self)


def explain(source: Source | Graph | Analysis, tensor: str) -> Explanation:
    """Why `tensor` can or cannot be pruned, and what it is coupled with.

    Args:
        source: a model as `spa.analyze` takes it, or its analysis.
        tensor: name of an initializer, an activation, a graph input or a graph output.

    Raises:
        UsageError: the model has no such tensor; names the closest ones.
        ModelError: the model cannot be read (see `spa.load`).
    """
    analysis = source if isinstance(source, Analysis) else analyze(source)
    value = _find(analysis.coupling.model, tensor)
    return _Explainer(analysis).run(value)


def inspection(analysis: Analysis) -> dict[str, Any]:
    """What can be pruned and what cannot, as `spa inspect --json` prints it."""
    return {
        "parameters": analysis.parameters,
        "macs": round(analysis.macs),
        "prunable_parameters": analysis.prunable_parameters,
        "groups": [
            {
                "name": g.name,
                "kind": g.kind,
                "units": g.units,
                "exact": g.exact,
                "why": g.inexact,
                "parameters": g.parameters,
                "macs": round(g.macs),
                "unit_parameters": round(g.unit_parameters),
                "unit_macs": round(g.unit_macs),
                "members": [
                    {"tensor": m.tensor, "axis": m.axis, "role": m.role, "consumer": _consumer(m.use)}
                    for m in g.members
                ],
            }
            for g in analysis.groups
        ],
        "frozen": [
            {
                "tensor": f.tensor,
                "axis": f.axis,
                "reason": f.reason.text,
                "operator": f.reason.operator,
                "node": f.reason.node,
                "parameters": f.parameters,
            }
            for f in analysis.frozen
        ],
    }


def is_window(frozen: Frozen) -> bool:
    """Kernel windows and the like: true, and of no interest."""
    return frozen.axis >= 2 and "reads this axis as a whole" in frozen.reason.text


def because(frozen: Frozen) -> str:
    """The reason with the node's name."""
    reason = frozen.reason
    return f"{reason.text} ({reason.operator} {reason.node})" if reason.node else reason.text


def _consumer(use: Use | None) -> dict[str, Any] | None:
    """The use that is meant, as a plan names it; None for all."""
    return None if use is None else {"output": use[0].outputs[0].name or "", "input": use[1]}


# -- the coupling graph ------------------------------------------------------------------------------------------------


def coupling_graph(analysis: Analysis) -> nx.MultiGraph:
    """Which axes of which tensors are coupled, and by which nodes.

    Vertices are `Place`s with the attribute `leaves`, the index spaces of the axis. Edges have the attributes `node`
    (an `onnx_ir.Node`, also the key) and `leaves`, the index spaces that the node carries from one axis to the other;
    where it picks positions (Gather with constant indices), those of both sides. Index spaces of one position are left
    out: they are never removed.
    """
    coupling = analysis.coupling
    graph = nx.MultiGraph()
    joined = _Joined(analysis)
    picking = {remap.node for remap in coupling.relations.remaps}
    for op in coupling.ops:
        inputs, outputs = _places(coupling, op)
        spaces = {place: joined.leaves(dim) for place, dim in (*inputs, *outputs)}
        for place, leaves in spaces.items():
            graph.add_node(place, leaves=leaves)
        for a, b in combinations(spaces, 2):
            if common := spaces[a] & spaces[b]:
                graph.add_edge(a, b, key=op.node, node=op.node, leaves=common)
        for a, b in _picked(joined, spaces, [p for p, _ in inputs], [p for p, _ in outputs], op.node in picking):
            graph.add_edge(a, b, key=op.node, node=op.node, leaves=joined.common(spaces[a], spaces[b]))
    return graph


def _places(coupling: Coupling, op: Op) -> tuple[list[tuple[Place, Axis]], list[tuple[Place, Axis]]]:
    """Axes of the inputs and of the outputs of a node; the ends of its subgraphs count on both sides."""
    inner: list[Operand | None] = []
    for attribute in op.node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            inner.extend(op.resolve(value) for value in (*body.inputs, *body.outputs))

    def axes(operand: Operand | None, slot: int | None) -> Iterator[tuple[Place, Axis]]:
        if operand is None:
            return
        use = None if slot is None else (op.node, slot)
        use = use if use is not None and coupling.separate(operand.value, use) else None
        for d, dim in enumerate(operand.dims):
            yield Place(operand.value, d, use), dim

    ends = [pair for operand in inner for pair in axes(operand, None)]
    inputs = [pair for slot, operand in enumerate(op.inputs) for pair in axes(operand, slot)]
    outputs = [pair for operand in op.outputs for pair in axes(operand, None)]
    return inputs + ends, outputs + ends


def _picked(
    joined: _Joined, spaces: dict[Place, frozenset[int]], inputs: list[Place], outputs: list[Place], picks: bool
) -> Iterator[tuple[Place, Place]]:
    """Axes that a node joins position by position: an input axis whose spaces end there, and the output axis that
    begins there (an operator that picks by index also reads the output's space, from its indices).
    """
    read = frozenset[int]().union(*(spaces[place] for place in inputs))
    written = frozenset[int]().union(*(spaces[place] for place in outputs))
    for output in outputs:
        for place in inputs:
            ends = spaces[place].isdisjoint(written) and (picks or spaces[output].isdisjoint(read))
            if ends and place != output and joined.common(spaces[place], spaces[output]):
                yield place, output


class _Joined:
    """Which leaves have positions that leave together, although they are different index spaces."""

    def __init__(self, analysis: Analysis) -> None:
        self.solution = solution = analysis.coupling.solution
        sizes = np.diff(solution.base)
        leaf_of = np.repeat(np.arange(len(sizes)), sizes)
        links = nx.Graph(np.unique(np.stack([leaf_of, leaf_of[solution.label]], axis=1), axis=0).tolist())
        self.cluster: dict[int, frozenset[int]] = {}
        for component in nx.connected_components(links):
            together = frozenset(component)
            self.cluster.update(dict.fromkeys(together, together))

    def leaves(self, dim: Axis) -> frozenset[int]:
        """Leaves of an axis with more than one position; none for an axis that no node mentions."""
        if dim >= len(self.solution.terms):
            return frozenset()
        sizes = self.solution.leaf_size
        return frozenset(leaf for leaf in self.solution.leaves(dim) if sizes[leaf] not in (0, 1))

    def wide(self, leaves: Iterable[int]) -> frozenset[int]:
        """`leaves` and all that have positions that leave with one of theirs."""
        return frozenset[int]().union(*(self.cluster.get(leaf, frozenset((leaf,))) for leaf in leaves))

    def common(self, a: frozenset[int], b: frozenset[int]) -> frozenset[int]:
        """Leaves of both sides that are joined with one of the other side."""
        return (a & self.wide(b)) | (b & self.wide(a))


# -- one tensor --------------------------------------------------------------------------------------------------------


class _Explainer:
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.coupling = analysis.coupling
        self.solution = analysis.coupling.solution
        self.joined = _Joined(analysis)

    @cached_property
    def graph(self) -> nx.MultiGraph:
        return coupling_graph(self.analysis)

    @cached_property
    def root_of(self) -> dict[int, int]:
        """Atom -> the leaf that was frozen directly in it."""
        out: dict[int, int] = {}
        for leaf in self.solution.reasons:
            span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
            for label in np.unique(self.solution.label[span]).tolist():
                out.setdefault(label, leaf)
        return out

    def run(self, value: ir.Value) -> Explanation:
        shape = self.coupling.shapes.shape(value) or ()
        uses = self.coupling.shared.get(value, [])
        variants: list[Use | None] = [use for use in uses if self.coupling.separate(value, use)]
        if len(variants) < len(uses) or not uses:
            variants.insert(0, None)
        axes = [
            self._axis(Place(value, d, use), size, (self.coupling.dims(value, use) or ())[d])
            for d, size in enumerate(shape)
            for use in variants
        ]
        sizes = tuple(size if isinstance(size, int) else str(size) for size in shape)
        return Explanation(value.name or "", _role_of(self.coupling, value), sizes, tuple(axes))

    def _axis(self, place: Place, size: Any, dim: Axis) -> AxisExplanation:
        leaves = self.joined.leaves(dim)
        groups = [g for g in self.analysis.groups if not leaves.isdisjoint(g.leaves)]
        frozen = self._frozen(place, leaves)
        note = ""
        if not leaves:
            frozen = (FrozenPart(_SINGLE.text, "", "", ()),) if size == 1 else ()
        if not groups and not frozen:
            note = "no weight has this axis, or a single unit would be left: nothing to prune"
        return AxisExplanation(
            place.axis,
            size if isinstance(size, int) else str(size),
            (place.use[0].outputs[0].name or "") if place.use is not None else "",
            bool(groups),
            tuple(GroupPart(g.name, g.kind, g.units, g.exact, g.inexact) for g in groups),
            frozen,
            self._coupled(place, leaves, groups),
            note,
        )

    def _frozen(self, place: Place, leaves: frozenset[int]) -> tuple[FrozenPart, ...]:
        found: dict[Reason, tuple[Step, ...]] = {}
        for leaf in sorted(leaves):
            for root in self._roots(leaf):
                reason = self.solution.reasons[root]
                path = self._path(place, root, reason)
                if reason not in found or len(path) < len(found[reason]):
                    found[reason] = path
        return tuple(FrozenPart(r.text, r.operator, r.node, path) for r, path in found.items())

    def _roots(self, leaf: int) -> list[int]:
        """The leaves that froze positions of `leaf`: itself, or leaves that are joined with it."""
        if leaf in self.solution.reasons:
            return [leaf]
        span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
        labels = np.unique(self.solution.label[span][self.solution.frozen[span]]).tolist()
        return list(dict.fromkeys(self.root_of[label] for label in labels if label in self.root_of))

    def _path(self, start: Place, root: int, reason: Reason) -> tuple[Step, ...]:
        """Shortest way to a place where `root` was frozen; empty if `start` is such a place or none is known."""
        ends = self._ends(root, reason)
        if start in ends or start not in self.graph:
            return ()
        carried = self.joined.wide((root,))

        def carries(a: Place, b: Place, key: ir.Node) -> bool:
            return not carried.isdisjoint(self.graph.edges[a, b, key]["leaves"])

        view = nx.subgraph_view(self.graph, filter_edge=carries)
        parents = {start: start}
        for parent, child in nx.bfs_edges(view, start):
            parents[child] = parent
            if child in ends:
                return self._steps(child, parents, view)
        return ()

    def _steps(self, end: Place, parents: dict[Place, Place], view: nx.MultiGraph) -> tuple[Step, ...]:
        steps: list[Step] = []
        while (parent := parents[end]) != end:
            node: ir.Node = next(iter(view[parent][end]))
            steps.append(Step(node.op_type, node.name or "", end.tensor, end.axis))
            end = parent
        return tuple(reversed(steps))

    def _ends(self, root: int, reason: Reason) -> set[Place]:
        """Where `root` may have been frozen for `reason`."""
        coupling = self.coupling
        inputs = [value for value in coupling.model.graph.inputs if value not in coupling.weights]
        border = {"graph input": inputs, "graph output": coupling.model.graph.outputs}
        found: list[tuple[Place, Axis]] = []
        if not reason.operator:
            for value in border.get(reason.text, ()):
                found.extend((Place(value, d), dim) for d, dim in enumerate(coupling.dims(value) or ()))
        for op in coupling.ops:
            if reason.operator and (op.node.op_type, op.node.name or "") == (reason.operator, reason.node):
                for side in _places(coupling, op):
                    found += side
        return {place for place, dim in found if root in self.joined.leaves(dim)}

    # -- what it is coupled with ---------------------------------------------------------------------------------------

    @cached_property
    def roles(self) -> dict[tuple[ir.Node, int, int], dict[int, str]]:
        return operand_roles(self.coupling)

    def _coupled(self, place: Place, leaves: frozenset[int], groups: list[Group]) -> tuple[Coupled, ...]:
        wide = self.joined.wide(leaves) | {leaf for g in groups for leaf in g.leaves}
        out: dict[Coupled, None] = {}
        for other, data in self.graph.nodes(data=True):
            if other != place and not wide.isdisjoint(data["leaves"]):
                out[Coupled(other.tensor, other.axis, self._role(other, data["leaves"] & wide))] = None
        return tuple(sorted(out, key=lambda c: (c.role == "activation", c.role in ("input", "output"))))

    def _role(self, place: Place, leaves: Set[int]) -> str:
        if place.value not in self.coupling.weights:
            return _role_of(self.coupling, place.value)
        uses = [place.use] if place.use is not None else self.coupling.shared.get(place.value, [])
        first = next((u for u in uses if u == place.use or not self.coupling.separate(place.value, u)), None)
        known = self.roles.get((*first, place.axis), {}) if first is not None else {}
        return strongest(known.get(leaf, "index") for leaf in leaves)


def _role_of(coupling: Coupling, value: ir.Value) -> str:
    if value in coupling.weights:
        return "weight"
    if value in coupling.model.graph.inputs:
        return "input"
    return "output" if value in coupling.model.graph.outputs else "activation"


def _find(model: ir.Model, name: str) -> ir.Value:
    values: dict[str, ir.Value] = {}
    nodes: dict[str, ir.Node] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            values.setdefault(value.name or "", value)
        nodes.update({node.name: node for node in graph if node.name})
    if name and name in values:
        return values[name]
    if name and name in nodes:
        tensors = [v.name for v in (*nodes[name].inputs, *nodes[name].outputs) if v is not None and v.name]
        raise UsageError(f"{name!r} is a node, not a tensor; its tensors are {', '.join(map(repr, tensors))}")
    close = difflib.get_close_matches(name, [v for v in values if v], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`spa inspect` lists the weights"
    raise UsageError(f"the model has no tensor {name!r}; {hint}")
