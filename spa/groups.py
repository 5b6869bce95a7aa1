"""Atoms to groups: what a person calls "the channels of this layer", with a name, a kind and its members.

Atoms that touch the same leaves equally often form a group; its units are interchangeable in shape and cost, so a
criterion ranks them against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import PROD, Axis, Reason
from spa.cost import CostModel, counts_as_parameter
from spa.coupling import Coupling, Use, couple
from spa.exactness import inexact_leaves, poisonous

KINDS = ("expert", "kv-head", "head", "qk-dim", "v-dim", "hidden", "channel", "neuron", "other")
"""Kinds of units, in the order of precedence when several uses disagree."""


@dataclass(frozen=True)
class Member:
    """One axis of one weight that loses slices when units of a group leave."""

    tensor: str
    axis: int
    role: str
    """in: consumed (contracted) there; out: produced there; scale: applied per unit; index: anything else."""
    value: ir.Value
    use: Use | None
    """The use meant, where uses of the tensor have axes of their own."""
    dim: Axis
    rank: int
    """Axes of the tensor."""


@dataclass(frozen=True)
class Group:
    """Units that are pruned against each other."""

    name: str
    kind: str
    positions: NDArray[np.int64]
    """[units, k]: the solver positions that leave with each unit."""
    leaves: dict[int, int]
    """Leaf -> positions of it per unit."""
    inexact: str
    """Why its atoms are not exact; empty if they are."""
    members: tuple[Member, ...]
    parameters: int
    """Weights that touch the group."""
    macs: float
    """Multiply-accumulates that touch it."""
    unit_parameters: float
    """Parameters saved by the first unit that leaves."""
    unit_macs: float
    """MACs saved by the first unit that leaves."""
    least: int = 1
    """Units that must be kept: as many as a router chooses."""

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.positions)

    @property
    def exact(self) -> bool:
        """Whether the pruned model equals the original with the removed slices zeroed."""
        return not self.inexact


@dataclass(frozen=True)
class Frozen:
    """An axis of a weight that cannot be pruned (or not wholly)."""

    tensor: str
    axis: int
    reason: Reason
    parameters: int


@dataclass(frozen=True)
class Analysis:
    """Everything the analysis of a model found."""

    coupling: Coupling
    cost: CostModel
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    """Ranked by parameters, largest first."""
    poison: frozenset[ir.Value]
    """Weights whose slices must not be zeroed by a checker (denominators)."""
    parameters: int
    macs: float
    prunable_parameters: int

    def group(self, name: str) -> Group | None:
        """The group called `name`."""
        return next((g for g in self.groups if g.name == name), None)


def analyze_model(
    model: ir.Model, dims: Mapping[str, int] | None = None, overhead: int = 0, *, free: Sequence[str] = ()
) -> Analysis:
    """Find the groups of `model`; `dims` binds symbolic axes for the cost, `overhead` is added to its bytes.

    Inputs and outputs of the graph keep their shapes, but for those whose names match a shell pattern of `free`.
    """
    coupling = couple(model, free=free)
    cost = CostModel(coupling, dims, overhead)
    poison = poisonous(coupling)
    inexact = inexact_leaves(coupling, poison)
    members = _members(coupling)
    kinds = _kinds(coupling)
    groups = _groups(coupling, cost, inexact, members, kinds, poison)
    frozen, prunable = _frozen(coupling)
    totals = cost.totals(cost.full)
    return Analysis(
        coupling,
        cost,
        tuple(groups),
        tuple(frozen),
        frozenset(poison),
        int(totals["parameters"]),
        totals["macs"],
        prunable,
    )


# -- members and kinds -----------------------------------------------------------------------------------------------


def _members(coupling: Coupling) -> dict[int, list[Member]]:
    """Leaf -> the weight axes that contain it."""
    roles = operand_roles(coupling)
    out: dict[int, list[Member]] = {}
    for value in coupling.weights:
        uses = coupling.shared.get(value, [])
        variants: list[Use | None] = [u for u in uses if coupling.separate(value, u)]
        if len(variants) < len(uses) or not uses:
            variants.insert(0, None)
        for use in variants:
            first = use or next((u for u in uses if not coupling.separate(value, u)), None)
            dims = coupling.dims(value, use) or ()
            for d, dim in enumerate(dims):
                known = roles.get((*first, d), {}) if first is not None else {}
                for leaf in dict.fromkeys(coupling.solution.leaves(dim)):
                    member = Member(value.name or "", d, known.get(leaf, "index"), value, use, dim, len(dims))
                    out.setdefault(leaf, []).append(member)
    return out


def operand_roles(coupling: Coupling) -> dict[tuple[ir.Node, int, int], dict[int, str]]:
    """(node, slot, dimension) -> role of each leaf there.

    One dimension can have several: the first of a transposed convolution's weight holds groups, whose outputs leave
    with them, and the inputs of each, which are summed over.
    """
    costly = {cost.node for cost in coupling.relations.costs}
    out: dict[tuple[ir.Node, int, int], dict[int, str]] = {}
    for flow in coupling.relations.flows:
        role = "in" if flow.leaving == "sum" else "out" if flow.node in costly else "scale"
        for slot, d in flow.inputs:
            known = out.setdefault((flow.node, slot, d), {})
            for leaf in coupling.solution.leaves(flow.axis):
                if known.get(leaf) != "out":
                    known[leaf] = role
    return out


ROLES = ("out", "in", "scale", "index")
"""Of a weight's axis, see `Member.role`; the first one counts where an axis has several."""


