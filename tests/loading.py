"""A small model and how to run it, for tests of loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((64, 32)).astype(np.float32)  # 8 KiB: above the limit of what stays in the proto
BIAS = RNG.standard_normal(32).astype(np.float32)


def info(name: str, *dims: int | str | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    opset: int | None = 17,
    **fields: Any,
) -> onnx.ModelProto:
    """A two-layer network, unless told otherwise."""
    if nodes is None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "mm"), helper.make_node("Add", ["h", "b"], ["y"], "add")]
    weights = {"w": KERNEL, "b": BIAS} if weights is None else weights
    proto = helper.make_graph(
        nodes,
        "net",
        inputs or [info("x", "n", 64)],
        outputs or [info("y", "n", 32)],
        [constant(name, array) for name, array in weights.items()],
    )
    imports = [] if opset is None else [helper.make_opsetid("", opset)]
    return helper.make_model(proto, **({"opset_imports": imports, "ir_version": 8} | fields))


def run(source: Path | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def same(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return len(got) == len(want) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") if isinstance(a, np.ndarray) else str(a) == str(b)
        for a, b in zip(got, want, strict=True)
    )


def with_external(folder: Path, proto: onnx.ModelProto | None = None, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(proto or model(), path, save_as_external_data=True, location=f"{name}.data", size_threshold=16)
    return path


X = RNG.standard_normal((3, 64)).astype(np.float32)


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, f"the_{op}", **attributes)
