"""Every model of `tests/models.py` through the whole pipeline, and the result held against independent checks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import spa
from tests import outside
from tests.models import BUILT
from tests.models_odd import external
from tests.net import feeds, sizes

ONE = {"n": 1, "t": 6}
"""Sizes of symbolic axes for costs."""


@dataclass(frozen=True)
class Setting:
    """One way to prune."""

    target: str
    options: dict[str, Any]

    def run(self, source: Path, **more: Any) -> spa.Result:
        """Prune as far as the target says, or else as far as the error says is possible."""
        options = {"dims": sizes(onnx.load(source), ONE)} | self.options | more
        try:
            return spa.prune(source, target=self.target, **options)
        except spa.TargetError as error:
            best = re.findall(r"is (\w+)=\S+ \(([\d.]+) of the original\)", str(error))
            if not best:
                raise
            return spa.prune(source, target=[f"{metric}={share}" for metric, share in best], **options)


SETTINGS = {
    "l2": Setting("macs=0.7", {}),
    "l1-uniform": Setting("params=0.6", {"criterion": "l1", "allocation": "uniform", "normalisation": "none"}),
    "random-align1": Setting("macs=0.8", {"criterion": "random", "seed": 1, "align": 1}),
    "random-all": Setting("macs=0.5", {"criterion": "random", "seed": 2, "scope": "all", "aggregation": "sum"}),
    "bn-all": Setting("size=80%", {"criterion": "bn-scale", "scope": "all", "normalisation": "gaussian"}),
    "isomorphic-all": Setting(
        "macs=0.6,params=0.7",
        {"scope": "all", "normalisation": "isomorphic", "aggregation": "max", "align": 2, "min_keep": "25%"},
    ),
}


def _write(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(BUILT[name].build(), path)
    return path


@pytest.fixture(params=list(BUILT))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("key", list(SETTINGS))
def test_pruned_model(name: str, key: str, tmp_path: Path) -> None:
    """What must hold for whatever was asked: same function, valid file, same surroundings, honest numbers."""
    built, setting = BUILT[name], SETTINGS[key]
    source, output = _write(name, tmp_path), tmp_path / "out.onnx"
    result = setting.run(source, output=output, check=built.runtime)
    assert result.output == output
    assert result.model is None
    assert {p.name for p in tmp_path.iterdir()} == {source.name, "out.onnx"}
    original, pruned = onnx.load(source), onnx.load(output)
    plan = json.loads(result.plan.to_json())
    assert plan["removed"]

    _same_surroundings(original, pruned)
    _runs_alike(built, original, pruned, plan, result)
    _honest_numbers(built, original, pruned, result, output)
    if built.runtime:
        again = spa.verify(source, output, result.plan, seed=11)
        assert again.passed
        assert again.max_rel_error <= built.tolerance


def _runs_alike(built: Any, original: onnx.ModelProto, pruned: onnx.ModelProto, plan: Any, result: spa.Result) -> None:
    wide, slim = outside.runnable(original, built.functions), outside.runnable(pruned, built.functions)
    inputs = feeds(original, seed=3)
    exact = all(group["exact"] for group in plan["groups"])
    if built.runtime:
        assert result.report.verify is not None
        assert result.report.verify.exact == exact
        assert result.report.verify.max_rel_error <= built.tolerance
    if exact:
        reference = outside.zeroed(wide, plan)
        assert outside.difference(outside.run(reference, inputs), outside.run(slim, inputs)) <= built.tolerance
    else:
        for key, array in outside.run(slim, inputs).items():
            assert np.isfinite(array).all(), key


def _same_surroundings(original: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    onnx.checker.check_model(pruned)
    weights = {tensor.name for tensor in original.graph.initializer}
    assert [i for i in pruned.graph.input if i.name not in weights] == [
        i for i in original.graph.input if i.name not in weights
    ]
    assert {i.name for i in pruned.graph.input} == {i.name for i in original.graph.input}
    assert list(pruned.graph.output) == list(original.graph.output)
    for key in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(pruned, key) == getattr(original, key), key
    assert list(pruned.metadata_props) == list(original.metadata_props)
    flat = {f.domain for f in original.functions}
    assert {i.domain: i.version for i in pruned.opset_import if i.domain not in flat} == {
        i.domain: i.version for i in original.opset_import if i.domain not in flat
    }


def _honest_numbers(
    built: Any, original: onnx.ModelProto, pruned: onnx.ModelProto, result: spa.Result, output: Path
) -> None:
    report = result.report
    inputs = feeds(original, seed=3, dims=ONE)
    wide, slim = outside.runnable(original, built.functions), outside.runnable(pruned, built.functions)
    # behind an unknown operator the batch has no name, so no size can be given for it
    counted = {
        "macs": (None, None) if built.functions else (outside.macs(wide, inputs), outside.macs(slim, inputs)),
        "parameters": (outside.parameters(original), outside.parameters(pruned)),
    }
    for metric, (before, after) in counted.items():
        change = getattr(report, metric)
        if before is not None:
            assert change.before == before, metric
            assert change.after == after, metric
    again = spa.analyze(output, dims=sizes(pruned, ONE))
    assert again.macs == report.macs.after
    assert again.parameters == report.parameters.after
    assert report.bytes.after == output.stat().st_size
    for text in result.plan.settings["targets"]:
        metric, limit = text.split("=")
        change = {"macs": report.macs, "size": report.bytes}.get(metric, report.parameters)
        share = float(limit.rstrip("%")) / (100 if "%" in limit else 1)
        assert change.after <= share * change.before
    assert report.groups == len(result.plan.groups)
    assert report.removed_units == sum(len(g.removed) for g in result.plan.groups)


# -- determinism -------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import hashlib, json, sys, onnx, spa
from pathlib import Path
from tests.models import BUILT
folder = Path(sys.argv[1])
found = {}
for name, built in BUILT.items():
    source, output = folder / f"{name}.onnx", folder / f"{name}.small.onnx"
    onnx.save(built.build(), source)
    result = spa.prune(source, target="macs=0.8", scope="all", criterion="random", seed=5, check=False, output=output)
    first = hashlib.sha256(output.read_bytes()).hexdigest()
    (folder / "plan.json").write_text(result.plan.to_json())
    spa.apply(source, folder / "plan.json", output=output)
    second = hashlib.sha256(output.read_bytes()).hexdigest()
    found[name] = [result.plan.to_json(), first, second]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Plans and hashes of pruned files, made in another process whose sets and dictionaries are ordered otherwise."""
    folder = tmp_path_factory.mktemp("elsewhere")
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.xdist_group("elsewhere")
def test_same_bytes_anywhere(name: str, elsewhere: dict[str, list[str]], tmp_path: Path) -> None:
    source, output = _write(name, tmp_path), tmp_path / "out.onnx"
    options = {"target": "macs=0.8", "scope": "all", "criterion": "random", "seed": 5, "check": False}
    hashes, plans = [], []
    for _ in range(2):
        result = spa.prune(source, output=output, **options)
        hashes.append(hashlib.sha256(output.read_bytes()).hexdigest())
        plans.append(result.plan.to_json())
    loaded = spa.Plan.from_json(plans[0])
    assert loaded == result.plan or json.loads(loaded.to_json()) == json.loads(plans[0])
    assert loaded.to_json() == plans[0]
    (tmp_path / "plan.json").write_text(plans[0])
    for plan in (result.plan, tmp_path / "plan.json"):
        applied = spa.apply(source, plan, output=output, check=BUILT[name].runtime)
        assert applied.report.macs == result.report.macs
        assert applied.report.bytes == result.report.bytes
        hashes.append(hashlib.sha256(output.read_bytes()).hexdigest())
    assert plans[0] == plans[1] == elsewhere[name][0]
    assert len({*hashes, *elsewhere[name][1:]}) == 1


