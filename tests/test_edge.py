"""From a pruned model to a device: each stage against ONNX Runtime and numpy, not against what `spa` says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import spa
from spa.edge import Data, convert
from spa.edge.fidelity import Samples, compare_files
from spa.edge.gates import parse_gates, passed
from tests.command_line import Ran
from tests.small_models import attention, build, cnn
from tests.trained import trained

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN that has learned handwritten digits, samples to calibrate on, and others to test on, all with labels."""
    folder = tmp_path_factory.mktemp("digits")
    onnx.save(trained("cnn"), folder / "cnn.onnx")
    from examples import digits as example

    train, test, train_labels, test_labels = example.data()
    np.savez(folder / "calib.npz", x=train[:200], labels=train_labels[:200])
    np.savez(folder / "test.npz", x=test, labels=test_labels)
    return folder


def answers(path: Path, images: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {"tensor(float16)": np.float16}.get(session.get_inputs()[0].type, np.float32)
    (out,) = session.run(None, {session.get_inputs()[0].name: images.astype(wanted)})
    return np.asarray(out)


def held_out(folder: Path) -> tuple[Array, Array]:
    data = np.load(folder / "test.npz")
    return data["x"], data["labels"]


def kinds(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in onnx.load(path).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


# -- what is measured --------------------------------------------------------------------------------------------------


def scaled(path: Path, factor: float, bias: Array) -> Path:
    """y = factor x + bias."""
    nodes = [helper.make_node("Mul", ["x", "a"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    w = {"a": np.array(factor, np.float32), "b": bias.astype(np.float32)}
    onnx.save(build(nodes, w, {"x": ["n", 4]}, {"y": ["n", 4]}), path)
    return path


def test_fidelity_is_what_its_definition_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((50, 4)).astype(np.float32) + 3, rng.integers(0, 4, 50)
    bias = np.array([0.0, 1.4, -0.9, 0.6])
    first, second = scaled(tmp_path / "a.onnx", 2.0, np.zeros(4)), scaled(tmp_path / "b.onnx", 1.9, bias)
    data = spa.load_calibration([(x, labels)], spa.load(first).model)

    def metric(outputs: Any, given: Any) -> float:
        assert (given == labels).all()
        return float(outputs["y"].sum())

    for batch in (7, 64):  # pooled over batches, not averaged
        found = compare_files(first, second, Samples(data, batch, metric=metric))
        a, b = answers(first, x).astype(np.float64), answers(second, x).astype(np.float64)
        assert found.samples == 50
        assert found.max_error == pytest.approx(np.abs(a - b).max() / np.abs(a).max(), rel=1e-9)
        assert found.error == pytest.approx(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(), rel=1e-6)
        assert found.agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
        assert 0 < found.agreement < 1
        assert found.accuracy_before == pytest.approx((a.argmax(1) == labels).mean())
        assert found.accuracy == pytest.approx((b.argmax(1) == labels).mean())
        assert found.metric == pytest.approx(b.sum(), rel=1e-6)
        assert found.measured("metric_drop") == pytest.approx((a - b).sum(), rel=1e-5)


def test_what_is_not_finite_or_of_another_shape_is_infinitely_far(tmp_path: Path) -> None:
    first = scaled(tmp_path / "a.onnx", 1.0, np.zeros(4))
    broken = scaled(tmp_path / "b.onnx", 1.0, np.array([0.0, np.inf, 0.0, 0.0]))
    wide = tmp_path / "c.onnx"
    onnx.save(
        build([helper.make_node("Concat", ["x", "x"], ["y"], axis=1)], {}, {"x": ["n", 4]}, {"y": ["n", 8]}), wide
    )
    on = Samples(spa.load_calibration("noise", spa.load(first).model, samples=8))
    for other in (broken, wide):
        found = compare_files(first, other, on)
        assert found.max_error == found.error == float("inf")
    same = compare_files(first, first, on)
    assert same.max_error == same.error == 0.0
    assert same.agreement == 1.0


@pytest.mark.parametrize(
    ("text", "value", "good"),
    [
        ("agreement=0.98", 0.98, True),
        ("agreement >= 98%", 0.979, False),
        ("max_error<=1e-3", 1e-3, True),
        ("size=2MB", 2_000_001, False),
        ("size <= 30%", 300, True),
        ("size=0.3", 301, False),
        ("accuracy-drop=0.01", -0.02, True),
        ("latency=5ms", 5.1, False),
        ("speedup=1.5", 1.6, True),
        ("error=0.1", float("nan"), False),
    ],
)
def test_gates(text: str, value: float, good: bool) -> None:
    (gate,) = parse_gates(text)
    assert passed(gate, value, 1000).passed is good


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agrement=0.9", "did you mean 'agreement'"),
        ("agreement<=0.9", "a lower limit"),
        ("size>=2MB", "an upper limit"),
        ("size=two", "2MB or 30%"),
        ("agreement=98", "between 0 and 1"),
        ("error=low", "not a number"),
        ("error", "cannot read"),
    ],
)
def test_gates_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(spa.UsageError, match=says):
        parse_gates(text)


# -- quantize ----------------------------------------------------------------------------------------------------------


def test_int8_agrees_with_float(digits: Path, tmp_path: Path) -> None:
    step = convert(
        "quantize", digits / "cnn.onnx", output=tmp_path / "q.onnx", data=Data(digits / "calib.npz"),
        gate={"agreement": 0.97, "size": "60%"},
    )  # fmt: skip
    x, labels = held_out(digits)
    a, b = answers(digits / "cnn.onnx", x), answers(tmp_path / "q.onnx", x)
    assert (a.argmax(1) == b.argmax(1)).mean() > 0.97
    assert ((b.argmax(1) == labels).mean() - (a.argmax(1) == labels).mean()) > -0.02
    calib = np.load(digits / "calib.npz")
    a, b = answers(digits / "cnn.onnx", calib["x"]), answers(tmp_path / "q.onnx", calib["x"])
    assert step.fidelity is not None
    assert step.fidelity.agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert step.fidelity.accuracy == pytest.approx((b.argmax(1) == calib["labels"]).mean())
    assert step.bytes_after == (tmp_path / "q.onnx").stat().st_size < 0.6 * (digits / "cnn.onnx").stat().st_size
    model = onnx.load(tmp_path / "q.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    per_channel = 0
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights and weights[node.input[0]].ndim == 4:
            assert weights[node.input[0]].dtype == np.int8
            assert weights[node.input[1]].shape == weights[node.input[0]].shape[:1]
            per_channel += 1
    assert per_channel == sum(n == "Conv" for n in (node.op_type for node in model.graph.node)) > 3
    assert "BatchNormalization" not in kinds(tmp_path / "q.onnx")


def test_the_same_samples_give_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file in files:
        convert("quantize", digits / "cnn.onnx", output=file, data=Data(digits / "calib.npz", samples=32), search=False)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "dtype", "zero"),
    [
        ({"platform": "x86"}, np.uint8, False),
        ({"platform": "gpu"}, np.int8, True),
        ({"platform": "arm", "method": "percentile"}, np.int8, False),
    ],
)
def test_types_are_those_of_the_platform(
    options: dict[str, Any], dtype: Any, zero: bool, digits: Path, tmp_path: Path
) -> None:
    data = Data(digits / "calib.npz", samples=48)
    convert("quantize", digits / "cnn.onnx", output=tmp_path / "q.onnx", data=data, search=False, **options)
    model = onnx.load(tmp_path / "q.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    points = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(points) > 3
    assert {p.dtype for p in points} == {np.dtype(dtype)}
    assert all(int(p) == 0 for p in points) is zero
    weights = [c for c in constants.values() if c.dtype == np.int8 and c.ndim == 4]
    assert len(weights) > 3
    largest = max(int(np.abs(w.astype(int)).max()) for w in weights)
    assert largest <= 64 if options["platform"] == "x86" else largest > 64  # 7 bits where sums would overflow


def test_in_a_transformer_only_products_with_weights_are_quantised(tmp_path: Path) -> None:
    onnx.save(attention(), tmp_path / "a.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((16, 6, 32)).astype(np.float32))
    step = convert("quantize", tmp_path / "a.onnx", output=tmp_path / "q.onnx", data=Data(tmp_path / "x.npz"))
    assert step.detail["operators"] == ["MatMul"]
    model = onnx.load(tmp_path / "q.onnx")
    made = {name: node for node in model.graph.node for name in node.output}
    quantised = {
        node.name.split("_quant")[0]: all(made.get(i, node).op_type == "DequantizeLinear" for i in node.input)
        for node in model.graph.node
        if node.op_type == "MatMul"
    }
    assert quantised["up"]
    assert quantised["q.matmul"]
    assert not quantised["scores"]
    assert not quantised["mix"]


def outlier(path: Path, samples: Path) -> None:
    """Three layers, of which the second has one weight that ruins one scale for all, on an input that is always 0."""
    rng = np.random.default_rng(1)
    w = {k: (rng.standard_normal((16, 16)) / 4).astype(np.float32) for k in ("one", "two", "three")}
    w["two"][0, :] = 400.0
    w["one"][:, 0] = 0.0
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "two"], ["c"], "second"),
        helper.make_node("MatMul", ["c", "three"], ["y"], "third"),
    ]
    onnx.save(build(nodes, w, {"x": ["n", 16]}, {"y": ["n", 16]}), path)
    np.savez(samples, x=rng.standard_normal((64, 16)).astype(np.float32))


def test_the_node_that_hurts_is_found_and_left_alone(tmp_path: Path) -> None:
    model, samples = tmp_path / "m.onnx", tmp_path / "x.npz"
    outlier(model, samples)
    step = convert("quantize", model, output=tmp_path / "q.onnx", data=Data(samples), gate="error=0.01")
    assert step.detail["excluded"] == ["second"]
    assert step.fidelity is not None
    assert step.fidelity.error < 0.01
    with pytest.raises(spa.GateError, match=r"stage quantize missed error <= 0.01 \(it is \d"):
        convert("quantize", model, output=tmp_path / "n.onnx", data=Data(samples), gate="error=0.01", search=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "q.onnx", "x.npz"]


def test_nodes_can_be_left_alone_by_name_and_by_type(digits: Path, tmp_path: Path) -> None:
    data = Data(digits / "calib.npz", samples=32)
    step = convert(
        "quantize", digits / "cnn.onnx", output=tmp_path / "q.onnx", data=data, exclude=["Gemm"], search=False
    )
    model = onnx.load(tmp_path / "q.onnx")
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    assert gemm.name in step.detail["excluded"]
    assert any(t.name == gemm.input[1] and t.data_type == TensorProto.FLOAT for t in model.graph.initializer)
    with pytest.raises(spa.UsageError, match="no node has a name or type like 'Gemn'; did you mean 'Gemm'"):
        convert("quantize", digits / "cnn.onnx", output=tmp_path / "r.onnx", data=data, exclude=["Gemn"])


def test_what_is_coarse_already_is_refused(digits: Path, tmp_path: Path) -> None:
    data = Data(digits / "calib.npz", samples=32)
    convert("quantize", digits / "cnn.onnx", output=tmp_path / "q.onnx", data=data, search=False)
    convert("float16", digits / "cnn.onnx", output=tmp_path / "h.onnx")
    for name, says in (("q.onnx", "is quantised already"), ("h.onnx", "is in float16 already")):
        with pytest.raises(spa.UnsupportedModelError, match=says):
            convert("quantize", tmp_path / name, output=tmp_path / "x.onnx", data=data)
    step = convert("float16", tmp_path / "q.onnx", output=tmp_path / "qh.onnx", data=data)
    assert step.passed


# -- float16 and ort ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_io", [False, True])
def test_float16(half_io: bool, digits: Path, tmp_path: Path) -> None:
    step = convert("float16", digits / "cnn.onnx", output=tmp_path / "h.onnx", half_io=half_io)
    model = onnx.load(tmp_path / "h.onnx")
    onnx.checker.check_model(model, full_check=True)
    types = {info.type.tensor_type.elem_type for info in (*model.graph.input, *model.graph.output)}
    assert types == {TensorProto.FLOAT16 if half_io else TensorProto.FLOAT}
    assert all(t.data_type != TensorProto.FLOAT for t in model.graph.initializer)
    x, _ = held_out(digits)
    a, b = answers(digits / "cnn.onnx", x), answers(tmp_path / "h.onnx", x)
    assert np.abs(a - b).max() < 0.01 * np.abs(a).max()
    assert np.abs(a - b).max() > 0  # it really computed in half precision
    assert step.bytes_after < 0.6 * step.bytes_before


def test_nodes_can_stay_in_float32(digits: Path, tmp_path: Path) -> None:
    convert("float16", digits / "cnn.onnx", output=tmp_path / "h.onnx", keep=["Gemm"])
    model = onnx.load(tmp_path / "h.onnx")
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    assert any(t.name == gemm.input[1] and t.data_type == TensorProto.FLOAT for t in model.graph.initializer)
    assert any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)


