"""Everything a user can get wrong: one sentence, the right exit status, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from spa.cli.guard import statuses
from tests.command_line import Ran
from tests.small_models import attention, cnn, custom, stuck


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    onnx.save(attention(), tmp_path / "attention.onnx")
    return tmp_path


Case = tuple[Callable[[Path], list[object]], int, str]
PRUNE = ["prune", "cnn.onnx", "-o", "o.onnx", "--target", "macs=0.6"]


def _model(change: Callable[[onnx.ModelProto], object], command: str = "inspect") -> Callable[[Path], list[object]]:
    """`command` on a copy of the CNN with a mistake."""

    def make(folder: Path) -> list[object]:
        model = cnn()
        change(model)
        (folder / "bad.onnx").write_bytes(model.SerializeToString())
        return [command, "bad.onnx"]

    return make


def _written(name: str, content: bytes, *arguments: object) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / name).write_bytes(content)
        return list(arguments)

    return make


def _external(location: str, create: bool) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        model = cnn()
        tensor = model.graph.initializer[0]
        if create:
            (folder / location).write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (folder / "bad.onnx").write_bytes(model.SerializeToString())
        return ["inspect", "bad.onnx"]

    return make


def _nan(model: onnx.ModelProto) -> None:
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array[0, 0, 0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))


def _ill_typed(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.arange(16), model.graph.initializer[1].name))


def _opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _stuck(folder: Path) -> list[object]:
    onnx.save(stuck(), folder / "stuck.onnx")
    return ["prune", "stuck.onnx", "-o", "o.onnx", "--target", "macs=0.6"]


def _custom(folder: Path) -> list[object]:
    onnx.save(custom(), folder / "custom.onnx")
    return ["prune", "custom.onnx", "-o", "o.onnx", "--target", "macs=0.8"]


def _plan(change: Callable[[dict[str, Any]], object], model: str = "cnn.onnx") -> Callable[[Path], list[object]]:
    """`spa apply` of a real plan of the CNN after `change`."""

    def make(folder: Path) -> list[object]:
        body = json.loads(spa.prune(folder / "cnn.onnx", target="macs=0.6", check=False).plan.to_json())
        change(body)
        (folder / "plan.json").write_text(json.dumps(body))
        return ["apply", model, "plan.json", "-o", "o.onnx"]

    return make


def _same(*arguments: object) -> Callable[[Path], list[object]]:
    return lambda folder: list(arguments)


CASES: dict[str, Case] = {
    "no such file": (_same("inspect", "nope.onnx"), 3, "no such file"),
    "a folder": (_same("inspect", "."), 3, "is a directory"),
    "not a model": (_written("bad.onnx", b"hello, world " * 9, "inspect", "bad.onnx"), 3, "not an ONNX model"),
    "empty file": (_written("bad.onnx", b"", "inspect", "bad.onnx"), 3, "empty"),
    "truncated": (
        _written("bad.onnx", cnn().SerializeToString()[:4000], "inspect", "bad.onnx"),
        3,
        "truncated",
    ),
    "old opset": (_model(_opset(6)), 4, "opset 6"),
    "future opset": (_model(_opset(999)), 4, "opset 999"),
    "missing external data": (_external("weights.bin", create=False), 5, "weights.bin"),
    "external data outside of the folder": (_external("../weights.bin", create=False), 5, "outside"),
    "absolute external data": (_external("/etc/passwd", create=False), 5, "outside"),
    "ill-typed": (_model(_ill_typed), 3, "stem"),
    "dangling input": (_model(lambda m: m.graph.node[2].input.__setitem__(0, "ghost")), 3, "ghost"),
    "NaN weights": (_model(_nan), 3, "NaN"),
    "nothing prunable": (_stuck, 7, "nothing in this model can be pruned"),
    "impossible target": (_same(*PRUNE[:-1], "macs=0.001"), 7, "the best is"),
    "one of two targets impossible": (_same(*PRUNE, "--target", "size=1KB"), 7, "size=1KB"),
    "all groups ignored": (_same(*PRUNE, "--ignore", "*"), 7, "--ignore"),
    "no group of the kind": (_same(*PRUNE, "--kinds", "head"), 7, "--kinds"),
    "unknown criterion": (_same(*PRUNE, "--criterion", "magic"), 2, "magic"),
    "unknown kind": (_same(*PRUNE, "--kinds", "channel,toes"), 2, "toes"),
    "unknown scope": (_same(*PRUNE, "--scope", "some"), 2, "--scope"),
    "unknown metric": (_same(*PRUNE[:-1], "joy=0.6"), 2, "joy=0.6"),
    "target above the original": (_same(*PRUNE[:-1], "macs=150%"), 2, "macs=150%"),
    "unreadable min-keep": (_same(*PRUNE, "--min-keep", "many"), 2, "many"),
    "unreadable align": (_same(*PRUNE, "--align", "eight"), 2, "eight"),
    "align of zero": (_same(*PRUNE, "--align", "0"), 2, "align"),
    "unreadable dim": (_same(*PRUNE, "--dim", "batch"), 2, "--dim"),
    "seed that is no number": (_same(*PRUNE, "--seed", "x"), 2, "--seed"),
    "unknown option": (_same(*PRUNE, "--magic"), 2, "--magic"),
    "unknown command": (_same("prone", "cnn.onnx"), 2, "prone"),
    "no output": (_same("prune", "cnn.onnx", "--target", "macs=0.6"), 2, "--output"),
    "no target": (_same(*PRUNE[:4]), 2, "--target"),
    "missing inputs file": (_same(*PRUNE, "--inputs", "nope.npz"), 2, "nope.npz"),
    "inputs that are no archive": (_same(*PRUNE, "--inputs", "cnn.onnx"), 2, "cnn.onnx"),
    "output over the input": (
        _same("prune", "cnn.onnx", "-o", "cnn.onnx", "--target", "macs=0.6"),
        2,
        "never overwritten",
    ),
    "output folder missing": (_same(*PRUNE[:3], "nope/o.onnx", *PRUNE[4:]), 10, "does not exist"),
    "output is a folder": (_same(*PRUNE[:3], ".", *PRUNE[4:]), 10, "is a directory"),
    "plan folder missing": (_same(*PRUNE, "--plan", "nope/p.json"), 10, "does not exist"),
    "plan is a folder": (_same(*PRUNE, "--plan", "."), 10, "is a directory"),
    "operator that cannot run": (_custom, 9, "--no-verify"),
    "plan of another model": (_plan(lambda p: None, "attention.onnx"), 6, "another model"),
    "missing plan": (_same("apply", "cnn.onnx", "nope.json", "-o", "o.onnx"), 6, "nope.json"),
    "plan that is no JSON": (_written("p.json", b"{", "apply", "cnn.onnx", "p.json", "-o", "o.onnx"), 6, "not JSON"),
    "plan that is no text": (_same("apply", "cnn.onnx", "cnn.onnx", "-o", "o.onnx"), 6, "plan"),
    "JSON that is no plan": (_written("p.json", b"[]", "apply", "cnn.onnx", "p.json", "-o", "o.onnx"), 6, "not a plan"),
    "plan of a newer version": (_plan(lambda p: p.update(version=99)), 6, "version 99"),
    "plan without its removals": (_plan(lambda p: p.pop("removed")), 6, "removed"),
    "plan with an unknown weight": (_plan(lambda p: p["removed"][0].update(initializer="ghost")), 6, "ghost"),
    "plan with an index too large": (_plan(lambda p: p["removed"][0]["indices"].append(999)), 6, "999"),
    "plan with a negative index": (_plan(lambda p: p["removed"][0]["indices"].append(-1)), 6, "-1"),
    "plan with a negative axis": (_plan(lambda p: p["removed"][0].update(axis=-9)), 6, "-9"),
    "plan with an axis too large": (_plan(lambda p: p["removed"][0].update(axis=9)), 6, "9"),
    "plan of a half removal": (_plan(lambda p: p["removed"].pop()), 6, "alone"),
    "plan that removes what is frozen": (
        _plan(lambda p: p["removed"].append({"initializer": "fc.bias", "consumers": None, "axis": 0, "indices": [0]})),
        6,
        "cannot",
    ),
    "unknown tensor": (_same("explain", "cnn.onnx", "stem.weihgt"), 2, "stem.weight"),
    "bench of no model": (_written("bad.onnx", b"hello", "bench", "bad.onnx"), 3, "bad.onnx"),
    "bench of models with other inputs": (_same("bench", "cnn.onnx", "attention.onnx"), 2, "input"),
    "too few rounds": (_same("bench", "cnn.onnx", "--repeats", "1"), 2, "repeats"),
    "verify without a plan": (_same("verify", "cnn.onnx", "cnn.onnx"), 2, "--plan"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_sentence_and_the_right_status(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, status, text = CASES[name]
    monkeypatch.chdir(folder)
    arguments = make(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    ran = Ran(capsys, *arguments)
    assert (ran.status, ran.out) == (status, ""), ran.err
    assert ran.err.startswith("spa: error: ")
    assert ran.err.count("\n") == 1
    assert text in ran.err
    assert "Traceback" not in ran.err
    again = Ran(capsys, *arguments, "--json")
    assert again.status == status
    assert again.json().keys() == {"error"}
    assert again.json()["error"]["code"] == {s: c for s, c, _ in statuses()}[status]
    assert again.json()["error"]["message"] in " ".join(again.err.split())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert {p.name for p in folder.iterdir()} == {p.name for p in before}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_unwritable_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name for p in folder.iterdir()}
    ran = Ran(capsys, "prune", folder / "cnn.onnx", "-o", "/proc/o.onnx", "--target", "macs=0.6")
    assert ran.status == 10
    assert ran.err.count("\n") == 1
    ran = Ran(
        capsys, "prune", folder / "cnn.onnx", "-o", folder / "o.onnx", "--target", "macs=0.6", "--plan", "/proc/p"
    )
    assert ran.status == 10
    assert {p.name for p in folder.iterdir()} == before
