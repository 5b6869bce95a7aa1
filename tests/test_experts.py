"""Whole experts of a mixture leave: the pruned model is the original whose router never chooses them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import spa
from spa.cli.app import app
from spa.errors import PlanError, TargetError
from spa.groups import Group, analyze_model
from spa.latency.design import configurations
from spa.pipeline import analyze, apply
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.sensitivity import lowest
from spa.verify import masked
from tests.mixtures import CHOSEN, EXPERTS, FORMS, HIDDEN, LOGITS, WIDTH, Form, gathered, of_softmax
from tests.models import BUILT
from tests.net import Net, feeds

ROWS = {"n": 40}
"""Enough tokens for every expert to be chosen."""


def outputs(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def without(model: onnx.ModelProto, value: str, removed: Sequence[int]) -> onnx.ModelProto:
    """The model with minus infinity added to `value` at some experts."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    bias = np.zeros(EXPERTS, np.float32)
    bias[list(removed)] = -np.inf
    place = 1 + next(k for k, node in enumerate(out.graph.node) if value in node.output)
    for node in out.graph.node:
        node.input[:] = [f"{value}_masked" if name == value else name for name in node.input]
    out.graph.initializer.append(numpy_helper.from_array(bias, "no_experts"))
    out.graph.node.insert(place, helper.make_node("Add", [value, "no_experts"], [f"{value}_masked"]))
    return out


def experts_of(model: onnx.ModelProto | Path) -> tuple[spa.Analysis, list[Group]]:
    analysis = analyze(model)
    return analysis, [group for group in analysis.groups if group.kind == "expert"]