def test_recurrent_layers_and_tensors_read_twice_survive_float16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = {n: rng.standard_normal(s).astype(np.float32) / 4 for n, s in (("w", (1, 32, 6)), ("r", (1, 32, 8)))}
    w |= {"k": (rng.standard_normal((6, 6)) / 3).astype(np.float32), "shape": np.array([1, 4, 8])}
    nodes = [
        helper.make_node("MatMul", ["x", "k"], ["h"], "before"),
        helper.make_node("ConstantOfShape", ["shape"], ["zero"], "zero"),
        helper.make_node("LSTM", ["h", "w", "r", "", "", "zero", "zero"], ["y"], "lstm", hidden_size=8),
    ]
    onnx.save(build(nodes, w, {"x": [5, 4, 6]}, {"y": [5, 1, 4, 8]}), tmp_path / "m.onnx")
    convert("float16", tmp_path / "m.onnx", output=tmp_path / "h.onnx")
    x = rng.standard_normal((5, 4, 6)).astype(np.float32)
    a, b = answers(tmp_path / "m.onnx", x), answers(tmp_path / "h.onnx", x)
    assert 0 < np.abs(a - b).max() < 5e-3


def test_ort_format(digits: Path, tmp_path: Path) -> None:
    step = convert("ort", digits / "cnn.onnx", output=tmp_path / "m.ort")
    x, _ = held_out(digits)
    assert (tmp_path / "m.ort").read_bytes()[4:8] == b"ORTM"
    assert np.allclose(answers(digits / "cnn.onnx", x), answers(tmp_path / "m.ort", x), atol=1e-4)
    operators = (tmp_path / str(step.detail["operators"])).read_text()
    assert "Conv" in operators
    assert step.bytes_after == (tmp_path / "m.ort").stat().st_size