def test_again(name: str, tmp_path: Path) -> None:
    """A pruned model is an ordinary model: it can be pruned again, and again."""
    built = BUILT[name]
    model, last = _write(name, tmp_path), None
    dims = sizes(onnx.load(model), ONE)
    for step in range(3):
        output = tmp_path / f"step{step}.onnx"
        try:
            result = spa.prune(
                model, target="macs=0.85", scope="all", align=1, dims=dims, output=output, check=built.runtime
            )
        except spa.TargetError:
            assert step
            break
        assert last is None or result.report.macs.before == last
        model, last = output, result.report.macs.after
        onnx.checker.check_model(output)


# -- models in memory --------------------------------------------------------------------------------------------------


def test_in_memory(name: str) -> None:
    """The kind that goes in comes out, the source is not touched, and all kinds give the same weights."""
    built = BUILT[name]
    proto = built.build()
    before = proto.SerializeToString(deterministic=True)
    options = {"target": "macs=0.8", "scope": "all", "check": False}
    result = spa.prune(proto, **options)
    assert isinstance(result.model, onnx.ModelProto)
    assert result.output is None
    assert proto.SerializeToString(deterministic=True) == before
    expected = _tensors(result.model)

    model = ir.from_proto(built.build())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    other = spa.prune(model, **options).model
    assert isinstance(other, ir.Model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert _tensors(ir.to_proto(other)) == expected
    onnx.checker.check_model(ir.to_proto(other))


def test_graphsurgeon(name: str) -> None:
    gs = pytest.importorskip("onnx_graphsurgeon")
    built = BUILT[name]
    graph = gs.import_onnx(built.build())
    before = gs.export_onnx(graph).SerializeToString(deterministic=True)
    result = spa.prune(graph, target="macs=0.8", scope="all", check=built.runtime).model
    assert isinstance(result, gs.Graph)
    assert gs.export_onnx(graph).SerializeToString(deterministic=True) == before
    exported = gs.export_onnx(result)
    wide, slim = outside.runnable(built.build(), built.functions), outside.runnable(exported, built.functions)
    inputs = feeds(wide)
    assert outside.run(slim, inputs).keys() == outside.run(wide, inputs).keys()


def _tensors(model: onnx.ModelProto) -> dict[str, bytes]:
    found = {t.name: t for g in outside.graphs(model.graph) for t in g.initializer}
    return {key: numpy_helper.to_array(tensor).tobytes() for key, tensor in found.items()}


def test_external_data(tmp_path: Path) -> None:
    """Weights in two files: the output keeps its weights outside, in one file of its own."""
    source = external(tmp_path)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    result = spa.prune(source, target="macs=0.6", output=tmp_path / "small.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    written = {p.name for p in tmp_path.iterdir()} - set(kept)
    assert len(written) == 2
    assert result.report.bytes.before == sum(len(data) for data in kept.values())
    assert result.report.bytes.after == sum((tmp_path / name).stat().st_size for name in written)
    light = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in light.graph.initializer)
    original, pruned = onnx.load(source), onnx.load(tmp_path / "small.onnx")
    inputs = feeds(original)
    reference = outside.zeroed(original, json.loads(result.plan.to_json()))
    assert outside.difference(outside.run(reference, inputs), outside.run(pruned, inputs)) <= 1e-5


# -- the proof itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two_layers", "residual_cnn", "vit_split", "decoder", "lstm_tagger", "branches"])
def test_verification_sees_a_changed_weight(name: str, tmp_path: Path) -> None:
    """Whatever change moves an output by more than a thousandth is found."""
    source, output = _write(name, tmp_path), tmp_path / "out.onnx"
    plan = SETTINGS["l2"].run(source, output=output).plan
    pruned = onnx.load(output)
    inputs = feeds(pruned, dims=ONE)
    clean = outside.run(pruned, inputs)
    noticed = 0
    tensors = [t for g in outside.graphs(pruned.graph) for t in g.initializer]
    for tensor in [t for t in tensors if t.data_type == onnx.TensorProto.FLOAT][:12]:
        original = tensor.raw_data
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[-1] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        if outside.difference(clean, outside.run(pruned, inputs)) > 1e-3:
            onnx.save(pruned, tmp_path / "bad.onnx")
            check = spa.verify(source, tmp_path / "bad.onnx", plan)
            assert not check.passed, tensor.name
            noticed += 1
        array.reshape(-1)[-1] -= 1
        tensor.raw_data = original
    assert noticed >= 3


@pytest.mark.parametrize("name", ["two_layers", "residual_cnn", "vit_split", "decoder", "lstm_tagger", "branches"])
def test_verification_sees_a_wrong_plan(name: str, tmp_path: Path) -> None:
    """The plan of another run does not describe this one."""
    source, output = _write(name, tmp_path), tmp_path / "out.onnx"
    mine = SETTINGS["l2"].run(source, output=output).plan
    other = spa.prune(source, target="macs=0.7", criterion="random", seed=3).plan
    assert mine.removed != other.removed
    assert spa.verify(source, output, mine).passed
    assert not spa.verify(source, output, other).passed


def test_nothing_is_written_when_verification_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that goes wrong (here: one that leaves another unit) is caught before the file appears."""
    import spa.finish as finish

    real = finish.rewritten

    def wrong(analysis: Any, kept: Any) -> Any:
        shifted = kept.copy()
        for group in analysis.groups:
            shifted[group.positions] = np.roll(kept[group.positions], 1, axis=0)
        return real(analysis, shifted)

    monkeypatch.setattr(finish, "rewritten", wrong)
    source, output = _write("two_layers", tmp_path), tmp_path / "out.onnx"
    with pytest.raises(spa.VerifyError, match=r"out\.onnx differs from its reference"):
        spa.prune(source, target="macs=0.7", output=output)
    assert not output.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["two_layers.onnx"]
