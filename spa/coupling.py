"""Join the rules over a graph: from a model to solved index spaces.

Constants that several nodes share get axes of their own per use where sharing is an accident of export (equal biases,
norm weights, tables in elementwise operators are merged by exporters); matrices that several products share (tied
embeddings, siamese branches) stay one tensor. Nothing is copied here: the rewrite writes separate tensors only where
the uses end up with different shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from spa import rules
from spa.axes import Axes, Axis, Reason, Solution
from spa.rules import REASONS, Choice, Op, Operand, Relations, Rule
from spa.rules.control import handed
from spa.shapes import Shapes, infer

Use = tuple[ir.Node, int]
"""A node and one of its input slots."""


@dataclass
class Coupling:
    """A model with solved index spaces."""

    model: ir.Model
    shapes: Shapes
    axes: Axes
    relations: Relations
    ops: list[Op]
    """Every node of the graph and its subgraphs, in execution order."""
    rules: dict[int, Rule]
    """Rule per index in `ops`, for the nodes that have one."""
    constants: set[ir.Value]
    """Values computed from constants only."""
    weights: dict[ir.Value, ir.TensorProtocol]
    """Initializers and tensor-valued `Constant` outputs."""
    shared: dict[ir.Value, list[Use]]
    """Per weight: its uses."""
    free: tuple[str, ...] = ()
    """Shell patterns of inputs and outputs that may change their shapes."""
    solution: Solution = field(init=False)
    _dims: dict[Any, tuple[Axis, ...]] = field(default_factory=dict)

    def dims(self, value: ir.Value, use: Use | None = None) -> tuple[Axis, ...] | None:
        """Axes of `value`; for an un-shared weight those of one `use`. None if the rank is unknown."""
        key = (value, *use) if use is not None and self.separate(value, use) else value
        found = self._dims.get(key)
        if found is None:
            shape = self.shapes.shape(value)
            if shape is None:
                return None
            found = tuple(self.axes.leaf(size) for size in shape)
            self._dims[key] = found
        return found

    def separate(self, value: ir.Value, use: Use) -> bool:
        """Whether this use of a weight has axes of its own."""
        uses = self.shared.get(value, ())
        if len(uses) < 2:
            return False
        shape = self.shapes.shape(value)
        rule = self._rule_of.get(use[0])
        if shape is None or (rule is not None and rule.selects):
            return False
        return len(shape) <= 1 or self._combines(use[0])

    def _combines(self, node: ir.Node) -> bool:
        """Whether a node combines operands; exporters put an Identity between a merged constant and a use of it."""
        if node.op_type != "Identity":
            rule = self._rule_of.get(node)
            return rule is not None and rule.combines
        output = node.outputs[0]
        uses = output.uses()
        return bool(uses) and not output.is_graph_output() and all(self._combines(n) for n, _ in uses)

    _rule_of: dict[ir.Node, Rule] = field(default_factory=dict)


def couple(model: ir.Model, *, free: Sequence[str] = ()) -> Coupling:
    """Apply the rules to every node and solve.

    Every operator without a rule, and every tensor of unknown rank, freezes what it touches; so do inputs and outputs
    of the graph, but for those whose name matches a shell pattern of `free`.
    """
    shapes = infer(model)
    weights = dict(weights_of(model.graph))
    coupling = Coupling(model, shapes, Axes(), Relations(), [], {}, set(weights), weights, {}, tuple(free))
    nodes = list(_nodes(model.graph))
    for node in nodes:
        rule = rules.lookup(node.domain, node.op_type, _version(model, node))
        if rule is not None:
            coupling._rule_of[node] = rule
        for slot, value in enumerate(node.inputs):
            if value is not None and value in weights:
                coupling.shared.setdefault(value, []).append((node, slot))
        computes = node.op_type != "Constant" and bool(node.inputs) and not _subgraphs(node)
        if computes and all(v is None or v in coupling.constants for v in node.inputs):
            coupling.constants.update(node.outputs)
        coupling.constants.update(v for slot, v in handed(node) if node.inputs[slot] in coupling.constants)
    for node in nodes:
        _apply(coupling, node)
    for value in weights:
        for use in (None, *coupling.shared.get(value, ())):
            coupling.dims(value, use)
    _settle_choices(coupling)
    _freeze_border(coupling)
    _freeze_homonyms(coupling)
    coupling.solution = coupling.axes.solve()
    return coupling


def _apply(coupling: Coupling, node: ir.Node) -> None:
    if node.outputs and node.outputs[0] in coupling.weights:
        return
    inputs = [_operand(coupling, v, (node, slot)) for slot, v in enumerate(node.inputs)]
    outputs = [_operand(coupling, v, None) for v in node.outputs]

    def resolve(value: ir.Value) -> Operand | None:
        return _operand(coupling, value, None)

    op = Op(node, inputs, outputs, coupling.axes, coupling.relations, _version(coupling.model, node), resolve)
    rule = coupling._rule_of.get(node)
    unknown = [v for v, o in zip((*node.inputs, *node.outputs), (*inputs, *outputs), strict=True) if v and o is None]
    if rule is None:
        op.freeze_all(_no_rule(node))
    elif any(v.name for v in unknown) and node.op_type not in ("If", "Loop", "Scan", "Shape", "Size"):
        op.freeze_all(f"{node.op_type} with a tensor of unknown rank")
    else:
        coupling.rules[len(coupling.ops)] = rule
        coupling.axes.mentioned.clear()
        rule.apply(op)
        _deny_rest(op)
    coupling.ops.append(op)


def _no_rule(node: ir.Node) -> str:
    domain = "" if node.domain == "ai.onnx" else node.domain
    reason = REASONS.get(node.op_type) if not domain else None
    name = f"{domain + '::' if domain else ''}{node.op_type}"
    return f"no rule for operator {name}" + (f": {reason}" if reason else "")


def _deny_rest(op: Op) -> None:
    """Freeze the dimensions a rule said nothing about."""
    mentioned = op.axes.mentioned
    for operand in (*op.inputs, *op.outputs):
        for size, axis in zip(operand.shape, operand.dims, strict=True) if operand is not None else ():
            if size != 1 and axis not in mentioned:
                op.freeze(axis, f"{op.node.op_type} says nothing about this axis")


def _operand(coupling: Coupling, value: ir.Value | None, use: Use | None) -> Operand | None:
    if value is None or (value.name == "" and use is None):
        return None
    shape = coupling.shapes.shape(value)
    dims = coupling.dims(value, use)
    if shape is None or dims is None:
        return None
    return Operand(value, shape, dims, coupling.shapes.const(value), value in coupling.constants)


def _settle_choices(coupling: Coupling) -> None:
    """What a router chooses from and shares out is free where it is an axis of stacked matrices; elsewhere it stays.

    Attention shares out, too, and classes, tokens and boxes are chosen: there a position is more than its weights.
    """
    axes, relations = coupling.axes, coupling.relations
    stacks = {axes.whole(axis) for axis in _stacked(coupling)} - {None}
    chosen = [(root, c) for c in relations.choices if (root := axes.whole(c.flow.axis)) in stacks]
    refused = {root: (c, why) for root, c in chosen if (why := _refusal(coupling, c))}
    routed = {root for root, c in chosen if c.count}
    for root, c in chosen:
        if root in routed:
            axes.free(c.flow.axis, c.reason)
    for c, why in refused.values():
        axes.freeze(c.flow.axis, replace(c.reason, text=f"{c.reason.text}: {why}"))
    relations.choices = [c for root, c in chosen if root in routed - refused.keys()]
    relations.flows += [c.flow for c in relations.choices]


def _refusal(coupling: Coupling, choice: Choice) -> str:
    """Why what is not chosen cannot leave; empty if it can."""
    if isinstance(choice.count, str):
        return choice.count
    scores = choice.flow.node.inputs[choice.flow.inputs[0][0]]
    dtype = coupling.shapes.dtype(scores) if scores is not None else None
    return "" if dtype is not None and dtype.is_floating_point() else "its scores are no floating-point numbers"


_STACKING = {"Gather": False, "GatherND": False, "MatMul": True, "FusedMatMul": True, "Einsum": True, "MoE": True}
"""Operators that read stacks of matrices; whether an axis of them counts only where activations have it, too."""


def _stacked(coupling: Coupling) -> Iterator[Axis]:
    """Along which axes matrices are stacked: of products with one for each position, or with those looked up."""
    ops = {op.node: op for op in coupling.ops}
    for flow in coupling.relations.flows:
        paired = _STACKING.get(flow.node.op_type)
        if paired is not None:
            operands = [(operand, d) for slot, d in flow.inputs if (operand := ops[flow.node].inputs[slot]) is not None]
            stacks = [x for x, d in operands if x.constant and set(x.shape[:d]) <= {1} and _wide(x) > 2]
            if stacks and not (paired and all(x.constant for x, _ in operands)):
                yield flow.axis


def _wide(operand: Operand) -> int:
    return sum(size != 1 for size in operand.shape)


def _freeze_border(coupling: Coupling) -> None:
    """Inputs and outputs of the graph keep their shapes, but for those that may change; initializers listed as inputs
    are weights."""
    graph = coupling.model.graph
    for values, why in ((graph.inputs, "graph input"), (graph.outputs, "graph output")):
        for value in values:
            if value in coupling.weights and why == "graph input":
                continue
            if any(fnmatchcase(value.name or "", pattern) for pattern in coupling.free):
                continue
            for axis in coupling.dims(value) or ():
                coupling.axes.freeze(axis, Reason(why))


def _freeze_homonyms(coupling: Coupling) -> None:
    """Weights of sibling subgraphs may have one name, and a plan could not tell them apart."""
    names = Counter(value.name for value in coupling.weights)
    for value in coupling.weights:
        if names[value.name] > 1:
            for use in (None, *coupling.shared.get(value, ())):
                for axis in coupling.dims(value, use) or ():
                    coupling.axes.freeze(axis, Reason("another subgraph has a weight of the same name"))


def weights_of(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers and constants of a graph and its subgraphs."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        tensor = tensor_of(node)
        if tensor is not None:
            yield node.outputs[0], tensor
        for sub in _subgraphs(node):
            yield from weights_of(sub)


def tensor_of(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a `Constant` node that holds one (or a list of floats); None for any other node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if "value_floats" in node.attributes:
        return ir.tensor(np.array(node.attributes["value_floats"].as_floats(), dtype=np.float32))
    attribute = node.attributes.get("value")
    return attribute.value if attribute is not None else None


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for sub in _subgraphs(node):
            yield from _nodes(sub)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _version(model: ir.Model, node: ir.Node) -> int:
    domain = "" if node.domain == "ai.onnx" else node.domain
    return model.opset_imports.get(domain, model.opset_imports.get(domain or "ai.onnx", 1)) or 1
