"""Runs with inputs and outputs bound to the device."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa.bench import sweep, timing
from spa.bench.tables import operator_remarks
from spa.errors import RuntimeFailure
from spa.runtime import Session, bound_runner, cuda_problem, open_session


def twice(kind: int, shape: list[Any]) -> bytes:
    """y = x + x, and z = -x."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name in "xyz"]
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def identity(kind: int) -> bytes:
    infos = [helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", infos[:1], infos[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def test_bound_runs_compute_what_others_do_again_and_again() -> None:
    session = open_session(twice(TensorProto.FLOAT, ["n", 3]), provider="cpu")
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    call = bound_runner(session, {"x": x})
    for _ in range(3):
        y, z = call().copy_outputs_to_cpu()  # type: ignore[attr-defined]  # a binding
        np.testing.assert_array_equal(y, x + x)
        np.testing.assert_array_equal(z, -x)


def test_bound_inputs_outlive_the_callers() -> None:
    """A tensor on the CPU shares the array's memory: the call must keep it."""
    session = open_session(identity(TensorProto.FLOAT), provider="cpu")
    call = bound_runner(session, {"x": np.full(1 << 20, 3, np.float32)})
    gc.collect()
    others = [np.full(1 << 20, 5, np.float32) for _ in range(8)]  # would take the freed memory
    (y,) = call().copy_outputs_to_cpu()  # type: ignore[attr-defined]  # a binding
    assert (y == 3).all()
    assert len(others) == 8


def test_types_that_numpy_lacks_are_bound_on_the_cpu() -> None:
    session = open_session(identity(TensorProto.BFLOAT16), provider="cpu")
    binding: Any = bound_runner(session, {"x": np.array([1.5, -2.0], ml_dtypes.bfloat16)})()
    (value,) = binding.get_outputs()
    assert (value.data_type(), value.shape()) == ("tensor(bfloat16)", [2])


def test_failures_are_sentences() -> None:
    session = open_session(twice(TensorProto.FLOAT, ["n", 3]), provider="cpu")
    with pytest.raises(RuntimeFailure, match="ONNX Runtime cannot run the model"):
        bound_runner(session, {"x": np.ones((2, 4), np.float32)})()
    with pytest.raises(RuntimeFailure, match="ONNX Runtime cannot run the model"):
        bound_runner(session, {"nonsense": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("copies", ["included", "excluded"])
def test_without_a_gpu_there_are_no_copies_and_the_report_says_so(copies: Any) -> None:
    (report,) = sweep(
        [twice(TensorProto.FLOAT, ["n", 3])], ["m"], provider="cpu", repeats=5, memory=False, copies=copies
    )
    assert report.copies == "none"
    assert report.measured.startswith("latency is the wall time of one run call;")


SAID = [("included", "with copies of inputs"), ("excluded", "stay on the device")]


@pytest.mark.parametrize(("copies", "said"), SAID)
def test_the_way_to_a_gpu_rehearsed_on_the_cpu(monkeypatch: pytest.MonkeyPatch, copies: Any, said: str) -> None:
    """The benchmark believes that its sessions run on CUDA; they are bound to the CPU, and really run there."""
    monkeypatch.setattr(timing, "provider_of", lambda session: "cuda")
    bound: list[Session] = []

    def noted(session: Session, feeds: Any) -> Any:
        bound.append(session)
        return bound_runner(session, feeds)

    monkeypatch.setattr(timing, "bound_runner", noted)
    (report,) = sweep(
        [twice(TensorProto.FLOAT, ["n", 3])], ["m"], provider="cpu", repeats=5, memory=False, copies=copies,
        operators=True,
    )  # fmt: skip
    assert len(bound) == (5 if copies == "excluded" else 0)  # one session for each block
    assert (report.copies, report.models[0].provider, report.models[0].profile) == (copies, "cuda", None)
    assert said in report.measured
    assert "timed on the CPU only" in operator_remarks(report)[0]


@pytest.mark.cuda
@pytest.mark.parametrize(("copies", "said"), SAID)
def test_copies_on_cuda(copies: Any, said: str) -> None:
    if cuda_problem() is not None:
        pytest.skip(f"no CUDA: {cuda_problem()}")
    (report,) = sweep(
        [twice(TensorProto.FLOAT, ["n", 1 << 20])], ["m"], provider="cuda", batches=(16,), repeats=5, memory=False,
        copies=copies, operators=True,
    )  # fmt: skip
    assert report.models[0].provider == "cuda"
    assert report.copies == copies
    assert said in report.measured
    assert report.models[0].profile is None
    assert "timed on the CPU only" in operator_remarks(report)[0]


@pytest.mark.cuda
def test_a_run_without_copies_is_faster_on_cuda() -> None:
    """64 MB each way over the bus, against one addition in the GPU's memory."""
    if cuda_problem() is not None:
        pytest.skip(f"no CUDA: {cuda_problem()}")
    took = {}
    for copies in ("included", "excluded"):
        (report,) = sweep(
            [twice(TensorProto.FLOAT, ["n", 1 << 20])], ["m"], provider="cuda", batches=(16,), repeats=8, memory=False,
            copies=copies,  # type: ignore[arg-type]  # one of both
        )  # fmt: skip
        took[copies] = report.models[0].latency.median_ms
    assert took["excluded"] < 0.5 * took["included"]
