"""Older opsets: every change of an operator that is undone, against onnx's reference evaluator; and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

import spa
from spa.edge import Data, convert
from spa.edge.lowering import lowered
from tests.small_models import attention, build, cnn

Case = tuple[Sequence[onnx.NodeProto], Mapping[str, Any], Sequence[int | str], Sequence[int | str | None], int, int]
N = helper.make_node
I = np.array  # noqa: E741  (integers of a shape operand)

CASES: dict[str, Case] = {
    "reduce with axes": (
        [N("ReduceMean", ["x", "axes"], ["y"], keepdims=0)], {"axes": I([1, 2])}, [2, 3, 4, 5], [2, 5], 18, 17,
    ),
    "reduce everything": ([N("ReduceMax", ["x"], ["y"], keepdims=0)], {}, [2, 3], [], 20, 12),
    "reduce with empty axes": (
        [N("ReduceMin", ["x", "axes"], ["y"], keepdims=1)], {"axes": I([], np.int64)}, [2, 3], [1, 1], 20, 13,
    ),
    "a sum": ([N("ReduceSum", ["x", "axes"], ["y"])], {"axes": I([-1])}, [2, 3], [2, 1], 18, 11),
    "split in equal parts": (
        [N("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), N("Sub", ["a", "b"], ["y"])], {}, [2, 6], [2, 3], 18, 11,
    ),
    "split by a list": (
        [N("Split", ["x", "s"], ["a", "b"], axis=1), N("Concat", ["b", "a"], ["y"], axis=1)],
        {"s": I([2, 4])}, [2, 6], [2, 6], 18, 11,
    ),
    "squeeze and unsqueeze": (
        [N("Unsqueeze", ["x", "one"], ["a"]), N("Relu", ["a"], ["b"]), N("Squeeze", ["b", "one"], ["y"])],
        {"one": I([1])}, [2, 3], [2, 3], 18, 11,
    ),
    "a part of a shape": (
        [N("Shape", ["x"], ["s"], start=1, end=-1), N("Expand", ["one", "s"], ["e"]), N("ReduceMean", ["x"], ["m"]),
         N("Mul", ["e", "m"], ["y"])],
        {"one": I([[1.0]], np.float32)}, [2, 3, 4, 5], [1, 1, 3, 4], 17, 13,
    ),
    "allowzero where there is no zero": (
        [N("Reshape", ["x", "s"], ["y"], allowzero=1)], {"s": I([6, -1])}, [2, 3, 4], [6, 4], 18, 11,
    ),
    "softmax over the last axis": ([N("Softmax", ["x"], ["y"])], {}, [2, 3, 4], [2, 3, 4], 17, 11),
    "an operator that did not exist": (
        [N("LayerNormalization", ["x", "g", "b"], ["y"], epsilon=1e-3)],
        {"g": np.linspace(1, 2, 4, dtype=np.float32), "b": np.ones(4, np.float32)}, [2, 3, 4], [2, 3, 4], 17, 13,
    ),
    "gelu": ([N("Gelu", ["x"], ["y"])], {}, [2, 3], [2, 3], 20, 13),
    "a default that is spelled out": (
        [N("DepthToSpace", ["x"], ["y"], blocksize=2, mode="DCR")], {}, [1, 8, 2, 3], [1, 2, 4, 6], 17, 9,
    ),
    "values that came with constants of numbers": (
        [N("Constant", [], ["c"], value_floats=[2.0, 3.0]), N("Mul", ["x", "c"], ["y"])], {}, [4, 2], [4, 2], 17, 11,
    ),
    "resize without a region": (
        [N("Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel")],
        {"s": I([1, 1, 2, 2], np.float32)}, [1, 1, 3, 4], [1, 1, 6, 8], 18, 11,
    ),
}  # fmt: skip


def model_of(case: Case) -> onnx.ModelProto:
    nodes, weights, inputs, outputs, opset, _ = case
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    return build(copies, dict(weights), {"x": inputs}, {"y": outputs}, opset=opset)


def answered(model: onnx.ModelProto, version: int, x: Any) -> Any:
    """What the same nodes compute in another opset; None where they mean nothing there."""
    model.opset_import[0].version = version
    try:
        checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # both have many kinds
        return None
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("name", list(CASES))
def test_an_older_opset_computes_the_same(name: str) -> None:
    model, version = model_of(CASES[name]), CASES[name][-1]
    checker.check_model(model, full_check=True)
    done = lowered(model, version, "m")
    assert next(o.version for o in done.opset_import if o.domain == "") == version
    checker.check_model(done, full_check=True)
    x = np.random.default_rng(0).standard_normal(CASES[name][2]).astype(np.float32)
    (want,) = ReferenceEvaluator(model_of(CASES[name])).run(None, {"x": x})
    session = onnxruntime.InferenceSession(done.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    assert got.shape == want.shape
    untouched = answered(model, version, x)
    assert untouched is None or not np.allclose(untouched, want) or name == "reduce everything", "nothing was to do"
    assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


def branches() -> onnx.ModelProto:
    """Reductions inside the branches of an If, whose axes are constants of the graph around it."""
    body = {
        name: helper.make_graph(
            [N(kind, ["x", "axes"], [f"{name}_y"], keepdims=0)],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2])],
        )
        for name, kind in (("then", "ReduceMean"), ("else", "ReduceMax"))
    }
    nodes = [
        N("ReduceMean", ["x"], ["m"], keepdims=0),
        N("Greater", ["m", "zero"], ["c"]),
        N("If", ["c"], ["y"], then_branch=body["then"], else_branch=body["else"]),
    ]
    w = {"axes": I([1]), "zero": np.array(0, np.float32)}
    return build(nodes, w, {"x": [2, 3]}, {"y": [2]}, opset=18)


def test_branches_are_converted_too() -> None:
    done = lowered(branches(), 13, "m")
    session = onnxruntime.InferenceSession(done.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    assert np.allclose(session.run(None, {"x": x})[0], x.mean(1))
    assert np.allclose(session.run(None, {"x": -x})[0], (-x).max(1))


@pytest.mark.parametrize(
    ("nodes", "weights", "opset", "version", "says"),
    [
        ([N("Softmax", ["x"], ["y"], name="attn", axis=1)], {}, 17, 11, "operator Softmax of node 'attn'.*last one"),
        ([N("Reshape", ["x", "s"], ["y"], name="r", allowzero=1)], {"s": I([0, 3, 4])}, 18, 13, "a 0 that is a size"),
        ([N("BitwiseNot", ["i"], ["j"], name="n")], {}, 18, 13, "BitwiseNot of node 'n'.*came with opset 18"),
        ([N("ReduceSum", ["x", "a"], ["y"], name="s")], {}, 18, 12, "is computed, and was an attribute then"),
        ([N("Trilu", ["x"], ["y"], name="t")], {}, 17, 13, "Trilu of node 't'.*came with opset 14"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(
    nodes: list[onnx.NodeProto], weights: dict[str, Any], opset: int, version: int, says: str
) -> None:
    model = build(nodes, weights, {"x": [2, 3, 4]}, {}, opset=opset)
    with pytest.raises(spa.UnsupportedModelError, match=says):
        lowered(model, version, "m.onnx")


@pytest.mark.parametrize(("make", "version"), [(cnn, 13), (cnn, 9), (attention, 13), (attention, 11), (cnn, 21)])
def test_whole_models_down_and_up(make: Any, version: int, tmp_path: Path) -> None:
    model = make()
    model.ir_version = 10
    model.metadata_props.add(key="author", value="me")
    onnx.save(model, tmp_path / "m.onnx")
    step = convert("opset", tmp_path / "m.onnx", output=tmp_path / "o.onnx", version=version, data=Data(samples=4))
    done = onnx.load(tmp_path / "o.onnx")
    checker.check_model(done, full_check=True)
    assert done.opset_import[0].version == version
    # IR versions of the releases that came with opset 9, 11, 13 and 21 (onnx's table of versions)
    assert done.ir_version == min(10, {9: 4, 11: 6, 13: 7, 21: 10}[version])
    assert step.detail["ir_version"] == [10, done.ir_version]
    assert {p.key: p.value for p in done.metadata_props} == {"author": "me"}
    assert [str(d.dim_param or d.dim_value) for d in done.graph.input[0].type.tensor_type.shape.dim] == [
        str(d.dim_param or d.dim_value) for d in model.graph.input[0].type.tensor_type.shape.dim
    ]
    shape = [d.dim_value or 3 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (want,) = ReferenceEvaluator(make()).run(None, {"x": x})
    session = onnxruntime.InferenceSession(str(tmp_path / "o.onnx"), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], want, rtol=1e-4, atol=1e-5)
