"""Small real networks for tests, built with onnx alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]


def build(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, NDArray[np.generic]],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    opset: int = 17,
    **domains: int,
) -> onnx.ModelProto:
    """A model with float inputs and outputs, and named nodes."""
    for k, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{k}"
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, v) for name, v in domains.items())]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="test")


def weight(rng: np.random.Generator, *shape: int) -> Array:
    """Random weights that keep activations at about 1."""
    fan = int(np.prod(shape[1:])) or 1
    return (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def cnn(seed: int = 0) -> onnx.ModelProto:
    """Convolution, BatchNorm, a residual block with a depthwise convolution, pooling, a classifier."""
    rng = np.random.default_rng(seed)
    w = {
        "stem.weight": weight(rng, 16, 3, 3, 3),
        "stem.bias": weight(rng, 16),
        "bn.scale": np.abs(weight(rng, 16)) + np.float32(0.5),
        "bn.shift": weight(rng, 16),
        "bn.mean": weight(rng, 16),
        "bn.var": np.abs(weight(rng, 16)) + np.float32(0.5),
        "expand.weight": weight(rng, 32, 16, 1, 1),
        "expand.bias": weight(rng, 32),
        "depth.weight": weight(rng, 32, 1, 3, 3),
        "depth.bias": weight(rng, 32),
        "project.weight": weight(rng, 16, 32, 1, 1),
        "project.bias": weight(rng, 16),
        "fc.weight": weight(rng, 10, 16),
        "fc.bias": weight(rng, 10),
    }
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["stem"], "stem", **same),
        helper.make_node("BatchNormalization", ["stem", "bn.scale", "bn.shift", "bn.mean", "bn.var"], ["bn"], "bn"),
        helper.make_node("Relu", ["bn"], ["stem_relu"], "stem_relu"),
        helper.make_node("Conv", ["stem_relu", "expand.weight", "expand.bias"], ["expand"], "expand"),
        helper.make_node("Relu", ["expand"], ["expand_relu"], "expand_relu"),
        helper.make_node("Conv", ["expand_relu", "depth.weight", "depth.bias"], ["depth"], "depth", group=32, **same),
        helper.make_node("Relu", ["depth"], ["depth_relu"], "depth_relu"),
        helper.make_node("Conv", ["depth_relu", "project.weight", "project.bias"], ["project"], "project"),
        helper.make_node("Add", ["project", "stem_relu"], ["sum"], "sum"),
        helper.make_node("Relu", ["sum"], ["sum_relu"], "sum_relu"),
        helper.make_node("GlobalAveragePool", ["sum_relu"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    return build(nodes, w, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 10]})


def attention(seed: int = 0) -> onnx.ModelProto:
    """One transformer block from MatMuls: four heads of eight, a feed-forward part, two residual additions."""
    rng = np.random.default_rng(seed)
    w: dict[str, NDArray[np.generic]] = {
        "norm.scale": np.ones(32, np.float32),
        "norm.shift": weight(rng, 32),
        "split": np.array([0, 0, 4, 8]),
        "join": np.array([0, 0, 32]),
        "root": np.array(8**-0.5, np.float32),
        "up.weight": weight(rng, 32, 64),
        "up.bias": weight(rng, 64),
        "down.weight": weight(rng, 64, 32),
        "head.weight": weight(rng, 32, 5),
    }
    nodes = [helper.make_node("LayerNormalization", ["x", "norm.scale", "norm.shift"], ["n"], "norm")]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        w[f"{name}.weight"], w[f"{name}.bias"] = weight(rng, 32, 32), weight(rng, 32)
        nodes += [
            helper.make_node("MatMul", ["n", f"{name}.weight"], [f"{name}0"], f"{name}.matmul"),
            helper.make_node("Add", [f"{name}0", f"{name}.bias"], [f"{name}1"], f"{name}.add"),
            helper.make_node("Reshape", [f"{name}1", "split"], [f"{name}2"], f"{name}.heads"),
            helper.make_node("Transpose", [f"{name}2"], [f"{name}3"], f"{name}.turn", perm=order),
        ]
    w["out.weight"] = weight(rng, 32, 32)
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["scores"], "scores"),
        helper.make_node("Mul", ["scores", "root"], ["scaled"], "scale"),
        helper.make_node("Softmax", ["scaled"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v3"], ["mixed"], "mix"),
        helper.make_node("Transpose", ["mixed"], ["turned"], "turn", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "join"], ["joined"], "join_heads"),
        helper.make_node("MatMul", ["joined", "out.weight"], ["out"], "out"),
        helper.make_node("Add", ["out", "x"], ["stream"], "residual"),
        helper.make_node("MatMul", ["stream", "up.weight"], ["up0"], "up"),
        helper.make_node("Add", ["up0", "up.bias"], ["up1"], "up_bias"),
        helper.make_node("Relu", ["up1"], ["up2"], "up_relu"),
        helper.make_node("MatMul", ["up2", "down.weight"], ["down"], "down"),
        helper.make_node("Add", ["down", "stream"], ["stream2"], "residual2"),
        helper.make_node("MatMul", ["stream2", "head.weight"], ["y"], "head"),
    ]
    return build(nodes, w, {"x": ["batch", "time", 32]}, {"y": ["batch", "time", 5]})


def cached(seed: int = 0) -> onnx.ModelProto:
    """Attention of one head over new keys and values behind those of a cache, which it gives back."""
    rng = np.random.default_rng(seed)
    w = {f"{name}.weight": weight(rng, 16, 16) for name in ("q", "k", "v", "out")}
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name], f"{name}.matmul") for name in ("q", "k", "v")]
    nodes += [
        helper.make_node("Concat", ["past.k", "k"], ["present.k"], "keys", axis=1),
        helper.make_node("Concat", ["past.v", "v"], ["present.v"], "values", axis=1),
        helper.make_node("Transpose", ["present.k"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "present.v"], ["mixed"], "mix"),
        helper.make_node("MatMul", ["mixed", "out.weight"], ["y"], "out"),
    ]
    past, present = ["batch", "past", 16], ["batch", "all", 16]
    inputs = {"x": ["batch", "time", 16], "past.k": past, "past.v": past}
    return build(nodes, w, inputs, {"y": ["batch", "time", 16], "present.k": present, "present.v": present})


def stuck(seed: int = 0) -> onnx.ModelProto:
    """One matrix between the input and the output: nothing can be pruned."""
    w = {"w": weight(np.random.default_rng(seed), 8, 4)}
    return build([helper.make_node("MatMul", ["x", "w"], ["y"], "only")], w, {"x": ["n", 8]}, {"y": ["n", 4]})


def custom(seed: int = 0) -> onnx.ModelProto:
    """Two layers, an operator that nobody knows, two more layers."""
    rng = np.random.default_rng(seed)
    w = {"a": weight(rng, 8, 16), "b": weight(rng, 16, 8), "c": weight(rng, 8, 16), "d": weight(rng, 16, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h1"], "first"),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("MatMul", ["h2", "b"], ["h3"], "second"),
        helper.make_node("Mystery", ["h3"], ["h4"], "mystery", domain="acme"),
        helper.make_node("MatMul", ["h4", "c"], ["h5"], "third"),
        helper.make_node("MatMul", ["h5", "d"], ["y"], "fourth"),
    ]
    model = build(nodes, w, {"x": ["n", 8]}, {"y": ["n", 4]}, acme=1)
    model.graph.value_info.append(helper.make_tensor_value_info("h4", TensorProto.FLOAT, ["n", 8]))
    return model
