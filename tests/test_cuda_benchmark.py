"""The benchmark for machines with a GPU: it says plainly where there is none, and its rehearsal on the CPU works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from spa.runtime import cuda_problem
from tests.small_models import cnn

ROOT = Path(__file__).parents[1]


def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "cuda.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    if cuda_problem() is None:
        pytest.skip("there may be a GPU here")
    done = ran("--json", tmp_path / "r.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no NVIDIA GPU can be used here: ")
    assert not list(tmp_path.iterdir())


def test_the_rehearsal_measures_and_compares(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    parts = [word for part in ("latency", "outputs", "statistics") for word in ("--only", part)]
    files = ["--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md"]
    done = ran(tmp_path / "cnn.onnx", "--provider", "cpu", "--batch", 2, "--rounds", 5, "--samples", 32, *parts, *files)
    assert done.returncode == 0, done.stderr
    body = json.loads((tmp_path / "r.json").read_text())
    found = body["models"]["cnn"]
    assert found["latency"]["provider"] == ["cpu"]
    assert [row["version"] for row in found["latency"]["rows"]] == [
        "dense",
        "pruned",
        "dense float16",
        "pruned float16",
    ]
    assert all(row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in found["latency"]["rows"])
    assert found["statistics"]["layers"] > 0
    assert max(found["statistics"]["errors"].values()) == 0  # the same provider twice
    assert body["device"]["onnxruntime"]
    assert "| pruned " in (tmp_path / "r.md").read_text()


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    model = cnn()
    model.graph.node[-1].op_type = "Gemn"
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    done = ran(tmp_path / "bad.onnx", "--provider", "cpu", "--only", "outputs", "--only", "statistics")
    assert done.returncode == 1
    assert "* outputs: FAILED, " in done.stdout
    assert "* statistics: passed, " in done.stdout  # it runs around what it does not know
    assert "did not pass" in done.stderr
    assert "Traceback" not in done.stderr
