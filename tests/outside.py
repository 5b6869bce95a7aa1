"""Checks that share no code with `spa`: onnx, numpy and ONNX Runtime only.

A plan is read as the JSON that it is. Zeroing its slices in the original model must give the pruned model's outputs;
costs are counted on the shapes that really occur when a model runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
COSTLY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "MatMulNBits"}
"""What `macs` can count."""
UNCOUNTED = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "RNN", "Einsum", "QLinearConv", "QLinearMatMul",
             "MatMulInteger", "ConvInteger", "If", "Loop", "Scan", "FusedConv", "FusedMatMul"}  # fmt: skip
"""Costly as well, but not counted here."""


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    return out


def runnable(model: onnx.ModelProto, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
    """With bodies for the operators that the file leaves out."""
    out = copy(model)
    out.functions.extend(functions)
    return out


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs, by name, on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # without VNNI, products of uint8 by int8 are cut off at 16 bits: none is fused, and those there are become exact
    integer = any(node.op_type in ("MatMulInteger", "ConvInteger", "QLinearMatMul") for node in model.graph.node)
    options.add_session_config_entry("session.x64quantprecision", "1" if integer else "0")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if integer else level.ORT_ENABLE_BASIC
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def difference(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Largest difference of any output, relative to the largest magnitude in it."""
    assert list(a) == list(b)
    worst = 0.0
    for name, x in a.items():
        y = b[name]
        assert x.shape == y.shape, name
        assert x.dtype == y.dtype, name
        wide, slim = x.astype(np.float64), y.astype(np.float64)
        scale = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0)) or 1.0
        error = np.where((wide == slim) | (np.isnan(wide) & np.isnan(slim)), 0.0, np.abs(wide - slim))
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max(initial=0.0)) / scale)
    return worst


# -- the plan, by hand -------------------------------------------------------------------------------------------------


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from graphs(inner)


def zeroed(model: onnx.ModelProto, plan: Mapping[str, Any]) -> onnx.ModelProto:
    """The original with exactly the slices of a plan set to zero."""
    out = onnx.inliner.inline_local_functions(model) if model.functions else copy(model)
    tensors: dict[str, onnx.TensorProto] = {}
    for graph in graphs(out.graph):
        tensors.update({tensor.name: tensor for tensor in graph.initializer})
        for node in graph.node:
            if node.op_type == "Constant":
                tensors.update((node.output[0], _as_tensor(node, a)) for a in node.attribute)
    original = {
        name: numpy_helper.to_array(tensors[name]).copy() for name in {r["initializer"] for r in plan["removed"]}
    }
    everywhere = {name: array.copy() for name, array in original.items()}
    single: dict[tuple[str, str, int], list[tuple[int, list[int]]]] = {}
    for removal in plan["removed"]:
        name, cut = removal["initializer"], (removal["axis"], removal["indices"])
        if removal["consumers"] is None:
            _blank(everywhere[name], *cut)
        else:
            for use in removal["consumers"]:
                single.setdefault((name, use["output"], use["input"]), []).append(cut)
    for name, array in everywhere.items():
        tensors[name].CopyFrom(numpy_helper.from_array(array, tensors[name].name))
    for (name, output, slot), cuts in single.items():
        array = everywhere[name].copy()
        for axis, indices in cuts:
            _blank(array, axis, indices)
        (node,) = [n for g in graphs(out.graph) for n in g.node if n.output and n.output[0] == output]
        assert node.input[slot] == name
        node.input[slot] = f"{name}@{output}@{slot}"
        constant = onnx.helper.make_node("Constant", [], [node.input[slot]], value=numpy_helper.from_array(array))
        out.graph.node.insert(0, constant)
    return out


def _as_tensor(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> onnx.TensorProto:
    """The value of a Constant node, which becomes a tensor where it is a list of numbers."""
    if attribute.name == "value_floats":
        tensor = numpy_helper.from_array(np.array(attribute.floats, np.float32))
        attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    return attribute.t


def _blank(array: Array, axis: int, indices: list[int]) -> None:
    assert indices == sorted(set(indices))
    assert 0 < len(indices) < array.shape[axis]
    array[(slice(None),) * axis + (indices,)] = 0


# -- costs -------------------------------------------------------------------------------------------------------------


def parameters(model: onnx.ModelProto) -> int:
    """Entries of all weights that are numbers to compute with (not indices, shapes or flags)."""
    structure = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
    structure |= {onnx.TensorProto.INT16, onnx.TensorProto.UINT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64}
    return sum(math.prod(tensor.dims) for tensor in _weights(copy(model)) if tensor.data_type not in structure)


def _weights(model: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    for graph in graphs(model.graph):
        yield from graph.initializer
        yield from (_as_tensor(n, a) for n in graph.node if n.op_type == "Constant" for a in n.attribute)


def macs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> int | None:
    """Multiply-accumulates of one run; None if an operator occurs that is not counted here."""
    flat = onnx.inliner.inline_local_functions(model) if model.functions else copy(model)
    if any(node.op_type in UNCOUNTED for node in flat.graph.node):
        return None
    nodes = [node for node in flat.graph.node if node.op_type in COSTLY]
    weights = {tensor.name: tuple(tensor.dims) for tensor in flat.graph.initializer}
    wanted = dict.fromkeys(v for n in nodes for v in (n.input[0], n.input[1], n.output[0]) if v and v not in weights)
    for info in list(flat.graph.input):
        wanted.pop(info.name, None)
    known = {info.name for info in flat.graph.output}
    flat.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    shapes = weights | {name: array.shape for name, array in {**feeds, **run(flat, feeds)}.items()}
    return sum(_cost(node, shapes) for node in nodes)


def _cost(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes.get(node.output[0], ())
    if node.op_type == "Conv":
        return math.prod(y) * math.prod(w[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if node.op_type == "Gemm":
        return math.prod(y) * x[0 if attributes.get("transA", 0) else 1]
    if node.op_type == "MatMul":
        return math.prod(y) * x[-1]
    if node.op_type == "MatMulNBits":
        return math.prod(x) * int(attributes["N"])
    steps = x[0] * x[1]  # recurrent: every gate reads the input and the state
    return steps * math.prod(w) + steps * w[0] * w[1] * int(attributes["hidden_size"])