def subsets(chosen: int) -> list[tuple[int, ...]]:
    """Every expert alone, as many as may leave, and some in between."""
    most = EXPERTS - chosen
    rng = np.random.default_rng(0)
    several = [tuple(sorted(rng.permutation(EXPERTS)[:n].tolist())) for n in (*range(2, most + 1), most, most)]
    return [*((k,) for k in range(EXPERTS)), *dict.fromkeys(several)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_mixture_without_experts_is_one_that_never_chooses_them(form: Form) -> None:
    model = form.build()
    analysis, (group,) = experts_of(model)
    assert (group.units, group.least, group.exact) == (EXPERTS, form.chosen, False)
    inputs = feeds(model, 3, ROWS)
    before = outputs(model, inputs)[0]
    for removed in subsets(form.chosen):
        kept = kept_without(analysis, [(group, removed)])
        small = rewritten(analysis, kept).model
        (want,) = outputs(without(model, form.masked, removed), inputs)
        (got,) = outputs(ir.to_proto(small), inputs)
        (reference,) = outputs(ir.to_proto(masked(analysis, kept)), inputs)
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 1e-5 * scale, removed
        assert np.abs(reference - want).max() < 1e-5 * scale, removed
        assert np.abs(before - want).max() > 1e-3 * scale, removed  # these experts were chosen by some tokens
        shapes = {tensor.name: list(tensor.dims) for tensor in ir.to_proto(small).graph.initializer}
        assert shapes["up"] == [EXPERTS - len(removed), HIDDEN, WIDTH]


# -- what must stay ----------------------------------------------------------------------------------------------------


def _router(net: Net) -> tuple[str, str, str]:
    x = net.linear(net.input("x", "n", 5), "embed", 5, WIDTH)
    return x, *of_softmax(net, net.linear(x, "router", WIDTH, EXPERTS))


def _numbers(change: Callable[[Net, str], str]) -> onnx.ModelProto:
    """A mixture whose numbers of experts also go somewhere else."""
    net = Net(opset=17)
    x, shares, numbers = _router(net)
    y = net("Add", net.linear(gathered(net, x, shares, numbers), "head", WIDTH, 1), change(net, numbers))
    net.named(net("Identity", y), "y")
    return net.model(y=("n", None))


def _float(net: Net, x: str, name: str = "") -> str:
    return str(net("ReduceSum", net("Cast", x, name=name, to=1), net.value("end", [1]), keepdims=1))


def added(net: Net, numbers: str) -> str:
    """A table for every expert and every choice in one: the numbers are computed with."""
    first = net("Mul", numbers, net.value("many", [2]), name="reader")
    return _float(net, net("Gather", net.weight("table", 2 * EXPERTS), net("Add", first, net.value("which", [[0, 1]]))))


def single(net: Net, numbers: str) -> str:
    """A loop over the experts, unrolled."""
    return _float(net, net("Equal", numbers, net.value("three", 3), name="reader"))


def switched(net: Net, numbers: str) -> str:
    """As a truth value expert 0 is another than all others."""
    return _float(net, net("Cast", numbers, name="reader", to=9))


def measured(net: Net, numbers: str) -> str:
    return _float(net, numbers, "reader")


def sorted_(net: Net, numbers: str) -> str:
    """Tokens by expert: the order, not the number, is used."""
    scores = net("Cast", numbers, name="reader", to=1)
    return _float(net, net("TopK", scores, net.value("k", [CHOSEN]), outputs=2, axis=-1)[1])


@pytest.mark.parametrize(
    ("change", "reader"), [(added, "Mul"), (single, "Equal"), (switched, "Cast"), (measured, "Cast"), (sorted_, "Cast")]
)
def test_experts_stay_where_more_is_done_with_their_numbers(change: Callable[[Net, str], str], reader: str) -> None:
    _stay(_numbers(change), "up", f"TopK runs over this axis: {reader} reader reads the numbers of what is chosen")


def _stay(model: onnx.ModelProto, tensor: str, why: str, axis: int = 0) -> None:
    analysis, groups = experts_of(model)
    assert not groups
    frozen = {(f.tensor, f.axis): f.reason for f in analysis.frozen}
    assert frozen[tensor, axis].text == why


def test_experts_stay_where_their_numbers_are_an_output() -> None:
    net = Net(opset=17)
    x, shares, numbers = _router(net)
    net.named(net.linear(gathered(net, x, shares, numbers), "head", WIDTH, 3), "y")
    net.named(net("Cast", numbers, to=1), "which")
    model = net.model(y=("n", 3), which=("n", CHOSEN))
    model.graph.node.pop()  # the Cast
    model.graph.output[1].CopyFrom(helper.make_tensor_value_info(numbers, onnx.TensorProto.INT64, ("n", CHOSEN)))
    _stay(model, "up", "TopK runs over this axis: the numbers of what is chosen are an output")


def test_experts_stay_where_the_worst_all_or_an_unknown_number_are_chosen() -> None:
    cases: list[tuple[dict[str, int], int | None, str]] = [
        ({"largest": 0}, CHOSEN, "the smallest are chosen"),
        ({}, EXPERTS, "all are chosen"),
        ({}, None, "how many are chosen is known only at run time"),
    ]
    for options, count, why in cases:
        net = Net(opset=17)
        x = net.linear(net.input("x", "n", 5), "embed", 5, WIDTH)
        k = net.value("k", [count]) if count is not None else net.input("k", 1, dtype=np.int64)
        best, which = net("TopK", net.linear(x, "router", WIDTH, EXPERTS), k, outputs=2, axis=-1, **options)
        net.named(net.linear(gathered(net, x, best, which), "head", WIDTH, 3), "y")
        _stay(net.model(y=("n", 3)), "up", f"TopK runs over this axis: {why}")


def test_groups_of_experts_stay() -> None:
    """DeepSeek: first the best groups of experts are chosen, then experts of these."""
    net = Net(opset=17)
    x = net.linear(net.input("x", "n", 5), "embed", 5, WIDTH)
    scores = net("Sigmoid", net.linear(x, "router", WIDTH, EXPERTS))
    best = net("ReduceMax", net("Reshape", scores, net.value("groups", [-1, 2, 3])), axes=[-1], keepdims=0)
    _, group = net("TopK", best, net.value("one", [1]), outputs=2, axis=-1)
    mask = net("Equal", group, net.value("both", [0, 1]))
    wide = net("Expand", net("Unsqueeze", mask, net.value("end", [-1])), net.value("wide", [1, 1, 3]))
    left = net("Where", net("Reshape", wide, net.value("all", [-1, EXPERTS])), scores, net.value("none", 0.0))
    shares, which = net("TopK", left, net.value("k", [CHOSEN]), outputs=2, axis=-1)
    net.named(net.linear(gathered(net, x, shares, which), "head", WIDTH, 3), "y")
    _stay(net.model(y=("n", 3)), "up", "TopK runs over this axis")


def test_a_soft_mixture_keeps_its_experts() -> None:
    """Without a choice nothing says that what a Softmax shares out are experts: it might be attention."""
    _stay(BUILT["experts"].build(), "up", "Softmax runs over this axis")


def test_classes_stay() -> None:
    net = Net(opset=17)
    x = net("Relu", net.linear(net.input("x", "n", 5), "embed", 5, WIDTH))
    scores = net("Softmax", net.linear(x, "classes", WIDTH, 10), axis=-1)
    best, which = net("TopK", scores, net.value("k", [3]), outputs=2, axis=-1)
    net.named(net("Add", best, net("Gather", net.weight("prior", 10), which)), "y")
    _stay(net.model(y=("n", 3)), "classes.weight", "Softmax runs over this axis", axis=1)


@pytest.mark.parametrize("masked", [False, True])
def test_classes_of_pixels_stay(masked: bool) -> None:
    """Segmentation: kernels that make scores are more than matrices, and so are those that read a map of classes."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 3, 6, 6), "backbone", 3, 8)
    scores = net("Softmax", net.conv(x, "classes", 8, 7, act=None), axis=1)
    which = net("ArgMax", scores, axis=1, keepdims=0)
    if masked:
        mask = net("OneHot", which, net.value("depth", 7, np.int64), net.value("off_on", [0.0, 1.0]), axis=1)
        net.named(net.conv(mask, "refine", 7, 3, act=None), "y")
    else:
        net.named(net("Transpose", net("Gather", net.weight("colours", 7, 3), which), perm=[0, 3, 1, 2]), "y")
    _stay(net.model(y=("n", 3, 6, 6)), "classes.weight", "Softmax runs over this axis")


def test_a_vocabulary_stays() -> None:
    """A decoder that feeds its best token back: tokens are looked up in one matrix, not in a stack."""
    net = Net(opset=17)
    x = net("Relu", net.linear(net.input("x", "n", 5), "embed", 5, WIDTH))
    token = net("ArgMax", net.linear(x, "out", WIDTH, 24), axis=-1, keepdims=0)
    net.named(net.linear(net("Gather", net.weight("table", 24, WIDTH), token), "head", WIDTH, 3), "y")
    _stay(net.model(y=("n", 3)), "out.weight", "ArgMax runs over this axis", axis=1)


def test_attention_to_few_keys_stays() -> None:
    """Learned keys and values of several heads are a stack, and the best keys are chosen; values are summed."""
    net = Net(opset=17)
    x = net.linear(net.input("x", "n", 5), "q", 5, 2 * 4)
    q = net("Transpose", net.reshape(x, -1, 2, 4), perm=[1, 0, 2])
    scores = net("MatMul", q, net.weight("keys", 2, 4, 9))
    weights = net("Softmax", scores, axis=-1)
    y = net("Transpose", net("MatMul", weights, net.weight("values", 2, 9, 4)), perm=[1, 0, 2])
    net.named(net.linear(net.reshape(y, -1, 8), "o", 8, 3), "y")
    _stay(net.model(y=("n", 3)), "values", "Softmax runs over this axis", axis=1)


def test_boxes_stay() -> None:
    """Detection: the best of all anchors, and their boxes."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 3, 6, 6), "backbone", 3, 8)
    scores = net("Reshape", net.conv(x, "scores", 8, 2, act="Sigmoid"), net.value("flat", [0, -1]))
    best, which = net("TopK", scores, net.value("k", [4]), outputs=2, axis=-1)
    anchors = net("Gather", net.weight("anchors", 72, 4), which)
    net.named(net("Mul", anchors, net("Unsqueeze", best, net.value("end", [-1]))), "y")
    model = net.model(y=("n", 4, 4))
    analysis, groups = experts_of(model)
    assert not groups
    assert ("anchors", 0) in {(f.tensor, f.axis) for f in analysis.frozen}


@pytest.mark.parametrize("options", [{"activation_type": "swiglu"}, {"activation_type": "swiglu", "swiglu_fusion": 2}])
def test_fused_experts_that_cannot_be_verified_stay(options: dict[str, Any]) -> None:
    model = FORMS["fused"].build()
    node = next(n for n in model.graph.node if n.op_type == "MoE")
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in options.items())
    _stay(model, "up", "MoE with a third matrix, or with gates that do not alternate with what they multiply")