def strongest(roles: Iterable[str]) -> str:
    """The role that counts among several; `index` if there is none."""
    return min(roles, key=ROLES.index, default="index")


def _joined(members: Iterable[Member]) -> list[Member]:
    """One for each axis of a weight."""
    out: dict[tuple[ir.Value, Use | None, int], Member] = {}
    for m in members:
        key = m.value, m.use, m.axis
        if key not in out or strongest([m.role, out[key].role]) != out[key].role:
            out[key] = m
    return list(out.values())


def _kinds(coupling: Coupling) -> dict[int, str]:
    """Leaf -> kind, from the roles that operators give it."""
    found: dict[int, set[str]] = {}
    solution = coupling.solution
    for flow in coupling.relations.flows:
        if not flow.role:
            continue
        leaves = solution.leaves(flow.axis)
        nested = flow.role == "head" and solution.terms[flow.axis][0] == PROD and len(leaves) > 1
        for k, leaf in enumerate(leaves):
            found.setdefault(leaf, set()).add("kv-head" if nested and k == 0 else flow.role)
    return {leaf: min(roles, key=KINDS.index) for leaf, roles in found.items()}


# -- groups ----------------------------------------------------------------------------------------------------------


def _groups(
    coupling: Coupling,
    cost: CostModel,
    inexact: dict[int, str],
    members: dict[int, list[Member]],
    kinds: dict[int, str],
    poison: set[ir.Value],
) -> list[Group]:
    names: dict[str, int] = {}
    out = []
    chosen = _chosen(coupling)
    for leaves, positions in _buckets(coupling):
        mine = _joined(m for leaf in leaves for m in members.get(leaf, ()))
        least = max(-(-chosen.get(leaf, 1) // n) for leaf, n in leaves.items())
        if len(positions) <= least or all(m.value in poison for m in mine):
            continue  # nothing to cut, or no weight whose zero would say what was cut
        kind = min((kinds.get(leaf, "other") for leaf in leaves), key=KINDS.index)
        name = _name(mine, kind)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        counts = list(cost.full)
        every = cost.change(counts, {leaf: counts[leaf] - n * len(positions) for leaf, n in leaves.items()})
        one = cost.change(counts, {leaf: counts[leaf] - n for leaf, n in leaves.items()})
        if not (every["parameters"] or every["macs"]):
            continue  # a constant that only lends its shape
        why = next((inexact[leaf] for leaf in leaves if leaf in inexact), "")
        out.append(
            Group(
                name,
                kind,
                positions,
                leaves,
                why,
                tuple(mine),
                round(-every["parameters"]),
                -every["macs"],
                -one["parameters"],
                -one["macs"],
                least,
            )
        )
    return out


def _chosen(coupling: Coupling) -> dict[int, int]:
    """Leaf -> how many of its positions are chosen at once."""
    out: dict[int, int] = {}
    for choice in coupling.relations.choices:
        for leaf in coupling.solution.leaves(choice.flow.axis):
            out[leaf] = max(out.get(leaf, 1), int(choice.count))
    return out


def _buckets(coupling: Coupling) -> list[tuple[dict[int, int], NDArray[np.int64]]]:
    """Free atoms with equal leaf counts: [({leaf: positions per unit}, [units, k]), ...] in leaf order."""
    solution = coupling.solution
    sizes = np.diff(solution.base)
    leaf_of = np.repeat(np.arange(len(sizes)), sizes)
    free = np.flatnonzero(~solution.frozen & (sizes[leaf_of] > 1))
    labels = solution.label[free]
    order = np.argsort(labels, kind="stable")
    free, labels = free[order], labels[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]]) if len(labels) else np.zeros(0, np.int64)
    ends = np.r_[starts[1:], len(labels)]
    single = ends - starts == 1
    found: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
    alone = free[starts[single]]
    for leaf in np.unique(leaf_of[alone]):
        found[(int(leaf),)] = [alone[leaf_of[alone] == leaf][:, None]]
    for start, end in zip(starts[~single], ends[~single], strict=True):
        atom = free[start:end]
        found.setdefault(tuple(leaf_of[atom].tolist()), []).append(atom[None, :])
    out = []
    for signature, rows in sorted(found.items()):
        counts: dict[int, int] = {}
        for leaf in signature:
            counts[leaf] = counts.get(leaf, 0) + 1
        out.append((counts, np.concatenate(rows)))
    return out