# -- the commands ------------------------------------------------------------------------------------------------------


def test_commands_chain(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calib = ["--calibration", digits / "calib.npz"]
    ran = Ran(capsys, "quantize", digits / "cnn.onnx", "-o", tmp_path / "q.onnx", *calib, "--gate", "agreement=0.9")
    assert ran.status == 0, ran.err
    assert "1 passed" in ran.out
    body = Ran(capsys, "opset", tmp_path / "q.onnx", "-o", tmp_path / "o.onnx", "--to", 13, *calib, "--json").json()
    assert body["stage"] == "opset"
    assert body["fidelity"]["agreement"] > 0.99
    assert body["passed"]
    assert Ran(capsys, "ort", tmp_path / "o.onnx", "-o", tmp_path / "o.ort", *calib).status == 0
    assert Ran(capsys, "float16", digits / "cnn.onnx", "-o", tmp_path / "h.onnx", "--keep", "Gemm").status == 0


def test_a_missed_gate_has_its_own_status_and_leaves_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["float16", digits / "cnn.onnx", "-o", tmp_path / "h.onnx", "--gate", "size<=100", "--json"]
    ran = Ran(capsys, *arguments)
    assert ran.status == 11
    assert ran.json()["error"]["code"] == "gate"
    assert "stage float16 missed size <= 100 (it is " in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["ort", "cnn.onnx", "-o", "m.onnx"], 2, "name it *.ort"),
        (["float16", "cnn.onnx", "-o", "m.ort"], 2, "name it *.onnx"),
        (["float16", "cnn.onnx", "-o", "cnn.onnx"], 2, "is the input"),
        (["float16", "nope.onnx", "-o", "m.onnx"], 3, "no such file"),
        (["float16", "cnn.onnx", "-o", "m.onnx", "--gate", "accuracy=0.5"], 2, "needs labels"),
        (["float16", "cnn.onnx", "-o", "m.onnx", "--gate", "speedup=2"], 2, "by stage bench only"),
        (["quantize", "cnn.onnx", "-o", "m.onnx"], 2, "--calibration"),
        (["quantize", "cnn.onnx", "-o", "m.onnx", "--calibration", "no.npz"], 2, "do not exist"),
        (["quantize", "cnn.onnx", "-o", "cnn.npz", "--calibration", "cnn.npz"], 2, "is the input"),
        (["opset", "cnn.onnx", "-o", "m.onnx", "--to", "3"], 2, "choose 7 to"),
        (["opset", "cnn.onnx", "-o", "x/m.onnx", "--to", "13"], 10, "does not exist"),
    ],
)
def test_mistakes(
    arguments: list[str], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    np.savez(tmp_path / "cnn.npz", x=np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ran = Ran(capsys, *arguments)
    assert ran.status == status, ran.err
    assert says in ran.err
    assert len(ran.err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert json.loads(Ran(capsys, *arguments, "--json").out)["error"]["message"]
