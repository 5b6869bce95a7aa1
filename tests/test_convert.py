"""spa convert: export, prune and verify in one go, with the options and the output of spa prune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from typer.main import get_command

from spa.cli.app import app
from spa.export import run as exporting
from spa.export.process import Written
from tests.command_line import Ran
from tests.small_models import cnn


def options_of(command: str) -> set[str]:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]  # it is a group
    return {o for p in found.params for o in p.opts if o.startswith("-")}


def test_it_takes_what_export_and_prune_take() -> None:
    assert options_of("convert") == options_of("export") | options_of("prune") | {"--dense"}


def test_an_onnx_file_is_pruned_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(cnn(), tmp_path / "in.onnx")
    options = ["--target", "macs=0.6", "--criterion", "l1", "--plan", tmp_path / "plan.json", "--json"]
    first = Ran(capsys, "prune", tmp_path / "in.onnx", "-o", tmp_path / "a.onnx", *options)
    second = Ran(capsys, "convert", tmp_path / "in.onnx", "-o", tmp_path / "b.onnx", *options)
    assert (first.status, second.status) == (0, 0)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert set(second.json()) == set(first.json())
    ran = Ran(capsys, "convert", tmp_path / "in.onnx", "-o", tmp_path / "c.onnx", "--target", "macs=0.6", "--opset", 17)
    assert ran.status == 2
    assert "leave out --dense and the options of the export" in ran.err
    assert Ran(capsys, "convert", tmp_path / "in.onnx", "-o", tmp_path / "c.onnx", "--target", "macs=1e-9").status == 7


class Framework:
    """A process that has a framework."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, request: Any, label: str, python: object) -> None:
        self.seen[:] = [request, python]

    def __enter__(self) -> Framework:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def export(self, path: Path) -> Written:
        self.file = path.with_name("source.onnx")
        for place in (path, self.file):
            onnx.save(cnn(), place)
        return Written("a framework 1.0", {}, {"x": {0: "batch"}}, ("scores",))

    def run(self, feeds: Any) -> list[Any]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.file), providers=["CPUExecutionProvider"])
        return [np.asarray(y) for y in session.run(None, feeds)]

    def printed(self) -> str:
        return "the framework talks\n"


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(exporting, "Worker", Framework)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_source_is_exported_and_pruned(framework: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["--target", "macs=0.6", "--min-keep", "2"]
    export = ["--input", "x=1x3x8x8", "--exporter", "torchscript", "--opset", 17, "--python", sys.executable]
    ran = Ran(capsys, "convert", "torch:a:b", "-o", "out.onnx", *target, *export, "--seed", 4, "--verbose")
    assert ran.status == 0, ran.err
    assert "the framework talks" in ran.err
    assert "exported by a framework 1.0" in ran.out
    assert "proof: the file computes what torch:a:b does" in ran.out
    assert "proof: the pruned model equals the original" in ran.out
    assert "`spa bench out.onnx`" in ran.out  # the dense one is gone
    request, python = Framework.seen
    assert (request.driver, request.source, request.opset, request.seed) == ("from_torch", "a:b", 17, 4)
    assert Path(python) == Path(sys.executable)
    assert {p.name for p in framework.iterdir()} == {"out.onnx"}
    assert [o.name for o in onnx.load("out.onnx").graph.output] == ["scores"]


def test_the_dense_model_is_kept_where_it_is_needed(framework: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["convert", "torch:a:b", "-o", "out.onnx", "--target", "macs=0.6", "--plan", "plan.json", "--json"]
    ran = Ran(capsys, *start)
    assert ran.status == 2
    assert "keep it with --dense FILE" in ran.err
    body = Ran(capsys, *start, "--dense", "dense.onnx").json()
    assert body["export"]["output"] == "dense.onnx"
    assert body["export"]["verify"]["max_rel_error"] <= 1e-6
    assert body["macs"]["after"] <= 0.6 * body["macs"]["before"]
    assert Ran(capsys, "verify", "dense.onnx", "out.onnx", "--plan", "plan.json").status == 0
    assert Ran(capsys, *start, "--dense", "out.onnx").status == 2


def test_what_is_wrong_is_said_before_the_export(framework: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Framework.seen.clear()
    assert Ran(capsys, "convert", "torch:a:b", "-o", "out.onnx", "--target", "speed=2").status == 2
    assert Ran(capsys, "convert", "torch:a:b", "-o", "nowhere/out.onnx", "--target", "macs=0.6").status == 10
    assert not Framework.seen


def test_a_failing_export_prunes_nothing(
    framework: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Framework, "run", lambda self, feeds: [np.zeros((1, 10), np.float32)])
    ran = Ran(capsys, "convert", "torch:a:b", "-o", "out.onnx", "--target", "macs=0.6")
    assert ran.status == 8
    assert ran.err.count("\n") == 1
    assert not list(framework.iterdir())
