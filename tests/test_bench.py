"""Timing: the same inputs for all, honest verdicts, complete reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa.bench import BenchReport, Comparison, bench, report_table
from spa.errors import ModelError, RuntimeFailure, UsageError
from spa.footprint import memory_of

bench_module = sys.modules["spa.bench"]  # `spa.bench` itself is the function


def mlp(layers: int, width: int, batch: Any = "n", name: str = "x") -> bytes:
    rng = np.random.default_rng(0)  # distinct weights: ONNX Runtime shares equal ones
    weights = [
        onnx.numpy_helper.from_array((rng.standard_normal((width, width)) / width).astype(np.float32), f"w{i}")
        for i in range(layers)
    ]
    tensors = [name, *[f"h{i}" for i in range(layers)]]
    nodes = [helper.make_node("MatMul", [tensors[i], f"w{i}"], [tensors[i + 1]]) for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info(tensors[-1], TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def broken() -> bytes:
    """Loads, but cannot run on the input that `mlp(_, 64)` takes."""
    shape = helper.make_tensor("s", TensorProto.INT64, [1], [7])
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    path = tmp_path_factory.mktemp("bench") / "big.onnx"
    model = onnx.ModelProto.FromString(mlp(8, 512))
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    seen: list[tuple[int, int]] = []
    small = onnx.ModelProto.FromString(mlp(1, 512)).SerializeToString()
    result = bench(
        [path, small],
        ["big", "small"],
        provider="cpu",
        threads=1,
        batch=16,
        repeats=8,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 8) for done in range(1, 9)]
    return result


def test_an_eighth_of_the_work_is_faster(report: BenchReport) -> None:
    big, small = report.models
    assert big.versus_first is None
    assert small.versus_first is not None
    assert small.versus_first.verdict == "faster"
    assert 1 < small.versus_first.low <= small.versus_first.speedup <= small.versus_first.high
    assert small.throughput == pytest.approx(16 / (small.latency.median_ms * 1e-3))
    assert (report.batch, report.inputs, report.rounds, report.blocks) == (16, {"x": (16, 512)}, 8, 8)
    for model in report.models:
        latency = model.latency
        assert latency.min_ms <= latency.p10_ms <= latency.median_ms <= latency.p90_ms
        assert len(latency.rounds_ms) == 8
        assert model.provider == "cpu"


def test_file_size_counts_external_data(report: BenchReport) -> None:
    assert report.models[0].file_bytes > 8 * 512 * 512 * 4 > report.models[1].file_bytes > 512 * 512 * 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_grows_with_the_weights(report: BenchReport) -> None:
    big, small = (model.memory for model in report.models)
    assert big is not None
    assert small is not None
    added = 7 * 512 * 512 * 4
    assert big.peak - small.peak > 0.5 * added
    assert big.open_seconds > 0


def test_json_is_plain_and_complete(report: BenchReport) -> None:
    plain = json.loads(json.dumps(report.to_json()))
    assert [model["name"] for model in plain["models"]] == ["big", "small"]
    assert plain["models"][1]["versus_first"]["verdict"] == "faster"
    assert plain["runtime"]
    assert plain["cpu"]
    assert plain["cores"] >= 1
    assert "wall time" in plain["measured"]


def test_table_says_the_verdict(report: BenchReport) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=sys.stderr)
    console.print(report_table(report))
    text = console.export_text()
    assert "faster" in text
    assert "big (cpu)" in text


def test_bench_does_not_import_rich() -> None:
    assert not hasattr(bench_module, "Table")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.5, 1.6, "faster"),
        (0.5, 0.6, "slower"),
        (0.99, 1.01, "no measurable difference"),
        (1.004, 1.006, "no measurable difference"),
    ],
)
def test_verdict_follows_from_the_interval(low: float, high: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, size=64)  # hits both models of a round alike
    blocks = np.repeat(np.arange(8), 8)
    comparison = bench_module._compare(drift * rng.uniform(low, high, size=64), drift, blocks, rng)
    assert isinstance(comparison, Comparison)
    assert low <= comparison.low <= comparison.speedup <= comparison.high <= high
    assert comparison.verdict == verdict


def test_luck_of_a_session_widens_the_interval() -> None:
    """Rounds agree within a block but not between blocks: 64 rounds are then only 8 observations."""
    rng = np.random.default_rng(0)
    luck = np.array([0.7, 1.4, 0.7, 1.4, 0.7, 1.4, 1.4, 1.4])
    comparison = bench_module._compare(np.repeat(luck, 8), np.ones(64), np.repeat(np.arange(8), 8), rng)
    assert comparison.verdict == "no measurable difference"
    as_if_independent = bench_module._compare(np.repeat(luck, 8), np.ones(64), np.arange(64), rng)
    assert as_if_independent.high - as_if_independent.low < comparison.high - comparison.low


def test_a_time_limit_ends_early_but_not_before_every_block_has_run() -> None:
    result = bench([mlp(2, 64)], ["m"], provider="cpu", threads=1, repeats=1000, seconds=0.01, memory=False)
    assert 8 <= result.rounds < 1000
    assert result.blocks == 8
    assert result.models[0].memory is None


def test_given_inputs_are_used(tmp_path: Path) -> None:
    x = np.ones((5, 64), np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    for inputs in (tmp_path / "in.npz", {"x": x}):
        result = bench([mlp(1, 64)], ["m"], provider="cpu", inputs=inputs, repeats=5, memory=False)
        assert (result.batch, result.blocks) == (5, 5)


def test_a_model_that_fails_is_named() -> None:
    with pytest.raises(RuntimeFailure, match=r"^second: "):
        bench([mlp(1, 64), broken()], ["first", "second"], provider="cpu", repeats=5, memory=False)
    with pytest.raises(ModelError, match=r"^second: .*cannot be read"):
        bench([mlp(1, 64), Path("missing.onnx")], ["first", "second"], repeats=5, memory=False)


def test_the_memory_process_reports_its_failure() -> None:
    with pytest.raises(RuntimeFailure, match="measures memory failed"):
        memory_of(broken(), {"x": np.zeros((2, 64), np.float32)}, provider="cpu")


def test_bad_arguments() -> None:
    model = mlp(1, 64)
    cases: list[tuple[str, list[bytes | Path], list[str], dict[str, Any]]] = [
        ("at least one", [], [], {}),
        ("distinct name", [model, model], ["a", "a"], {}),
        ("distinct name", [model, model], ["a"], {}),
        ("repeats", [model], ["a"], {"repeats": 2}),
        ("warmup", [model], ["a"], {"warmup": -1}),
        ("seconds", [model], ["a"], {"seconds": 0}),
        ("fixes axis 0", [mlp(1, 64, batch=2)], ["a"], {"batch": 3}),
        ("same inputs", [model, mlp(1, 64, name="z")], ["a", "b"], {}),
        ("shape", [model, mlp(1, 32)], ["a", "b"], {}),
        ("made-up", [model], ["a"], {"batch": 2, "inputs": {"x": np.ones((2, 64), np.float32)}}),
        ("cannot be read", [model], ["a"], {"inputs": Path("nowhere.npz")}),
    ]
    for message, models, names, options in cases:
        with pytest.raises(UsageError, match=message):
            bench(models, names, provider="cpu", memory=False, **options)
