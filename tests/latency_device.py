"""A device that is a formula: what measuring a kit would give if operators took exactly so long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spa.graph import Graph
from spa.groups import Analysis
from spa.latency.design import Configuration
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.store import to_proto

Operator = tuple[str, str, list[list[int]], list[list[int]]]
"""node, operator, shapes of inputs, shapes of outputs"""
Law = Callable[[Operator], list[tuple[str, str, list[list[int]], list[list[int]], float]]]
"""What runs at a node: [node, operator, shapes of inputs, shapes of outputs, microseconds]"""


def operators(graph: Graph, analysis: Analysis, widths: dict[str, int]) -> list[Operator]:
    """Nodes with weights or activations of a model after a cut; open axes are 1."""
    removed = [(g, range(widths[g.name], g.units)) for g in analysis.groups if g.name in widths]
    proto = to_proto(rewritten(analysis, kept_without(analysis, removed)).model)
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        shapes[info.name] = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
    return [
        (n.name or n.output[0], n.op_type, [shapes.get(i, []) for i in n.input], [shapes.get(o, []) for o in n.output])
        for n in proto.graph.node
    ]


def work(operator: Operator) -> float:
    """Multiply-accumulates of a convolution or matrix product, else elements."""
    _, op, ins, outs = operator
    if op == "Conv":
        return float(np.prod(outs[0]) * np.prod(ins[1][1:]))
    if op in ("Gemm", "MatMul"):
        return float(np.prod(ins[0]) * outs[0][-1])
    return float(np.prod(outs[0], dtype=np.float64))


def smooth(operator: Operator) -> list[Any]:
    """Time is proportional to work, with something for the start."""
    return [(*operator, 1.0 + work(operator) / 2000)]


def blocked(operator: Operator) -> list[Any]:
    """Output channels are padded to 16, and an operator that repairs the layout runs where that was needed."""
    name, op, ins, outs = operator
    if op != "Conv" or len(outs[0]) != 4:
        return smooth(operator)
    channels = outs[0][1]
    padded = -(-channels // 16) * 16
    wide = [outs[0][0], padded, *outs[0][2:]]
    ran = [(f"{name}_nchwc", op, [ins[0], [padded, *ins[1][1:]]], [wide], 1 + work((name, op, ins, [wide])) / 2000)]
    if channels % 16:
        ran.append((f"ReorderOutput_token_{channels}", "ReorderOutput", [wide], [outs[0]], 2 + np.prod(wide) / 500))
    return ran


def milliseconds(graph: Graph, analysis: Analysis, widths: dict[str, int], law: Law, rest: float = 0.02) -> float:
    """Of the whole model."""
    return rest + 1e-3 * sum(o[4] for op in operators(graph, analysis, widths) for o in law(op))


def measured(
    graph: Graph,
    analysis: Analysis,
    configurations: Sequence[Configuration],
    law: Law,
    *,
    rest: float = 0.02,
    clock: float = 0.0,
    noise: float = 0.0,
    speed: float = 1.0,
) -> dict[str, Any]:
    """As `spa.latency.device.measure` returns it.

    Args:
        graph: the model.
        analysis: of it.
        configurations: widths.
        law: times.
        rest: milliseconds besides the operators.
        clock: microseconds that the profiler adds to each operator.
        noise: relative, of single operators.
        speed: of the machine in the second pass, relative to the first.
    """
    rng = np.random.default_rng(0)
    dense = milliseconds(graph, analysis, {}, law, rest)
    records = []
    for number, factor in enumerate((1.0, 1 / speed)):
        for c in configurations:
            ran = [o for op in operators(graph, analysis, c.widths) for o in law(op)]
            rows = [
                [n, op, [_text(s) for s in i], [_text(s) for s in o], factor * us * (1 + noise * rng.random()) + clock]
                for n, op, i, o, us in ran
            ]
            ms = rest + 1e-3 * sum(o[4] for o in ran)
            records.append(
                {"pass": number, "id": c.name, "dense_ms": factor * dense, "ms": factor * ms, "operators": rows}
            )
    about = {
        "sha256": graph.sha256,
        "name": "m.onnx",
        "configurations": [{"name": c.name, "widths": c.widths} for c in configurations],
    }
    key = {"device": "a formula", "runtime": "none", "provider": "cpu", "threads": 1, "cores": 1}
    return {"format": 1, "about": about, "key": {**key, "batch": 1, "dtype": "float32"}, "records": records}


def _text(shape: Sequence[int]) -> str:
    return f"float[{','.join(map(str, shape))}]"
