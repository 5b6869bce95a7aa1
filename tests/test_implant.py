"""Neural implants: the rewrite against the original with zeroed kernels, their weights, records, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import spa
from spa.cli.guard import main
from spa.errors import PlanError, TargetError, UsageError
from spa.graph import load
from spa.implant import Place, Record, apply, implant, verify
from spa.implant.candidates import candidates
from tests.models import BUILT
from tests.net import Net, feeds

Array = np.ndarray[Any, Any]
HOLDING = ["residual_cnn", "flat_cnn", "unet", "shuffle_net", "group_norm", "two_ways", "one_zero_bias",
           "computed_shapes", "merged", "opset7", "standardised"]  # fmt: skip
"""Models with convolutions that can hold implants: shared biases, residual sums, concatenations, flattening ..."""


def answers(model: onnx.ModelProto, fed: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True))


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}


def with_arrays(model: onnx.ModelProto, new: dict[str, Array]) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for tensor in out.graph.initializer:
        if tensor.name in new:
            tensor.CopyFrom(numpy_helper.from_array(new[tensor.name], tensor.name))
    return out


def by_hand(model: onnx.ModelProto, record: Record) -> onnx.ModelProto:
    """The model with the taps around the middle of these channels' kernels set to zero."""
    found = arrays(model)
    nodes = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv"}
    for place in record.implants:
        weight = found[nodes[place.output].input[1]]
        for channel in place.channels:
            middle = weight[channel][:, *(k // 2 for k in weight.shape[2:])].copy()
            weight[channel] = 0
            weight[channel][:, *(k // 2 for k in weight.shape[2:])] = middle
    return with_arrays(model, found)


def close(have: dict[str, Array], want: dict[str, Array]) -> None:
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, rtol=1e-4, atol=1e-4 * float(np.abs(value).max()))


@pytest.mark.parametrize("name", HOLDING)
def test_the_centre_alone_is_the_original_with_zeroed_taps(name: str) -> None:
    """Not with `spa.verify`'s reference: weights are zeroed here, in the input file."""
    model = BUILT[name].build()
    result = implant(model, share=0.4, align=1, weights="centre")
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-5
    fed = feeds(model)
    want = answers(by_hand(model, result.record), fed)
    close(answers(result.model, fed), want)
    dense = answers(model, fed)
    assert any(np.abs(dense[k] - v).max() > 1e-4 * np.abs(v).max() for k, v in want.items()), "it must matter"
    assert result.report.macs.after < result.report.macs.before
    if name != "standardised":  # there weights are computed from weights, which then are written twice
        assert result.report.parameters.after < result.report.parameters.before
    onnx.checker.check_model(result.model)
    assert (
        not {n.op_type for n in result.model.graph.node}
        - {n.op_type for n in model.graph.node}
        - {"Concat", "Constant"}
    )


def one_conv(kernel: int = 3, **more: Any) -> onnx.ModelProto:
    """Three convolutions; the first one's geometry is given."""
    net = Net()
    attributes = {"pads": [kernel // 2] * 4, **more}
    weight = net.weight("a.weight", 12, 3, kernel, kernel)
    x = net("Conv", net.input("x", "n", 3, 11, 13), weight, net.weight("a.bias", 12), name="a", **attributes)
    x = net("Relu", x)
    x = net("Conv", x, net.weight("b.weight", 6, 12, 3, 3), name="b", pads=[1, 1, 1, 1])
    net.named(net("GlobalAveragePool", net("Relu", x)), "y")
    return net.model(y=("n", 6, 1, 1))


GEOMETRIES: list[dict[str, Any]] = [
    {}, {"kernel": 5}, {"kernel": 7, "strides": [2, 2]}, {"strides": [2, 3]},
    {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    {"dilations": [2, 1], "pads": [2, 1, 3, 1], "strides": [2, 1]}, {"pads": [2, 1, 1, 3]},
    {"pads": None, "auto_pad": "SAME_UPPER"}, {"pads": None, "auto_pad": "SAME_LOWER", "kernel": 5},
]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_alignment_is_exact(geometry: dict[str, Any]) -> None:
    model = one_conv(**geometry)
    result = implant(model, share=0.5, align=1, weights="centre")
    assert [p.output for p in result.record.implants] == ["a_out"]
    assert len(result.record.implants[0].channels) == 6
    fed = {"x": np.random.default_rng(0).normal(size=(2, 3, 11, 13)).astype(np.float32)}
    close(answers(result.model, fed), answers(by_hand(model, result.record), fed))


@pytest.mark.parametrize(
    ("geometry", "why"),
    [
        ({"pads": [0, 0, 0, 0]}, "pads less than half"),
        ({"pads": [1, 0, 1, 1]}, "pads less than half"),
        ({"kernel": 4, "pads": [2, 2, 2, 2]}, "even size"),
        ({"pads": None, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, "depends on the size"),
        ({"pads": None, "auto_pad": "VALID"}, "pads less than half"),
    ],
)
def test_what_cannot_be_aligned_says_why(geometry: dict[str, Any], why: str) -> None:
    analysis = spa.analyze(one_conv(**geometry))
    found, refused = candidates(analysis, analysis.groups)
    assert [h.name for c in found for h in c.holders] == []
    assert why in refused["a_out"]


def test_grouped_shared_and_even_kernels_are_left_alone() -> None:
    net = Net()
    x = net.conv(net.input("x", "n", 4, 8, 8), "a", 4, 8, group=2)
    twice = net.weight("twice", 8, 8, 3, 3)
    x = net("Relu", net("Conv", x, twice, name="one", pads=[1] * 4))
    x = net("Relu", net("Conv", x, twice, name="two", pads=[1] * 4))
    net.named(net("GlobalAveragePool", x), "y")
    model = net.model(y=("n", 8, 1, 1))
    _, refused = candidates(spa.analyze(model), spa.analyze(model).groups)
    assert "grouped" in refused["a_out"]
    assert "shared" in refused["one_out"]
    assert "shared" in refused["two_out"]
    with pytest.raises(TargetError):
        implant(model, share=0.5)


# -- weights ---------------------------------------------------------------------------------------------------------


def small_images(count: int = 60) -> Array:
    """Smooth images: neighbours are alike."""
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(count, 3, 13, 15))
    return sum(noise[:, :, i : i + 11, j : j + 13] for i in range(3) for j in range(3)).astype(np.float32)


def test_fit_weights_are_the_least_squares_solution() -> None:
    """Up to a factor that gives each output the variance of what it replaces: against a plain regression."""
    model, x = one_conv(), small_images()
    result = implant(model, share=0.5, align=1, calibration=x, criterion="l2")
    assert result.report.weights == "fit"
    place = result.record.implants[0]
    y = at(model, "a_out", x)[:, list(place.channels)].transpose(0, 2, 3, 1).reshape(-1, 6).astype(np.float64)
    rows = x.transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64)
    want = np.linalg.lstsq(rows - rows.mean(0), y - y.mean(0), rcond=None)[0].T
    found = arrays(result.model)
    have, bias = found["a.weight_implant"].reshape(6, 3), found["a_out_implant_bias"]
    cosine = (have * want).sum(1) / np.linalg.norm(have, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.98, "a ridge and a choice of positions turn it a little"
    fitted = rows @ have.T + bias
    np.testing.assert_allclose(fitted.std(0), y.std(0), rtol=0.05)
    np.testing.assert_allclose(fitted.mean(0), y.mean(0), atol=0.05 * float(y.std()))


def at(model: onnx.ModelProto, name: str, x: Array) -> Array:
    """An inner value."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return answers(tapped, {"x": x})[name]


def test_fit_comes_closest_and_the_sum_is_right_where_nothing_changes() -> None:
    model, x = one_conv(), small_images(120)
    flat = np.broadcast_to(np.random.default_rng(0).normal(size=(4, 3, 1, 1)), (4, 3, 11, 13)).astype(np.float32)
    errors = {}
    for weights in ("fit", "sum", "centre", "zero"):
        result = implant(model, share=0.7, align=1, weights=weights, calibration=x[:60])  # type: ignore[arg-type]  # one of the choices
        (place,) = result.record.implants
        rest = [c for c in range(12) if c not in place.channels]
        want, have = at(model, "a_out", x[60:]), at(result.model, "a_out", x[60:])
        close({"kept": have[:, : len(rest)]}, {"kept": want[:, rest]})
        errors[weights] = float(((have[:, len(rest) :] - want[:, list(place.channels)]) ** 2).mean())
        if weights == "sum":
            inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
            want, have = at(model, "a_out", flat)[inside], at(result.model, "a_out", flat)[inside]
            close({"flat": have}, {"flat": want[:, [*rest, *place.channels]]})
    assert errors["fit"] < min(errors[w] for w in ("sum", "centre", "zero"))


# -- with a plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_cnn", "unet", "merged", "computed_shapes"])
def test_implants_instead_of_removal(name: str) -> None:
    """Of what a plan removes the most important stay as implants: against zeroed slices and kernels, made here."""
    model = BUILT[name].build()
    plan = spa.prune(model, target="macs=0.5", align=1, min_keep=1).plan
    result = implant(model, share=0.4, plan=plan, align=1, weights="centre")
    gone = {(r.initializer, r.axis): set(r.indices) for r in plan.removed}
    left = {(r.initializer, r.axis): set(r.indices) for r in result.record.removed}
    assert all(indices <= gone[key] for key, indices in left.items())
    nodes = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv"}
    for place in result.record.implants:
        weight = nodes[place.output].input[1]
        assert set(place.channels) == gone[weight, 0] - left.get((weight, 0), set())
    twin = by_hand(model, result.record)
    zeroed = arrays(twin)
    for r in result.record.removed:
        assert r.consumers is None or name in ("residual_cnn", "merged")
        if r.consumers is None:
            zeroed[r.initializer][(slice(None),) * r.axis + (list(r.indices),)] = 0
    fed = feeds(model)
    if all(r.consumers is None for r in result.record.removed):
        close(answers(result.model, fed), answers(with_arrays(twin, zeroed), fed))
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-5
    cut = spa.apply(model, plan).report.macs.after
    assert cut < result.report.macs.after < result.report.macs.before


def test_the_most_important_of_what_leaves() -> None:
    model = one_conv()
    scale = np.linspace(1, 2, 12).astype(np.float32)[:, None, None, None]
    weight = np.ones((12, 3, 3, 3), np.float32) * scale
    model = with_arrays(model, {"a.weight": weight, "b.weight": np.ones((6, 12, 3, 3), np.float32)})
    plan = spa.prune(model, target="units=0.5", align=1, criterion="l2").plan
    assert plan.groups[0].removed == tuple(range(6))
    result = implant(model, share=0.5, plan=plan, align=1)
    assert result.record.implants == (Place("a_out", (3, 4, 5)),)
    least = implant(model, share=0.25, align=1)
    assert least.record.implants == (Place("a_out", (0, 1, 2)),)


def test_fit_weights_after_removal() -> None:
    """The patches are those of the pruned model, which has fewer inputs here."""
    net = Net()
    x = net(
        "Relu", net("Conv", net.input("x", "n", 3, 11, 13), net.weight("z.weight", 16, 3, 3, 3), name="z", pads=[1] * 4)
    )
    x = net("Relu", net("Conv", x, net.weight("a.weight", 12, 16, 3, 3), name="a", pads=[1] * 4))
    x = net("Conv", x, net.weight("b.weight", 6, 12, 3, 3), name="b", pads=[1] * 4)
    net.named(net("GlobalAveragePool", net("Relu", x)), "y")
    model, images = net.model(y=("n", 6, 1, 1)), small_images()
    plan = spa.prune(model, target="macs=0.5", align=1).plan
    result = implant(model, share=0.6, plan=plan, align=1, calibration=images, ignore=["z.weight"])
    (place,) = result.record.implants
    assert place.output == "a_out"
    small = spa.apply(model, result.record.plan).model
    assert arrays(small)["a.weight"].shape[1] < 16
    gone = {i for r in result.record.removed if (r.initializer, r.axis) == ("a.weight", 0) for i in r.indices}
    left = [c for c in range(12) if c not in gone]
    order = [left.index(c) for c in left if c not in place.channels] + [left.index(c) for c in place.channels]
    want, have = at(small, "a_out", images)[:, order], at(result.model, "a_out", images)
    many = len(place.channels)
    close({"kept": have[:, :-many]}, {"kept": want[:, :-many]})
    for moment in (np.mean, np.std):
        pair = (moment(v[:, -many:].astype(np.float64), axis=(0, 2, 3)) for v in (have, want))
        np.testing.assert_allclose(*pair, rtol=0.05, atol=0.05 * float(want.std()))


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_gives_the_same_bytes(tmp_path: Path) -> None:
    onnx.save(BUILT["residual_cnn"].build(), tmp_path / "in.onnx")
    plan = spa.prune(tmp_path / "in.onnx", target="macs=0.6", align=1).plan
    for k, more in enumerate([{}, {"plan": plan}]):
        how: dict[str, Any] = {"share": 0.3, "align": 1, "weights": "sum", **more}
        result = implant(tmp_path / "in.onnx", output=tmp_path / f"a{k}.onnx", **how)
        (tmp_path / "r.json").write_text(result.record.to_json())
        assert Record.from_json(result.record.to_json()) == result.record
        apply(tmp_path / "in.onnx", tmp_path / "r.json", output=tmp_path / f"b{k}.onnx")
        assert (tmp_path / f"a{k}.onnx").read_bytes() == (tmp_path / f"b{k}.onnx").read_bytes()
        found = verify(tmp_path / "in.onnx", tmp_path / f"a{k}.onnx", tmp_path / "r.json")
        assert found.passed
        assert found.max_rel_error < 1e-5


def test_verification_reads_fit_weights_and_sees_changes(tmp_path: Path) -> None:
    model, x = one_conv(), small_images()
    result = implant(model, share=0.5, align=1, calibration=x)
    assert verify(model, result.model, result.record).passed
    found = arrays(result.model)
    found["a.weight"][0] *= 1.1
    assert not verify(model, with_arrays(result.model, found), result.record).passed
    with pytest.raises(PlanError, match="is not made with"):
        verify(model, model, result.record)
    with pytest.raises(PlanError, match="another model"):
        verify(one_conv(kernel=5), result.model, result.record)


def test_rounding_is_told_from_an_error() -> None:
    """An output behind a saturated sigmoid shows float32's rounding: it is compared in float64 as well."""
    pytest.importorskip("torch")
    model = one_conv()
    model.graph.node[-1].output[0] = "pooled"
    low = numpy_helper.from_array(np.array(16.0, np.float32), "low")
    model.graph.initializer.append(low)
    for op, inputs, out in (("Sub", ["pooled", "low"], "shifted"), ("Sigmoid", ["shifted"], "y")):
        model.graph.node.append(onnx.helper.make_node(op, inputs, [out], name=op))
    result = implant(model, share=0.5, align=1, weights="centre")
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-4
    found = arrays(result.model)
    found["a.weight_implant"][0] *= 1.5
    changed = with_arrays(result.model, found)
    assert verify(model, changed, result.record).passed, "a record has no weights of implants: the file's are taken"
    found["b.weight"][0] *= 1.01
    assert not verify(model, with_arrays(result.model, found), result.record).passed


def test_records_and_plans_are_never_mixed_up(tmp_path: Path) -> None:
    record = implant(one_conv(), share=0.5, align=1).record
    (tmp_path / "r.json").write_text(record.to_json())
    with pytest.raises(PlanError, match="no version"):
        spa.apply(one_conv(), tmp_path / "r.json")
    plan = spa.prune(one_conv(), target="macs=0.7", align=1).plan
    (tmp_path / "p.json").write_text(plan.to_json())
    with pytest.raises(PlanError, match="no record of implants"):
        apply(one_conv(), tmp_path / "p.json")
    bad = Record(record.sha256, (Place("a_out", tuple(range(12))),))
    with pytest.raises(PlanError, match="all channels"):
        apply(one_conv(), bad)
    with pytest.raises(PlanError, match="not there"):
        apply(one_conv(), Record(record.sha256, (Place("a_out", (99,)),)))
    with pytest.raises(PlanError, match="no convolution"):
        apply(one_conv(), Record(record.sha256, (Place("nowhere", (1,)),)))


def test_implants_of_a_model_with_implants() -> None:
    """What was written is a model like any other: it can be pruned and implanted again."""
    model = BUILT["residual_cnn"].build()
    for _ in range(3):
        result = implant(model, share=0.2, align=1)
        assert result.report.macs.after < result.report.macs.before
        model = result.model
    assert spa.prune(model, target="macs=0.9", align=1).report.verify is not None


def test_the_source_is_not_changed() -> None:
    model = BUILT["residual_cnn"].build()
    before = model.SerializeToString()
    first, second = (implant(model, share=0.3).model.SerializeToString() for _ in range(2))
    assert model.SerializeToString() == before
    assert first == second
    graph = load(BUILT["residual_cnn"].build())
    assert len(candidates(spa.analyze(graph), spa.analyze(graph).groups)[0]) > 1


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, record = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "r.json"
    onnx.save(one_conv(), source)
    np.savez(tmp_path / "calib.npz", x=small_images())
    arguments = ["implant", source, "-o", out, "--share", "0.5", "--align", "1", "--record", record, "--calibration",
                 tmp_path / "calib.npz", "--json"]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["weights"] == "fit"
    assert body["macs"]["after"] < body["macs"]["before"]
    assert body["implants"] == sum(p["channels"] for p in body["implanted"])
    assert body["verify"]["max_rel_error"] < 1e-4
    assert main(["verify", str(source), str(out), "--plan", str(record)]) == 0
    assert "zero but for their middle" in capsys.readouterr().out
    assert main(["apply", str(source), str(record), "-o", str(tmp_path / "again.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "sum"
    assert main(["implant", str(source), "-o", str(tmp_path / "x.onnx"), "--share", "0.4"]) == 0
    assert "channels of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--share", "0"], 2, "is no share"),
        (["--share", "0.5", "--weights", "fit"], 2, "needs samples"),
        (["--share", "0.5", "--criterion", "hap"], 2, "hap needs samples"),
        (["--share", "0.01"], 7, "larger --share"),
        (["--share", "0.5", "--plan", "nowhere.json"], 6, "nowhere.json"),
        (["--share", "0.5", "--align", "0"], 2, "--align"),
        (["--share", "0.5", "--method", "auto"], 2, "--method auto"),
    ],
)
def test_mistakes_are_one_sentence(
    more: list[str], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(one_conv(), tmp_path / "in.onnx")
    assert main(["implant", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), *more]) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx"]


def test_python_mistakes() -> None:
    with pytest.raises(UsageError, match="unknown weights"):
        implant(one_conv(), share=0.5, weights="best")  # type: ignore[arg-type]  # no choice
    net = Net()
    net.named(net.gemm(net.input("x", "n", 4), "a", 4, 4), "y")
    with pytest.raises(TargetError):
        implant(net.model(y=("n", 4)), share=0.5)
