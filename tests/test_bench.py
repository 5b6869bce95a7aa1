"""Timing: the same inputs for all, honest verdicts, complete reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from spa.bench import BenchReport, Comparison, bench, remarks, report_table, sweep
from spa.bench.estimates import compare, enough, quantiles
from spa.bench.figures import Quantiles
from spa.bench.timing import Schedule, Subject, _round, measure
from spa.errors import ModelError, RuntimeFailure, UsageError
from spa.footprint import memory_of
from spa.runtime import cuda_problem

ROOT = Path(__file__).parents[1]


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


def reshaped(*sizes: int) -> bytes:
    """Takes the input of `mlp(_, 64)`, and runs only if it has the right number of elements."""
    shape = helper.make_tensor("s", TensorProto.INT64, [len(sizes)], sizes)
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
        assert latency.runs is not None
        assert latency.runs.count == 8 * latency.runs_per_round
        assert model.profile is None
    assert (report.warmup, report.copies) == (3, "none")


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
    console = Console(width=200, record=True, file=sys.stderr)
    console.print(report_table(report))
    text = console.export_text()
    assert "faster" in text
    assert "big (cpu)" in text


def test_bench_does_not_import_rich() -> None:
    code = "import sys, spa.bench; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


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
    comparison = compare(drift * rng.uniform(low, high, size=64), drift, blocks, rng)
    assert isinstance(comparison, Comparison)
    assert low <= comparison.low <= comparison.speedup <= comparison.high <= high
    assert comparison.verdict == verdict


def test_luck_of_a_session_widens_the_interval() -> None:
    """Rounds agree within a block but not between blocks: 64 rounds are then only 8 observations."""
    rng = np.random.default_rng(0)
    luck = np.array([0.7, 1.4, 0.7, 1.4, 0.7, 1.4, 1.4, 1.4])
    comparison = compare(np.repeat(luck, 8), np.ones(64), np.repeat(np.arange(8), 8), rng)
    assert comparison.verdict == "no measurable difference"
    as_if_independent = compare(np.repeat(luck, 8), np.ones(64), np.arange(64), rng)
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
        bench([mlp(1, 64), reshaped(7)], ["first", "second"], provider="cpu", repeats=5, memory=False)
    with pytest.raises(ModelError, match=r"^second: .*cannot be read"):
        bench([mlp(1, 64), Path("missing.onnx")], ["first", "second"], repeats=5, memory=False)


def test_the_memory_process_reports_its_failure() -> None:
    with pytest.raises(RuntimeFailure, match="measures memory failed"):
        memory_of(reshaped(7), {"x": np.zeros((2, 64), np.float32)}, provider="cpu")


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
    settings: list[tuple[str, dict[str, Any]]] = [
        ("batch must be 1 or more, not 0", {"batches": (4, 0)}),
        ("batch 4 comes twice", {"batches": (4, 2, 4)}),
        ("threads must be 0 or more, not -1", {"threads": (-1,)}),
        ("threads 2 comes twice", {"threads": (2, 2)}),
        ("at least one", {"threads": ()}),
        ("at least one", {"batches": ()}),
        ("copies must be included or excluded", {"copies": "some"}),
        ("made-up", {"batches": (1, 2), "inputs": {"x": np.ones((2, 64), np.float32)}}),
    ]
    for message, options in settings:
        with pytest.raises(UsageError, match=message):
            sweep([model], ["a"], provider="cpu", memory=False, **options)


def test_cuda_that_is_asked_for_and_missing_is_said_once() -> None:
    if cuda_problem() is None:
        pytest.skip("CUDA works here")
    with pytest.raises(RuntimeFailure, match=r"^m: CUDA was asked for but is not available \(.+\): use provider cpu"):
        bench([mlp(1, 64)], ["m"], provider="cuda", memory=False)


# -- single runs and rounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "count"), [(0.5, 5), (0.9, 29), (0.99, 299)])
def test_a_quantile_needs_so_many_runs_that_one_of_them_likely_lies_beyond_it(q: float, count: int) -> None:
    assert enough(q) == count
    drawn = np.random.default_rng(0).random((20_000, count))  # the true quantile of these is q itself
    assert np.mean(drawn.max(axis=1) >= q) > 0.945
    assert np.mean(drawn[:, : count - count // 4].max(axis=1) >= q) < 0.945


@pytest.mark.parametrize("count", [5, 28, 29, 298, 299, 5000])
def test_quantiles_are_those_of_numpy_or_are_left_out(count: int) -> None:
    seconds = np.random.default_rng(count).lognormal(size=count) * 1e-3
    found = quantiles(seconds)
    expected = np.percentile(seconds * 1e3, [50, 90, 99])
    assert found.p50_ms == pytest.approx(expected[0], rel=1e-12)
    assert found.p90_ms == (pytest.approx(expected[1], rel=1e-12) if count >= 29 else None)
    assert found.p99_ms == (pytest.approx(expected[2], rel=1e-12) if count >= 299 else None)
    assert (found.count, found.max_ms) == (count, pytest.approx(seconds.max() * 1e3))


def test_every_run_of_every_round_is_kept() -> None:
    subject = Subject((mlp(1, 64), mlp(2, 64)), ("a", "b"), "cpu", 1, "included")
    schedule = Schedule(repeats=6, warmup=1, seconds=None, progress=None)
    times = measure(subject, {"x": np.ones((2, 64), np.float32)}, schedule, np.random.default_rng(0))
    assert times.runs_per_round > 1
    assert times.runs.shape == (2, 6 * times.runs_per_round)
    assert (times.runs > 0).all()
    np.testing.assert_array_equal(times.rounds, np.median(times.runs.reshape(2, 6, -1), axis=2))
    assert times.blocks.tolist() == [0, 1, 2, 3, 4, 5]
    assert times.providers == ("cpu", "cpu")


def test_models_take_turns_in_random_order() -> None:
    """Each round: every model once, `runs` timed runs after one that is not, and nothing in between."""
    called: list[int] = []
    calls = [lambda index=index: called.append(index) for index in range(3)]
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(60):
        called.clear()
        assert _round(calls, ["a", "b", "c"], 4, rng).shape == (3, 4)
        order = called[::5]
        assert called == [index for index in order for _ in range(5)]
        assert sorted(order) == [0, 1, 2]
        orders.add(tuple(order))
    assert len(orders) == 6  # all of them


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_measures_every_setting() -> None:
    seen: list[tuple[int, int]] = []
    reports = sweep(
        [mlp(2, 128), mlp(1, 128)],
        ["big", "small"],
        provider="cpu",
        threads=(1, 2),
        batches=(1, 256),
        repeats=5,
        memory=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(report.threads, report.batch) for report in reports] == [(1, 1), (1, 256), (2, 1), (2, 256)]
    assert [report.inputs["x"] for report in reports] == [(1, 128), (256, 128)] * 2
    assert seen == [(done, 20) for done in range(1, 21)]
    for report in reports:
        assert [model.name for model in report.models] == ["big", "small"]
        assert report.models[1].versus_first is not None
    one, many = reports[0].models[0], reports[1].models[0]
    assert many.latency.median_ms > one.latency.median_ms
    assert many.throughput == pytest.approx(256 / (many.latency.median_ms * 1e-3))
    console = Console(width=200, record=True, file=sys.stderr)
    console.print(report_table(*reports))
    rows = [line.split("│") for line in console.export_text().splitlines() if "(cpu)" in line]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [
        cells
        for threads in "12"
        for batch in ("1", "256")
        for cells in ([batch, threads, "big (cpu)"], ["", "", "small (cpu)"])
    ]


def test_the_batches_of_a_sweep_are_really_run() -> None:
    """The second model takes multiples of 7 samples only."""
    models, names = [mlp(1, 64), reshaped(7, -1)], ["first", "second"]
    assert len(sweep(models, names, provider="cpu", batches=(7, 14), repeats=5, memory=False)) == 2
    with pytest.raises(RuntimeFailure, match=r"^second: "):
        sweep(models, names, provider="cpu", batches=(7, 8), repeats=5, memory=False)


def test_a_batch_that_cannot_be_is_refused_before_anything_is_measured() -> None:
    seen: list[int] = []
    with pytest.raises(UsageError, match="batch is 3, but a fixes axis 0"):
        sweep([mlp(1, 64, batch=2)], ["a"], batches=(2, 3), progress=lambda done, total: seen.append(done))
    assert not seen


def test_tables_say_what_cannot_be_told() -> None:
    report = bench([mlp(8, 1024)], ["m"], provider="cpu", threads=1, batch=64, repeats=5, memory=False)
    runs = report.models[0].latency.runs
    assert isinstance(runs, Quantiles)
    assert runs.count < 29  # a run takes more than 2 ms
    assert (runs.p90_ms, runs.p99_ms) == (None, None)
    told = " ".join(remarks(report))
    assert f"too few runs for a p90: it needs 29, there were {runs.count}" in told
    assert f"too few runs for a p99: it needs 299, there were {runs.count}" in told
    assert "p50: it needs" not in told
