"""`spa verify` on models whose weights were changed after the cut, which no plan holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from tests.command_line import Ran
from tests.models import BUILT

WAYS: dict[str, dict[str, Any]] = {
    "obs": {"method": "obspa"},
    "bias": {"criterion": "variance", "compensate": "bias"},
    "dense": {"criterion": "variance", "compensate": "obs-dense"},
    "norm": {"method": "spa-l1"},
}
MODELS = ["two_layers", "flat_cnn", "residual_cnn", "vit_split", "decoder"]


def prune(source: Path, output: Path, **more: Any) -> spa.Result:
    options: dict[str, Any] = {"target": "macs=0.7", "align": 1, "calibration": "noise", "samples": 64} | more
    return spa.prune(source, output=output, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(BUILT["residual_cnn"].build(), tmp_path / "model.onnx")
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_what_can_be_checked_is(name: str, way: str, tmp_path: Path) -> None:
    source, output, again = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "again.onnx"
    onnx.save(BUILT[name].build(), source)
    plan = prune(source, output, **WAYS[way]).plan
    assert plan.compensated
    found = spa.verify(source, output, plan)
    assert found.passed
    assert found.compensated == (found.max_rel_error > found.tolerance)
    assert found.compensated or way == "norm"
    spa.apply(source, plan, output=again)
    cut = spa.verify(source, again, plan)
    assert cut.passed
    assert not cut.compensated


def test_plans_without_compensation_are_held_to_the_proof(folder: Path) -> None:
    source, out, other = folder / "model.onnx", folder / "out.onnx", folder / "other.onnx"
    plain = prune(source, out, criterion="l2").plan
    assert not plain.compensated  # the samples were not used
    prune(source, other, method="obspa")
    assert spa.verify(source, out, plain).passed
    assert not spa.verify(source, other, plain).passed


def test_another_structure_fails(folder: Path) -> None:
    source, out, other = folder / "model.onnx", folder / "out.onnx", folder / "other.onnx"
    plan = prune(source, out, method="obspa").plan
    prune(source, other, method="obspa", target="macs=0.5")
    for wrong in (other, source):
        found = spa.verify(source, wrong, plan)
        assert not found.passed
        assert not found.compensated


def spoiled(path: Path, change: Any) -> Path:
    """A copy in which one tensor that `change` makes something of is replaced."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        new = change(numpy_helper.to_array(tensor))
        if new is not None:
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
            break
    else:
        pytest.fail("no such tensor")
    onnx.save(model, out := path.with_name("spoiled.onnx"))
    return out


def test_infinite_outputs_fail(folder: Path) -> None:
    source, out = folder / "model.onnx", folder / "out.onnx"
    plan = prune(source, out, method="obspa").plan
    wrong = spoiled(out, lambda a: np.full_like(a, np.inf) if a.dtype == np.float32 and a.ndim == 4 else None)
    found = spa.verify(source, wrong, plan)
    assert not found.passed


def test_other_indices_fail(tmp_path: Path) -> None:
    """Whole numbers are part of the structure: here the heads of an attention would be laid out in another order."""
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(BUILT["vit_split"].build(), source)
    plan = prune(source, out, method="obspa").plan
    wrong = spoiled(out, lambda a: a[::-1].copy() if a.dtype == np.int64 and a.ndim == 1 and len(set(a)) > 1 else None)
    try:
        assert not spa.verify(source, wrong, plan).passed
    except spa.RuntimeFailure:
        return  # it does not even run


def test_other_operators_fail(folder: Path) -> None:
    source, out = folder / "model.onnx", folder / "out.onnx"
    plan = prune(source, out, method="obspa").plan
    model = onnx.load(out)
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type = "Sigmoid"
    onnx.save(model, out)
    assert not spa.verify(source, out, plan).passed


def test_the_command_line_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, plan = (folder / n for n in ("model.onnx", "out.onnx", "plan.json"))
    how = ("--method", "obspa", "--calibration", "noise", "--samples", 64, "--no-cache", "--align", 1)
    made = Ran(capsys, "prune", model, "-o", out, "--target", "macs=0.7", "--plan", plan, *how, "--json")
    assert made.json()["verify"]["compensated"] is False  # the cut is what prune proves
    ran = Ran(capsys, "verify", model, out, "--plan", plan)
    assert ran.status == 0
    assert not ran.err
    assert "proof" not in ran.out
    assert "weights were changed after the cut" in ran.out
    body = Ran(capsys, "verify", model, out, "--plan", plan, "--json").json()
    assert body["passed"] is True
    assert body["compensated"] is True
    assert body["max_rel_error"] > body["tolerance"]
    assert Ran(capsys, "verify", model, model, "--plan", plan).status == 8
