"""`spa bench`: settings, operators, and what it says of wrong input."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from spa.bench import Clocks
from spa.bench.machine import read_clocks
from spa.runtime import cuda_problem
from tests.command_line import Ran
from tests.small_models import cnn


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    return tmp_path / "cnn.onnx"


FAST = ("--provider", "cpu", "--repeats", 5)


def test_one_setting_is_one_report_and_several_are_a_list(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Ran(capsys, "bench", model, *FAST, "--batch", 3, "--threads", 1, "--warmup", 2, "--json").json()
    assert (one["batch"], one["threads"], one["warmup"], one["copies"]) == (3, 1, 2, "none")
    runs = one["models"][0]["latency"]["runs"]
    assert runs["count"] == one["rounds"] * one["models"][0]["latency"]["runs_per_round"]
    told = [runs[name] for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms") if runs[name] is not None]
    assert len(told) >= 2
    assert told == sorted(told)
    assert one["models"][0]["profile"] is None
    names = {"governor", "boost", "limit_mhz", "before_mhz", "after_mhz"}
    assert names <= set(Clocks.__dataclass_fields__)
    assert one["clocks"] is None or names <= set(one["clocks"])
    body = Ran(capsys, "bench", model, *FAST, "--batch", "1,4", "--threads", "1,2", "--operators", "--json").json()
    assert list(body) == ["reports"]
    assert [(r["threads"], r["batch"]) for r in body["reports"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for report in body["reports"]:
        assert {"ReorderOutput", "Gemm", "Relu"} <= {o["operator"] for o in report["models"][0]["profile"]["operators"]}


def test_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "bench", model, model, *FAST, "--batch", "1,4", "--operators")
    assert ran.status == 0, ran.err
    assert ran.out.count("time per operator") == ran.out.count("the slowest nodes") == 2
    assert "p99 ms" in ran.out
    assert "fused into others" in ran.out
    assert ("clocks: " in ran.out) == (read_clocks().mhz is not None)
    assert "time per operator" not in Ran(capsys, "bench", model, *FAST).out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch", "1,x"], "--batch: cannot read '1,x'; write numbers with commas between them, such as 1,8,32"),
        (["--batch", ""], "--batch: cannot read ''"),
        (["--batch", "-1"], "--batch: cannot read '-1'"),
        (["--threads", "1;2"], "--threads: cannot read '1;2'"),
        (["--batch", "0"], "batch must be 1 or more, not 0"),
        (["--batch", "2,2"], "batch 2 comes twice: give each value once"),
        (["--threads", "1,1"], "threads 1 comes twice"),
        (["--warmup", "-1"], "warmup must be 0 or more, not -1"),
        (["--copies", "some"], "--copies"),
        (["--server", "localhost:1", "--operators"], "--operators and --copies are not done by servers"),
        (["--server", "localhost:1", "--copies", "excluded"], "--operators and --copies are not done by servers"),
    ],
)
def test_wrong_input_is_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    ran = Ran(capsys, "bench", model, *options)
    assert ran.status == 2
    assert sentence in ran.err
    assert ran.out == ""


def test_a_batch_that_the_model_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = cnn()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    ran = Ran(capsys, "bench", tmp_path / "fixed.onnx", *FAST, "--batch", "1,8")
    assert ran.status == 2
    assert "batch is 8, but fixed.onnx fixes axis 0" in ran.err


def test_cuda_that_is_missing_is_said_plainly(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if cuda_problem() is None:
        pytest.skip("CUDA works here")
    ran = Ran(capsys, "bench", model, "--provider", "cuda", "--copies", "excluded")
    assert ran.status == 9
    assert ran.err.count("cnn.onnx") == 1
    assert "CUDA was asked for but is not available" in ran.err
