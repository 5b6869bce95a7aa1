"""Signed weights of integer products as unsigned ones: the same numbers, computed without overflow everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from spa.runtime import open_session, run
from spa.unsigned import has_signed, unsigned

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
MS = "com.microsoft"


def int8(*shape: int) -> Array:
    """Large ones: two products of them with a uint8 are beyond 16 bits."""
    return RNG.choice(np.array([-128, -120, 119, 127], np.int8), shape)


def uint8(*shape: int) -> Array:
    return RNG.integers(200, 256, shape, dtype=np.uint8)


def scalar(value: float) -> Array:
    return np.array(value, np.float32)


ZERO = np.array(3, np.int8)
POINT = np.array(7, np.uint8)
CASES: dict[str, tuple[str, list[Array | None], int, dict[str, Any]]] = {
    "MatMulInteger": ("", [uint8(4, 64), int8(64, 5), POINT, ZERO], onnx.TensorProto.INT32, {}),
    "MatMulInteger, no zero points": ("", [uint8(4, 64), int8(64, 5)], onnx.TensorProto.INT32, {}),
    "MatMulInteger, a zero point per column": (
        "", [uint8(4, 64), int8(64, 5), POINT, RNG.integers(-9, 9, 5).astype(np.int8)], onnx.TensorProto.INT32, {},
    ),
    "ConvInteger": ("", [uint8(1, 16, 6, 6), int8(8, 16, 3, 3), POINT, ZERO], onnx.TensorProto.INT32, {}),
    "QLinearMatMul": (
        "", [uint8(4, 64), scalar(0.1), POINT, int8(64, 5), scalar(0.1), ZERO, scalar(60.0), POINT],
        onnx.TensorProto.UINT8, {},
    ),
    "QLinearConv": (
        "", [uint8(1, 16, 6, 6), scalar(0.1), POINT, int8(8, 16, 3, 3), np.full(8, 0.1, np.float32),
             np.zeros(8, np.int8), scalar(90.0), POINT],
        onnx.TensorProto.UINT8, {},
    ),
    "MatMulIntegerToFloat": (
        MS, [uint8(4, 64), int8(64, 5), scalar(0.1), scalar(0.1), POINT, ZERO], onnx.TensorProto.FLOAT, {},
    ),
    "DynamicQuantizeMatMul": (
        MS, [RNG.normal(size=(4, 64)).astype(np.float32), int8(64, 5), scalar(0.1)], onnx.TensorProto.FLOAT, {},
    ),
    "QGemm": (
        MS, [uint8(4, 64), scalar(0.1), POINT, int8(64, 5), scalar(0.1), ZERO], onnx.TensorProto.FLOAT, {},
    ),
}  # fmt: skip


def model_of(name: str) -> tuple[onnx.ModelProto, Array]:
    """The operator with its first factor as input; everything else is constant."""
    domain, operands, kind, attributes = CASES[name]
    given = operands[0]
    assert given is not None
    names = ["x", *("" if operand is None else f"w{k}" for k, operand in enumerate(operands[1:]))]
    node = helper.make_node(name.partition(",")[0], names, ["y"], domain=domain, **attributes)
    kind_of = helper.np_dtype_to_tensor_dtype(given.dtype)
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", kind_of, list(given.shape))],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(a, n) for n, a in zip(names[1:], operands[1:], strict=True) if a is not None],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8), given


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay(name: str) -> None:
    """Compared with ONNX Runtime's own way around the overflow, which needs its optimiser."""
    proto, given = model_of(name)
    model = ir.from_proto(proto)
    assert has_signed(model)
    changed = unsigned(model)
    assert not has_signed(changed)
    assert has_signed(model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    (want,) = ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": given})
    got = run(open_session(ir.to_proto(changed).SerializeToString(), provider="cpu", optimize=False), {"x": given})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert len(np.unique(want)) > 5


def test_products_beyond_sixteen_bits() -> None:
    proto, given = model_of("MatMulInteger")
    weights = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.int64)
    session = open_session(
        ir.to_proto(unsigned(ir.from_proto(proto))).SerializeToString(), provider="cpu", optimize=False
    )
    want = (given.astype(np.int64) - 7) @ (weights - 3)
    np.testing.assert_array_equal(run(session, {"x": given})["y"], want)


def test_two_signed_factors_stay() -> None:
    proto, given = model_of("MatMulInteger, no zero points")
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT8
    assert not has_signed(ir.from_proto(proto))
    assert given.dtype == np.uint8


def test_a_weight_that_others_read_stays_for_them() -> None:
    proto, given = model_of("MatMulInteger")
    proto.graph.node.append(helper.make_node("Identity", ["w0"], ["w"]))
    proto.graph.output.append(helper.make_tensor_value_info("w", onnx.TensorProto.INT8, None))
    session = open_session(
        ir.to_proto(unsigned(ir.from_proto(proto))).SerializeToString(), provider="cpu", optimize=False
    )
    weights = numpy_helper.to_array(proto.graph.initializer[0])
    np.testing.assert_array_equal(run(session, {"x": given})["w"], weights)