def _name(members: list[Member], kind: str) -> str:
    """The producing layer, by the name of its node (or of its weight), and the kind of unit."""
    producers = [m for m in members if m.role == "out"] or members
    best = min(producers, key=lambda m: (m.rank < 2, producers.index(m)))
    use = best.use or next(iter(best.value.uses()), None)
    node = use[0] if use is not None else None
    label = node.name if node is not None and node.name and best.role == "out" else best.tensor
    return f"{label}:{kind}"


# -- frozen ----------------------------------------------------------------------------------------------------------


def _frozen(coupling: Coupling) -> tuple[list[Frozen], int]:
    """Frozen axes of weights, and how many parameters could leave through at least one axis."""
    solution = coupling.solution
    big = np.repeat(np.diff(solution.base) > 1, np.diff(solution.base))
    fixed = solution.frozen | ~big
    reason_of = _label_reasons(coupling)
    frozen: list[Frozen] = []
    prunable = 0.0
    for value, tensor in coupling.weights.items():
        uses = coupling.shared.get(value)
        dims = coupling.dims(value, uses[0] if uses else None)
        if dims is None or not counts_as_parameter(tensor):
            continue
        count = math.prod(tensor.shape.numpy())
        stuck = 1.0
        for d, dim in enumerate(dims):
            leaves = solution.leaves(dim)
            if all(isinstance(solution.leaf_size[leaf], int) for leaf in leaves):
                share = float(solution.keep(dim, fixed).mean()) if count else 1.0
            else:
                share = 1.0
            stuck *= share
            if share > 0 and tensor.shape[d] != 1:
                reason = next((r for leaf in leaves if (r := _leaf_reason(coupling, leaf, reason_of))), None)
                if reason is not None:
                    frozen.append(Frozen(value.name or "", d, reason, round(count * share)))
        prunable += count * (1 - stuck)
    frozen.sort(key=lambda f: -f.parameters)
    return frozen, round(prunable)


def _label_reasons(coupling: Coupling) -> dict[int, Reason]:
    solution = coupling.solution
    out: dict[int, Reason] = {}
    for leaf, reason in solution.reasons.items():
        for label in np.unique(solution.label[solution.base[leaf] : solution.base[leaf + 1]]).tolist():
            out.setdefault(label, reason)
    return out


def _leaf_reason(coupling: Coupling, leaf: int, by_label: dict[int, Reason]) -> Reason | None:
    solution = coupling.solution
    if leaf in solution.reasons:
        return solution.reasons[leaf]
    span = slice(solution.base[leaf], solution.base[leaf + 1])
    labels = solution.label[span][solution.frozen[span]]
    return by_label.get(int(labels[0])) if len(labels) else None
