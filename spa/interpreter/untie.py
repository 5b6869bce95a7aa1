"""Vectors that an exporter wrote once because they happened to be equal, as tensors of their own.

An untrained network has many equal biases, scales and statistics, and exporters merge equal initializers. Trained
together they would stay equal. Matrices that several layers read are another matter: those are tied on purpose.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spa.interpreter.leaves import reached
from spa.interpreter.types import FLOATS


def untie(model: ir.Model) -> int:
    """Give every use of a shared float vector its own initializer, in place; returns how many were added.

    Only vectors (one axis, more than one number) of the main graph are untied; what the model computes stays the same.
    """
    graph = model.graph
    names = {v.name for v in graph.initializers.values()} | {v.name for n in graph for v in n.outputs}
    added = 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 1 or tensor.size < 2:
            continue
        uses = [(node, slot) for node, slot in reached(value) if node.graph is graph]
        if value.is_graph_output() or len(uses) < 2 or len(uses) < len(list(reached(value))):
            continue
        for node, slot in uses[1:]:
            name = _fresh(f"{node.name or value.name}.{slot}", names)
            copy = ir.Value(name=name, shape=ir.Shape([tensor.size]), type=ir.TensorType(tensor.dtype))
            copy.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
            graph.register_initializer(copy)
            node.replace_input_with(slot, copy)
            added += 1
    return added


def _fresh(name: str, names: set[str | None]) -> str:
    """A name that is not taken."""
    number, free = 0, name
    while free in names:
        number += 1
        free = f"{name}.{number}"
    names.add(free)
    return free


def untie_if_merged(model: ir.Model) -> None:
    """Take vectors apart that an exporter merged because they happened to be equal, as in an untrained network.

    That is so if nodes share a vector of all the same numbers, or the statistics of a BatchNormalization.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 1 or tensor.size < 2 or not tensor.dtype.is_floating_point():
            continue
        uses = list(reached(value))
        if len(uses) < 2:
            continue
        numbers = tensor.numpy()
        if bool((numbers == numbers[0]).all()) or any(n.op_type == "BatchNormalization" and k > 2 for n, k in uses):
            untie(model)
            return