def test_neurons_of_fused_experts_leave_exactly() -> None:
    result = spa.prune(FORMS["fused"].build(), target="params=0.7", kinds=["neuron"], align=1)
    assert result.report.verify is not None
    assert (result.report.verify.exact, result.report.verify.max_rel_error < 1e-5) == (True, True)
    assert HIDDEN in {group.units for group in result.plan.groups if group.removed and group.name.startswith("moe")}


# -- plans, commands, folders ------------------------------------------------------------------------------------------


def test_as_many_experts_stay_as_are_chosen(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(FORMS["gathered"].build(), source)
    with pytest.raises(TargetError, match=r"units=0\.01 cannot be reached: the best is units=2 "):
        spa.prune(source, target="units=0.01", kinds=["expert"], scope="all", min_keep=1)
    result = spa.prune(source, target="units=3", kinds=["expert"], scope="all", output=tmp_path / "out.onnx")
    (left,) = [len(group.removed) for group in result.plan.groups]
    assert left == EXPERTS - 3
    again = apply(source, result.plan, output=tmp_path / "again.onnx")
    assert again.plan.removed == result.plan.removed
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    wider = [replace(r, indices=tuple(range(EXPERTS - 1))) for r in result.plan.removed]
    with pytest.raises(PlanError, match="keeps fewer units of router:expert than are chosen; keep at least 2"):
        apply(source, replace(result.plan, removed=tuple(wider)))


@pytest.mark.parametrize("criterion", ["obspa", "variance", "activation", "cfsp"])
@pytest.mark.parametrize("name", ["gathered", "gathered-best", "gathered-sigmoid", "scattered", "shared-late"])
def test_an_expert_that_is_not_used_leaves_first(name: str, criterion: str) -> None:
    model = FORMS[name].build()
    for tensor in model.graph.initializer:
        if tensor.name == "router.bias":
            bias = numpy_helper.to_array(tensor).copy()
            bias[3] = -10.0
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    samples = {"x": np.random.default_rng(5).normal(size=(64, 5)).astype(np.float32)}
    result = spa.prune(
        model, target="units=5", kinds=["expert"], scope="all", criterion=criterion, calibration=samples
    )  # fmt: skip
    assert [group.removed for group in result.plan.groups] == [(3,)]


def test_a_folder_says_how_many_experts_are_left(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    onnx.save(FORMS["flat"].build(), source / "model.onnx")
    (source / "config.json").write_text('{"num_hidden_layers": 1, "num_local_experts": 6, "num_experts_per_tok": 2}')
    arguments = ["prune", str(source), "-o", str(output), "--kinds", "expert", "--target", "units=4"]
    refused = CliRunner().invoke(app, arguments)
    assert "need --scope all" in str(refused.exception)
    done = CliRunner().invoke(app, [*arguments, "--scope", "all"])
    assert done.exit_code == 0, done.output
    assert "num_local_experts 6 -> 4" in done.output
    assert json.loads((output / "config.json").read_text())["num_local_experts"] == 4


# -- what is known about an expert -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gathered", "flat", "scattered", "one-hot", "compared"])
def test_a_closed_gate_is_an_expert_that_is_never_chosen(name: str) -> None:
    """Shares that sum to one again after the choice: a share of zero is no share."""
    pytest.importorskip("torch")
    from spa.graph import load
    from spa.interpreter import Gates, Interpreter

    model = FORMS[name].build()
    graph = load(model)
    analysis = analyze_model(graph.model)
    (group,) = (group for group in analysis.groups if group.kind == "expert")
    gates = Gates(analysis, [group])
    gates.set(group.name, [float(k not in (1, 3)) for k in range(EXPERTS)])
    inputs = feeds(model, 3, ROWS)
    got = Interpreter(graph.model)(inputs, gates=gates)["y"].detach().numpy()
    (want,) = outputs(without(model, LOGITS, [1, 3]), inputs)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_trials_and_measurements_keep_as_many_as_are_chosen() -> None:
    _, (group,) = experts_of(FORMS["gathered"].build())
    busy = replace(group, least=EXPERTS - 1)
    assert [len(lowest(np.arange(6.0), 0.6, least)) for least in (1, 4, 5)] == [4, 2, 1]
    assert {width for c in configurations([busy]) for width in c.widths.values()} == {EXPERTS - 1, EXPERTS}
    assert min(width for c in configurations([group]) for width in c.widths.values()) == CHOSEN
