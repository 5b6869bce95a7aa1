"""Sessions: quiet, honest about the provider, and every failure a RuntimeFailure."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa import runtime
from spa.errors import RuntimeFailure, UsageError


def model_of(nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, initializers: Any = (), opset: int = 17) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()


def info(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def double(kind: int = TensorProto.FLOAT) -> bytes:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
    return model_of([node], [info("x", ["n", 3], kind)], [info("y", None, kind)])


def test_run_returns_outputs_by_name() -> None:
    session = runtime.open_session(double(), provider="cpu", threads=1, optimize=False, arena=False)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = runtime.run(session, {"x": x})
    np.testing.assert_array_equal(outputs["y"], np.concatenate([x, x], axis=1))
    assert runtime.provider_of(session) == "cpu"
    assert runtime.run(session, {"x": x}, ["y"]).keys() == {"y"}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TensorProto.BFLOAT16, ml_dtypes.bfloat16), (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn)],
)
def test_types_that_numpy_lacks(kind: int, dtype: Any) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    data = model_of([node], [info("x", ["n", 3], kind)], [info("y", ["n", 3], kind)], opset=21)
    session = runtime.open_session(data, provider="cpu")
    x = np.array([[1, -2, 0.5], [3, 0, -1]]).astype(dtype)
    y = runtime.run(session, {"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    runtime.runner(session, {"x": x})()


def test_empty_bfloat16_output() -> None:
    kind = TensorProto.BFLOAT16
    data = model_of([helper.make_node("Identity", ["x"], ["y"])], [info("x", ["n", 3], kind)], [info("y", None, kind)])
    session = runtime.open_session(data, provider="cpu")
    assert runtime.run(session, {"x": np.zeros((0, 3), ml_dtypes.bfloat16)})["y"].shape == (0, 3)


def test_unreadable_models_fail_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.onnx"
    for model in (missing, b"no model"):
        with pytest.raises(RuntimeFailure) as caught:
            runtime.open_session(model, provider="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeFailure, match=r"missing\.onnx"):
        runtime.open_session(missing)
    assert capfd.readouterr() == ("", "")


def test_failing_run_is_quiet_and_wrapped(capfd: pytest.CaptureFixture[str]) -> None:
    session = runtime.open_session(double(), provider="cpu")
    bad = {"x": np.zeros((2, 4), np.float32)}
    with pytest.raises(RuntimeFailure, match="cannot run the model"):
        runtime.run(session, bad)
    with pytest.raises(RuntimeFailure, match="cannot run the model"):
        runtime.runner(session, bad)()
    with pytest.raises(RuntimeFailure):
        runtime.run(session, {"unknown": np.zeros((2, 3), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_external_data_is_found_by_path(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 64], np.ones(192, np.float32).tobytes(), raw=True)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.ModelProto.FromString(model_of([node], [info("x", ["n", 3])], [info("y", None)], [weight]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    session = runtime.open_session(path, provider="cpu")
    assert runtime.run(session, {"x": np.ones((1, 3), np.float32)})["y"][0, 0] == 3
    with pytest.raises(RuntimeFailure):
        runtime.open_session(path.read_bytes(), provider="cpu")


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="threads"):
        runtime.open_session(double(), threads=-1)
    with pytest.raises(UsageError, match="provider"):
        runtime.open_session(double(), provider="tpu")  # type: ignore[arg-type]  # that is the test


def test_cuda_that_is_missing_is_an_error_and_auto_falls_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "cuda_problem", lambda: "libwhatever.so: cannot open shared object file")
    with pytest.raises(RuntimeFailure, match=r"CUDA.*libwhatever\.so"):
        runtime.open_session(double(), provider="cuda")
    assert runtime.provider_of(runtime.open_session(double(), provider="auto")) == "cpu"
    assert capfd.readouterr() == ("", "")


def test_cuda_that_only_seems_to_work_is_seen_by_the_session(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The probe finds nothing, ONNX Runtime silently falls back: the session's own list decides."""
    if runtime.cuda_problem() is None:
        pytest.skip("CUDA works here, so it cannot fall back")
    monkeypatch.setattr(runtime, "cuda_problem", lambda: None)
    with pytest.raises(RuntimeFailure, match="CUDA was asked for but is not available"):
        runtime.open_session(double(), provider="cuda")
    assert runtime.provider_of(runtime.open_session(double(), provider="auto")) == "cpu"
    assert capfd.readouterr() == ("", "")


@pytest.mark.cuda
def test_cuda_runs() -> None:
    if runtime.cuda_problem() is not None:
        pytest.skip(f"no CUDA: {runtime.cuda_problem()}")
    session = runtime.open_session(double(), provider="cuda")
    assert runtime.provider_of(session) == "cuda"
    assert runtime.run(session, {"x": np.ones((2, 3), np.float32)})["y"].shape == (2, 6)


def test_both_distributions_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    warning = runtime.check_installation()
    assert warning is not None
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in warning
    del installed["onnxruntime"]
    assert runtime.check_installation() is None


def test_a_damaged_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime._ort.cache_clear()
    monkeypatch.setattr(runtime.importlib, "import_module", lambda name: object())
    try:
        with pytest.raises(RuntimeFailure, match="force-reinstall"):
            runtime.open_session(double())
    finally:
        runtime._ort.cache_clear()
