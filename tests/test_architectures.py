"""Architecture families, exported while the tests run: all of them can be pruned, in every kind, and is verified."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import defs
from typer.testing import CliRunner

import spa
from benchmarks import deformable, sequence_networks, small_networks
from spa.cli.app import app
from spa.errors import TargetError, UsageError
from spa.pipeline import analyze, apply, verify
from spa.rules import REASONS, lookup

torch = pytest.importorskip("torch")

IMAGES = {name: (build, size) for name, _, build, size, _ in small_networks.NETWORKS}
QUICK = ("dense", "grouped", "shuffle", "excite", "unet", "fpn", "yolo", "pixels", "temporal", "volume", "mixer")
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
    "lstm": (sequence_networks.lstm, lambda: (torch.randint(0, 200, (2, 6)),)),
    "gru": (sequence_networks.gru, lambda: (torch.randint(0, 200, (2, 6)),)),
    "gcn": (sequence_networks.gcn, lambda: (torch.randn(2, 10, 12), torch.rand(2, 10, 10))),
    "dlrm": (sequence_networks.dlrm, lambda: (torch.randn(4, 13), torch.randint(0, 50, (4, 6)))),
    "lora": (sequence_networks.lora, lambda: (torch.randint(0, 200, (2, 6)),)),
    "rope-interleaved": (sequence_networks.rope_interleaved, lambda: (torch.randint(0, 200, (2, 6)),)),
    "experts": (sequence_networks.experts, lambda: (torch.randint(0, 200, (2, 6)),)),
    "ssm": (sequence_networks.ssm, lambda: (torch.randint(0, 200, (2, 12)),)),
}
KINDS = {
    "grouped": {"channel"},
    "mixer": {"hidden", "neuron"},
    "lstm": {"neuron", "hidden"},
    "lora": {"neuron", "head", "qk-dim", "v-dim"},
    "rope-interleaved": {"neuron", "head", "v-dim"},
    "experts": {"neuron", "expert", "head", "qk-dim", "v-dim"},
    "ssm": {"neuron", "kv-head", "head", "qk-dim", "v-dim"},
}
"""What must be among the kinds of groups that are found."""


def exported(build: Callable[[], Any], inputs: tuple[Any, ...], path: Path, opset: int = 17, **names: Any) -> Path:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(build().eval(), inputs, buffer, dynamo=False, opset_version=opset, **names)
    path.write_bytes(buffer.getvalue())
    return path


def cases() -> list[Any]:
    images = [(n, IMAGES[n][0], lambda n=n: (torch.randn(2, *IMAGES[n][1]),)) for n in QUICK]
    return [pytest.param(n, b, x, id=n) for n, b, x in [*images, *((n, b, x) for n, (b, x) in OTHERS.items())]]


@pytest.mark.parametrize(("name", "build", "inputs"), cases())
def test_all_of_an_architecture_can_be_pruned(
    name: str, build: Callable[[], Any], inputs: Callable[[], tuple[Any, ...]], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = exported(build, inputs(), tmp_path / "model.onnx")
    analysis = analyze(model)
    assert analysis.prunable_parameters >= 0.95 * analysis.parameters
    kinds = {group.kind for group in analysis.groups}
    assert kinds >= KINDS.get(name, set())
    for kind in sorted(kinds):
        with pytest.raises(TargetError, match=r"\(0\.\d+ of the original\)"):  # something can leave
            spa.prune(model, target="params=1e-6", kinds=[kind], scope="all", output=tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()
    result = spa.prune(model, target="macs=0.7", scope="all", align=1, output=tmp_path / "out.onnx")
    assert result.report.macs.after <= 0.7 * result.report.macs.before
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-4
    assert analyze(tmp_path / "out.onnx").macs == result.report.macs.after


# -- the border of the graph -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    past = tuple(torch.randn(2, 2, 8, 16) for _ in range(4))
    names = [f"past.{k}" for k in range(4)]
    path = tmp_path_factory.mktemp("cache") / "decoder.onnx"
    new = [f"present.{k}" for k in range(4)]
    inputs = (torch.randint(0, 200, (2, 1)), *past)
    return exported(sequence_networks.cached, inputs, path, input_names=["ids", *names], output_names=["logits", *new])


CACHE = ["past.*", "present.*"]


def shapes(path: Path) -> dict[str, list[int]]:
    graph = onnx.load(str(path)).graph
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}


def test_a_cache_at_the_border_keeps_its_shape(decoder: Path, tmp_path: Path) -> None:
    assert not {group.kind for group in analyze(decoder).groups} & {"kv-head", "qk-dim", "v-dim"}
    result = spa.prune(decoder, target="params=0.9", output=tmp_path / "out.onnx")
    assert shapes(tmp_path / "out.onnx") == shapes(decoder)
    assert result.report.border == ()


def test_a_cache_may_shrink_if_it_is_allowed(decoder: Path, tmp_path: Path) -> None:
    out, kinds = tmp_path / "out.onnx", ["kv-head", "qk-dim", "v-dim"]
    result = spa.prune(decoder, target="params=0.9", kinds=kinds, align=1, allow_io=CACHE, output=out)
    assert result.report.verify is not None
    assert result.report.verify.exact
    assert result.report.verify.max_rel_error < 1e-5
    before, after = shapes(decoder), shapes(out)
    assert after["ids"] == before["ids"]
    assert after["logits"] == before["logits"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert {change.name for change in result.report.border} == changed
    for change in result.report.border:
        assert list(change.before) == before[change.name]
        assert list(change.after) == after[change.name]
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in after.items() if n.startswith("past")}
    feeds["ids"] = np.array([[3], [7]])
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(["logits"], feeds)[0]).all()
    assert json.loads(result.plan.to_json())["settings"]["allow_io"] == CACHE
    again = apply(decoder, result.plan, output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
    assert again.report.border == result.report.border
    assert verify(decoder, out, result.plan).passed


def test_a_wrong_part_of_the_cache_is_noticed(decoder: Path, tmp_path: Path) -> None:
    from spa import finish
    from spa.errors import VerifyError

    right = finish.border

    def shifted(analysis: Any, kept: Any) -> Any:
        return {n: [(a, np.roll(i, 1)) for a, i in cuts] for n, cuts in right(analysis, kept).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "border", shifted)
        with pytest.raises(VerifyError):
            spa.prune(
                decoder, target="params=0.95", kinds=["v-dim"], align=1, allow_io=CACHE, output=tmp_path / "out.onnx"
            )
    assert not (tmp_path / "out.onnx").exists()


def test_what_is_allowed_must_be_there_and_go_with_the_rest(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'cache\*' matches no input and no output; there are ids, past\.0"):
        spa.prune(decoder, target="params=0.9", allow_io=["cache*"], output=tmp_path / "o.onnx")
    with pytest.raises(UsageError, match="leave out --calibration"):
        spa.prune(decoder, target="params=0.9", allow_io=CACHE, calibration="none", output=tmp_path / "o.onnx")
    arguments = ["prune", str(decoder), "-o", str(tmp_path / "o.onnx"), "--target", "params=0.95"]
    shown = CliRunner().invoke(app, [*arguments, "--allow-io", "past.*", "--allow-io", "present.*", "--kinds", "v-dim"])
    assert shown.exit_code == 0
    assert "past.1: [2, 2, 8, 16] -> [2, 2, 8, " in shown.stdout


# -- operators ---------------------------------------------------------------------------------------------------------


def test_every_operator_has_a_rule_or_a_reason() -> None:
    known = {s.name for s in defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    ruled = {name for name in known if lookup("", name, 10**6) is not None}
    assert known - ruled == set(REASONS)


def test_the_reason_is_told() -> None:
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("NonZero", ["h"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [2, None])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    reasons = {(f.axis, f.reason.text) for f in analyze(model).frozen}
    assert (1, f"no rule for operator NonZero: {REASONS['NonZero']}") in reasons


def test_neurons_of_looked_up_experts_are_neurons(tmp_path: Path) -> None:
    """Each token multiplies with the matrices of its two experts: no attention, though no operand is a constant."""

    class Experts(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is optional
        def __init__(self) -> None:
            super().__init__()
            self.into, self.router = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
            self.up = torch.nn.Parameter(torch.randn(4, 24, 16))
            self.down = torch.nn.Parameter(torch.randn(4, 16, 24))
            self.out = torch.nn.Linear(16, 3)

        def forward(self, x: Any) -> Any:
            x = self.into(x)
            share, which = self.router(x).softmax(-1).topk(2, -1)
            hidden = (self.up[which] @ x[:, None, :, None]).relu()
            return self.out(((self.down[which] @ hidden)[..., 0] * share[..., None]).sum(1))

    model = exported(Experts, (torch.randn(5, 8),), tmp_path / "model.onnx")
    analysis = analyze(model)
    inner = next(g for g in analysis.groups if {"up", "down"} == {m.tensor for m in g.members})
    assert (inner.kind, inner.units, inner.exact) == ("neuron", 24, True)
    assert not any(group.kind == "qk-dim" for group in analysis.groups)
    result = spa.prune(model, target="params=0.7", scope="all", align=1, output=tmp_path / "out.onnx")
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-5


def test_deformable_convolutions_lose_channels(tmp_path: Path) -> None:
    """The places that a kernel reads come from convolutions over the same channels; how many there are stays."""
    images = torch.randn(2, 3, 16, 16)
    model = exported(deformable.deformable, (images,), tmp_path / "model.onnx", deformable.OPSET)
    graph = onnx.load(str(model)).graph
    assert sum(node.op_type == "DeformConv" for node in graph.node) == 2
    torch.manual_seed(0)  # as in `exported`
    with torch.no_grad():
        wanted = deformable.deformable().eval()(images).numpy()
    (got,) = ort.InferenceSession(str(model)).run(None, {graph.input[0].name: images.numpy()})
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    analysis = analyze(model)
    assert sorted(group.units for group in analysis.groups) == [24, 32, 48, 64]
    assert {(group.kind, group.exact) for group in analysis.groups} == {("channel", True)}
    result = spa.prune(model, target="macs=0.5", output=tmp_path / "out.onnx")
    assert result.report.verify is not None
    assert (result.report.verify.exact, result.report.verify.max_rel_error < 1e-5) == (True, True)
    assert {len(group.removed) > 0 for group in result.plan.groups} == {True}
