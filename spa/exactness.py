"""Which leaves can leave exactly: zeroing their parameters in the original model gives the pruned model's outputs.

Two things make an atom inexact: a statistic (or a mean) runs over it, or it is summed by an operator where neither a
weight (which is zero then) nor an activation that is known to be zero stands in the product. Zeros are followed forward
through the graph: a zeroed producer gives zero channels as long as every operator on the way maps zero to zero.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import onnx_ir as ir

from spa.coupling import Coupling
from spa.rules import Flow, Op, Operand, Remap, Rule
from spa.rules.control import handed


def poisonous(coupling: Coupling) -> set[ir.Value]:
    """Weights that must not be zeroed: their value reaches a denominator, a logarithm, or a statistic over weights."""
    bad: set[ir.Value] = set()
    for flow in coupling.relations.flows:
        if flow.leaving in ("mean", "stat") and _computed(coupling, flow.node):
            bad.update(v for slot, _ in flow.inputs if (v := flow.node.inputs[slot]) is not None)
    for k in range(len(coupling.ops) - 1, -1, -1):
        op, rule = coupling.ops[k], coupling.rules.get(k)
        upstream = rule is not None and any(v in bad for v in op.node.outputs)
        for slot, value in enumerate(op.node.inputs):
            divides = rule is not None and slot in rule.divisors
            if value is not None and value in coupling.constants and (upstream or divides):
                bad.add(value)
    return bad


def _computed(coupling: Coupling, node: ir.Node) -> bool:
    """Whether a node computes constants from constants."""
    return all(value in coupling.constants for value in node.outputs)


def pinned(coupling: Coupling, flow: Flow, poison: Set[ir.Value]) -> bool:
    """Whether a flow contracts weights that cannot be zeroed, in a computation of weights from weights.

    Standardised and normalised weights (w = (v - mean v) / std v) keep the values they have: what is computed there
    depends on no input, so that the rewrite may write it down before the axis shrinks.
    """
    if flow.leaving == "pass" or not _computed(coupling, flow.node):
        return False
    return flow.leaving != "sum" or all(flow.node.inputs[slot] in poison for slot, _ in flow.inputs)


def inexact_leaves(coupling: Coupling, poison: set[ir.Value]) -> dict[int, str]:
    """Leaves whose removal is not exact, each with the reason."""
    solution = coupling.solution
    zero: dict[ir.Value, set[int]] = {}
    taken: dict[ir.Node, list[Remap]] = {}
    for remap in coupling.relations.remaps:
        taken.setdefault(remap.node, []).append(remap)
    for k, op in enumerate(coupling.ops):
        rule = coupling.rules.get(k)
        if rule is not None:
            zero.update((inner, _zeros(coupling, op, rule, slot, zero, poison)) for slot, inner in handed(op.node))
            _forward(coupling, op, rule, zero, poison, taken.get(op.node, ()))
    known = {op.node: (op, coupling.rules.get(k)) for k, op in enumerate(coupling.ops)}
    out: dict[int, str] = {}
    for op, rule in known.values():
        for slot in rule.divisors if rule is not None else ():
            if slot < len(op.inputs):
                why = f"zero in a divisor of {op.node.op_type} {op.node.name or ''}".strip()
                out.update(dict.fromkeys(_zeros(coupling, op, rule, slot, zero, poison), why))
    for flow in sorted(coupling.relations.flows, key=lambda flow: flow.leaving != "choice"):
        if flow.leaving == "pass" or pinned(coupling, flow, poison):
            continue
        op, rule = known[flow.node]
        where = f"{flow.node.op_type} {flow.node.name or ''}".strip()
        for leaf in solution.leaves(flow.axis):
            if leaf in out:
                continue
            if flow.leaving == "choice":
                out[leaf] = f"a router's {'shares' if flow.outputs else 'choice'} in {where}"
            elif flow.leaving != "sum":
                out[leaf] = f"{flow.leaving} over it in {where}"
            elif not any(leaf in _zeros(coupling, op, rule, slot, zero, poison) for slot, _ in flow.inputs):
                out[leaf] = f"summed without a zero factor in {where}"
    return out


def _zeros(
    coupling: Coupling, op: Op, rule: Rule | None, slot: int, zero: dict[ir.Value, set[int]], poison: set[ir.Value]
) -> set[int]:
    """Leaves on which an operand is zero once their parameters are."""
    operand = op.inputs[slot]
    point = rule.points.get(slot) if rule is not None else None
    if operand is None:
        return set()
    if point is not None and not _vanishes(coupling, op.input(point)):
        source = _quantized_by(coupling, operand.value, op.node.inputs[point])
        return zero.get(source, set()) if source is not None else set()
    if operand.value in coupling.weights:
        return set() if operand.value in poison else _leaves(coupling, operand)
    return zero.get(operand.value, set())


def _quantized_by(coupling: Coupling, value: ir.Value, point: ir.Value | None) -> ir.Value | None:
    """What a node quantised into `value` with the zero point that its reader takes off again: zeros survive that."""
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return None
    tensors = [coupling.weights.get(p) if p is not None else None for p in (node.inputs[2], point)]
    known = [t.numpy().reshape(-1) for t in tensors if t is not None and t.size == 1]
    return node.inputs[0] if len(known) == 2 and known[0] == known[1] else None


def _vanishes(coupling: Coupling, operand: Operand | None) -> bool:
    """Whether a zero point is absent or known to be zero."""
    if operand is None:
        return True
    tensor = coupling.weights.get(operand.value)
    known = tensor.numpy() if tensor is not None else operand.const
    return known is not None and not known.astype(bool).any()


def _leaves(coupling: Coupling, operand: Operand) -> set[int]:
    return {leaf for axis in operand.dims for leaf in coupling.solution.leaves(axis)}


def _follow(coupling: Coupling, zeros: set[int], remap: Remap) -> set[int]:
    """Positions taken from zeros are zeros; what is frozen never leaves, and need not be zero."""
    solution = coupling.solution
    source = solution.leaves(remap.source)
    loose = [leaf for leaf in source if not solution.frozen[solution.base[leaf] : solution.base[leaf + 1]].all()]
    return set(solution.leaves(remap.target)) if zeros.issuperset(loose) else set()


def _forward(
    coupling: Coupling,
    op: Op,
    rule: Rule,
    zero: dict[ir.Value, set[int]],
    poison: set[ir.Value],
    remaps: Sequence[Remap],
) -> None:
    when = rule.zero_of(op)
    if when.never:
        return
    present = [k for k, operand in enumerate(op.inputs) if operand is not None]
    summands = present if when.all_of == "all" else [k for k in when.all_of if k in present]
    factors = [k for k in when.any_of if k in present]
    zeros = {k: _zeros(coupling, op, rule, k, zero, poison) for k in {*summands, *factors}}
    for remap in remaps:
        if 0 in zeros:
            zeros[0] = zeros[0] | _follow(coupling, zeros[0], remap)
    for k, operand in enumerate(op.outputs):
        if operand is None or (when.outputs and k not in when.outputs):
            continue
        leaves = _leaves(coupling, operand)
        if when.any_of:
            leaves &= set().union(*(zeros[k] for k in factors)) if factors else set()
        for k in summands:
            summand = op.inputs[k]
            outside = leaves - _leaves(coupling, summand) if when.parts and summand is not None else set()
            leaves &= zeros[k] | outside
        if leaves:
            zero[operand.value] = leaves
