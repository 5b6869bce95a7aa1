"""Which layers of a pruned model and its teacher are compared: the outputs of their blocks.

A block ends where a branch with weights of its own is added to another (a residual connection), activation included;
in a network with hardly any such sums, at every layer with weights. Inner knowledge distillation: Aflalo et al.,
"Knapsack Pruning with Inner Distillation", 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from spa.errors import PlanError
from spa.graph import Graph
from spa.groups import analyze_model
from spa.plan import Plan
from spa.removal import kept_by
from spa.rewrite import rewritten
from spa.verify import same_structure

Pair = tuple[str, str]
"""Names of a value in the pruned model and in the teacher."""

MOST = 32
"""Blocks that are compared at most, evenly spaced: each one's activations are kept until the loss is computed."""
_FEW = 3
"""So few sums (where a detector joins scales) are not what a network consists of."""
_WEIGHTED = frozenset(
    [
        "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention", "MultiHeadAttention", "FusedConv",
        "FusedGemm", "FusedMatMul", "QAttention", "MatMulNBits", "LSTM", "GRU", "RNN",
    ]
)  # fmt: skip
_ACTIVATIONS = frozenset(
    [
        "Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Sigmoid",
        "Tanh", "Clip", "HardSwish", "HardSigmoid", "Mish", "Softplus", "Swish", "Cast", "Identity",
    ]
)  # fmt: skip
_SIZES = frozenset(["Shape", "Size", "NonZero"])
_PRODUCTS = frozenset(["MatMul", "Gemm", "Conv"])


def pairs(pruned: Graph, teacher: Graph, plan: Plan | None, label: str) -> list[Pair]:
    """Block outputs that exist in both models, in the teacher's order.

    Args:
        pruned: the model to be trained.
        teacher: the model it was made from.
        plan: how; without it values of equal name are taken.
        label: how messages call the plan.

    Raises:
        PlanError: the plan belongs to another teacher, or makes something else of it than the pruned model.
    """
    named = _twins(pruned, teacher, plan, label) if plan is not None else None
    known = {v.name for node in pruned.model.graph for v in node.outputs if v.name}
    found: list[Pair] = []
    for value in blocks(teacher.model):
        name = value.name or ""
        mine = name if named is None else named.get(name, "")
        if mine in known:
            found.append((mine, name))
    return _spaced(found)


def _twins(pruned: Graph, teacher: Graph, plan: Plan, label: str) -> Mapping[str, str]:
    if plan.sha256 != teacher.sha256:
        raise PlanError(
            f"{label} belongs to another model than the teacher (sha256 {plan.sha256[:12]}..., the teacher's is "
            f"{teacher.sha256[:12]}...); give the model that was pruned as --teacher, or leave out --plan."
        )
    analysis = analyze_model(teacher.model)
    twin = rewritten(analysis, kept_by(analysis, plan, label))
    if not same_structure(twin.model, pruned.model):
        raise PlanError(
            f"{label} makes something else of the teacher than the model to be trained; give the plan that made it, "
            "or leave out --plan."
        )
    return {v.name: t.name for v, t in twin.pairs() if v.name and t.name}


def blocks(model: ir.Model) -> list[ir.Value]:
    """Outputs of blocks in the main graph, in order; with hardly any sums of branches, of all layers with weights."""
    graph = model.graph
    weighted: dict[ir.Value, int] = {v: 0 for v in graph.inputs if v not in graph.initializers.values()}
    # activations -> the weighted layers they depend on, as bits: masks on none; what depends on no input is none
    sums: list[ir.Value] = []
    layers: list[ir.Value] = []
    for k, node in enumerate(graph):
        behind = [weighted[v] for v in node.inputs if v is not None and v in weighted]
        if not behind or node.op_type in _SIZES:
            continue
        bits = 0
        for part in behind:
            bits |= part
        product = node.op_type in _PRODUCTS and len(behind) > 1  # of two activations: attention
        if node.op_type in _WEIGHTED and not product:
            bits |= 1 << k
            layers.append(_after(node.outputs[0]))
        elif node.op_type == "Gather" and node.inputs[0] not in weighted:
            bits |= 1 << k  # an embedding
        weighted.update((v, bits) for v in node.outputs)
        if node.op_type in ("Add", "Sum") and len(set(behind)) > 1 and all(behind) and _alike(node.inputs):
            sums.append(_after(node.outputs[0]))
        elif node.op_type in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
            sums.append(node.outputs[0])
    outputs = set(graph.outputs)
    found = [[v for v in dict.fromkeys(values) if v not in outputs] for values in (sums, layers)]
    return found[0] if len(found[0]) >= _FEW else found[1]


def _after(value: ir.Value) -> ir.Value:
    """Behind the norm, bias and activation that alone read a value."""
    while len(uses := list(value.uses())) == 1:
        node = uses[0][0]
        others = [v for v in node.inputs if v is not None and v is not value]
        plain = node.op_type == "BatchNormalization" or node.op_type in _ACTIVATIONS
        biased = node.op_type == "Add" and all(v.is_initializer() for v in others)
        if value.is_graph_output() or not (plain or biased):
            break
        value = node.outputs[0]
    return value


def _alike(operands: Sequence[ir.Value | None]) -> bool:
    """Whether no operand is broadcast, as far as sizes are known."""
    shapes = [v.shape for v in operands if v is not None]
    first = shapes[0]
    for other in shapes[1:]:
        if first is None or other is None:
            continue
        if len(first) != len(other):
            return False
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(first, other, strict=True)):
            return False
    return True


def _spaced(found: Sequence[Pair]) -> list[Pair]:
    if len(found) <= MOST:
        return list(found)
    return [found[(2 * k + 1) * len(found) // (2 * MOST)] for k in range(MOST)]
