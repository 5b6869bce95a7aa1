"""Networks to serve, and folders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import small_models

KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}
"""The protocol's types and ONNX's, written down here a second time on purpose."""


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


info = helper.make_tensor_value_info


def echo(datatype: str) -> onnx.ModelProto:
    """Gives back its two inputs, the second one first."""
    kind = KINDS[datatype]
    nodes = [helper.make_node("Identity", ["a"], ["first"]), helper.make_node("Identity", ["b"], ["second"])]
    inputs = [info("a", kind, ["n", 3]), info("b", kind, ["m"])]
    return model(nodes, inputs, [info("second", kind, ["m"]), info("first", kind, ["n", 3])])


def linear(scale: float = 1.0, sizes: tuple[int, int] = (4, 3)) -> onnx.ModelProto:
    """`y = scale * x @ w` for a fixed w."""
    w = (scale * np.random.default_rng(0).normal(size=sizes)).astype(np.float32)
    inputs, outputs = [info("x", TensorProto.FLOAT, ["n", sizes[0]])], [info("y", TensorProto.FLOAT, ["n", sizes[1]])]
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], inputs, outputs, {"w": w})


def lookup() -> onnx.ModelProto:
    """Rows of a table of 5: an index beyond it makes the whole run fail."""
    table = np.arange(10, dtype=np.float32).reshape(5, 2)
    inputs, outputs = [info("index", TensorProto.INT64, ["n"])], [info("row", TensorProto.FLOAT, ["n", 2])]
    return model([helper.make_node("Gather", ["table", "index"], ["row"])], inputs, outputs, {"table": table})


def batch_normed() -> onnx.ModelProto:
    """Subtracts the mean over the batch: a row's answer depends on the others."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    inputs, outputs = [info("x", TensorProto.FLOAT, ["n", 4])], [info("y", TensorProto.FLOAT, ["n", 4])]
    return model(nodes, inputs, outputs, {"axes": np.array([0])})


def quantized_together() -> onnx.ModelProto:
    """Rounds to 255 steps between the smallest and the largest number of the whole batch."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    shape = ["n", 64]
    return model(nodes, [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, shape)])


def scaled_together() -> onnx.ModelProto:
    """Divides by the batch's largest number if that is above 4: seldom seen among standard normal numbers."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Max", ["largest", "four"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["y"]),
    ]
    inputs, outputs = [info("x", TensorProto.FLOAT, ["n", 64])], [info("y", TensorProto.FLOAT, ["n", 64])]
    return model(nodes, inputs, outputs, {"four": np.array(4, np.float32)})


def patient(rows: str | int = 1) -> onnx.ModelProto:
    """Adds 1 to `x` as many times as `turns` says: takes as long as a test wants (some microseconds a turn)."""
    float_scalar, none = TensorProto.FLOAT, list[int]()
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["value", "one"], ["more"])],
        "body",
        [info("turn", TensorProto.INT64, none), info("on", TensorProto.BOOL, none), info("value", float_scalar, None)],
        [info("still", TensorProto.BOOL, none), info("more", float_scalar, None)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["turns"], ["count"], keepdims=0),
        helper.make_node("Loop", ["count", "", "x"], ["y"], body=body),
    ]
    inputs = [info("x", TensorProto.FLOAT, ["n"]), info("turns", TensorProto.INT64, [rows])]
    return model(nodes, inputs, [info("y", TensorProto.FLOAT, ["n"])], {"one": np.array(1, np.float32)})


def patient_rows() -> onnx.ModelProto:
    """The same for a batch, as many times as its largest entry of `turns` says."""
    return patient("n")


def add(folder: Path, name: str, version: str, network: onnx.ModelProto, config: str = "") -> Path:
    """Put a version into a folder of models; returns its file."""
    home = folder / name / version
    home.mkdir(parents=True, exist_ok=True)
    onnx.save(network, home / "model.onnx")
    if config:
        (folder / name / "config.yaml").write_text(config, encoding="utf-8")
    return home / "model.onnx"


def cnn() -> onnx.ModelProto:
    """A real little network, to be pruned."""
    return small_models.cnn()
