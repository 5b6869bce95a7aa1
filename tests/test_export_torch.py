"""Exported torch modules: they compute what the graph does without spa, and their weights find the way back."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import spa  # noqa: E402
from spa.errors import OutputError, UnsupportedModelError, UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.interpreter import Interpreter  # noqa: E402
from spa.interpreter.export import exported  # noqa: E402
from spa.interpreter.export.forms import FORMS  # noqa: E402
from spa.interpreter.export.modules import MODULES  # noqa: E402
from spa.interpreter.export.names import literal, number  # noqa: E402
from spa.interpreter.types import to_numpy, to_tensor  # noqa: E402
from tests.command_line import Ran  # noqa: E402
from tests.models import BUILT  # noqa: E402
from tests.net import Net, feeds  # noqa: E402
from tests.subject import Case, difference, execute  # noqa: E402
from tests.test_law import CASES  # noqa: E402
from tests.zoo import ROOT  # noqa: E402

Array = np.ndarray[Any, Any]


def module(text: str, state: dict[str, Any]) -> Any:
    """The network that the text defines, with weights, in evaluation mode."""
    space: dict[str, Any] = {"__name__": "exported", "__file__": "exported.py"}
    exec(compile(text, "exported.py", "exec"), space)
    network = space["Net"]()
    network.load_state_dict({name: state.get(name, x) for name, x in network.state_dict().items()})
    return network.eval()


def computed(model: ir.Model, inputs: dict[str, Array]) -> dict[str, Array]:
    """What the exported module of a model answers."""
    made = exported(model, "model.onnx", "module.npz")
    network = module(made.text, made.state())
    names = [v.name for v in model.graph.inputs if v.const_value is None]
    with torch.no_grad():
        outputs = network(*(to_tensor(inputs[name]) for name in names))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {v.name: to_numpy(y, v.dtype) for v, y in zip(model.graph.outputs, outputs, strict=True)}


def runtime(model: onnx.ModelProto | Path, inputs: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


# -- every form ------------------------------------------------------------------------------------------------------

WRITTEN = [c for c in CASES if c.operator.rpartition("::")[2] in {*FORMS, *MODULES} and "::" not in c.operator]
"""Cases of the operators that have a form of their own; the others are the interpreter's functions, copied."""
COPIED = {c.operator: c for c in CASES if c not in WRITTEN}


@pytest.mark.parametrize("spec", [*WRITTEN, *COPIED.values()], ids=str)
def test_operators_compute_what_they_do(spec: Case) -> None:
    subject = spec.subject
    if spec.operator == "com.microsoft::FusedGemm":
        pytest.skip("the kernel that tests bring along always has a Relu")
    if spec.operator in ("Dropout", "Bernoulli") or spec.operator.startswith("Random"):
        pytest.skip("random")
    proto, inputs = subject.with_arrays(subject.arrays), subject.feeds(subject.arrays)
    try:
        got = computed(ir.from_proto(proto), inputs)
    except UnsupportedModelError as error:
        assert re.match(r"node '.+' \(.+\) cannot be written", str(error))  # noqa: PT017  (the alternative is equality)
        pytest.skip("has no source form")
    for name, array in execute(spec.engine, proto, inputs).items():
        limit = max(subject.tolerance.relative, 6e-3 if spec.operator.startswith("QLinear") else 0)
        assert difference(array, got[name].astype(array.dtype)) <= limit, name


def test_hardly_any_operator_has_no_form() -> None:
    """Those that look at the running interpreter, or have subgraphs."""
    without = set()
    for spec in {**{c.operator: c for c in reversed(CASES)}}.values():
        if spec.operator.startswith(("QLinear", "QGemm")):
            continue
        try:
            exported(ir.from_proto(spec.subject.with_arrays(spec.subject.arrays)), "m", "m.npz")
        except UnsupportedModelError:
            without.add(spec.operator)
    assert without <= {"If", "Loop", "Scan", "Dropout", "QuantizeLinear", "Col2Im", "LpPool", "BitCast", "Resize"}


RUNNABLE = sorted(name for name, built in BUILT.items() if built.runtime)


@pytest.mark.parametrize("name", RUNNABLE)
def test_models_compute_what_they_do(name: str) -> None:
    proto = BUILT[name].build()
    inputs = feeds(proto)
    try:
        got = computed(load(proto).model, inputs)
    except UnsupportedModelError as error:
        assert any(word in str(error) for word in ("(If)", "(Loop)", "(Scan)", "(Resize)", "Quantize", "QLinear"))  # noqa: PT017
        return
    for key, want in runtime(proto, inputs).items():
        assert difference(want, got[key]) <= min(BUILT[name].tolerance, 1e-3)


# -- what the text is ------------------------------------------------------------------------------------------------


def conv_net() -> onnx.ModelProto:
    """Convolution, BatchNormalization, a linear layer of three nodes, and shape arithmetic."""
    net = Net()
    x = net(
        "Conv",
        net.input("image", "n", 3, 8, 8),
        net.weight("stem.conv.weight", 6, 3, 3, 3),
        pads=[1] * 4,
        strides=[2, 2],
    )
    x = net("BatchNormalization", x, net.positive("stem.bn.weight", 6), net.weight("stem.bn.bias", 6),
            net.weight("stem.bn.running_mean", 6), net.positive("stem.bn.running_var", 6))  # fmt: skip
    x = net("Relu", x)
    size = net("Gather", net("Shape", x), net.value("zero", np.array(0)), axis=0)
    shape = net("Concat", net("Unsqueeze", size, net.value("axes", [0])), net.value("rest", [-1]), axis=0)
    x = net("Reshape", x, shape)
    x = net("MatMul", x, net.weight("onnx::MatMul_7", 96, 10), name="/head/fc/MatMul")
    net.named(net("Add", net.weight("head.fc.bias", 10), x), "logits")
    return net.model(logits=("n", 10))


def test_the_text_reads_like_a_module() -> None:
    made = exported(load(conv_net()).model, "net.onnx", "module.npz")
    lines = [line.strip() for line in made.text.splitlines()]
    for line in (
        "self.stem_conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)",
        "self.stem_bn = nn.BatchNorm2d(6)",
        "self.head_fc = nn.Linear(96, 10)",
        "def forward(self, image: Tensor) -> Tensor:",
        "n = image.shape[0]",
        "reshape = relu.reshape(n, -1)",
        "return head_fc",
    ):
        assert line in lines
    assert not made.helpers
    imports = {n.module for n in ast.walk(ast.parse(made.text)) if isinstance(n, ast.ImportFrom)}
    assert imports <= {"__future__", "pathlib", "torch", "torch.nn"}
    assert "spa" not in {a.name for n in ast.walk(ast.parse(made.text)) if isinstance(n, ast.Import) for a in n.names}
    assert set(made.weights) == {
        "stem_conv.weight", "stem_bn.weight", "stem_bn.bias", "stem_bn.running_mean", "stem_bn.running_var",
        "head_fc.weight", "head_fc.bias",
    }  # fmt: skip
    assert made.text == exported(load(conv_net()).model, "net.onnx", "module.npz").text


def test_shared_weights_stay_one() -> None:
    net = Net()
    table = net.weight("table", 24, 8)
    x = net("Gather", table, net.input("tokens", "n", "t", dtype=np.int64))
    net.named(net("MatMul", x, net("Transpose", table, perm=[1, 0])), "logits")
    model = net.model(logits=("n", "t", 24))
    made = exported(load(model).model, "m", "m.npz")
    assert list(made.weights) == ["table"]
    inputs = feeds(model)
    assert difference(runtime(model, inputs)["logits"], computed(load(model).model, inputs)["logits"]) < 1e-5


def test_names_of_the_model_are_never_code() -> None:
    net = Net()
    net.named(net("Relu", net.input('x"""; import os  #', "n", "class")), 'y"""\nimport os')
    model = net.model(**{'y"""\nimport os': ("n", "class")})
    made = exported(ir.from_proto(model), 'a"""b\\.onnx', "m.npz")
    network = module(made.text, {})
    x = torch.randn(2, 3)
    assert torch.equal(network(x), x.relu())
    assert not any(isinstance(n, ast.Import) and n.names[0].name == "os" for n in ast.walk(ast.parse(made.text)))


@pytest.mark.parametrize("x", [1e-5, 9.999999747378752e-06, 0.1, -2.5, 1 / 3, 6.0, 1e-12, 3.4028234663852886e38, -1.0])
def test_numbers_keep_their_float32(x: float) -> None:
    assert np.float32(eval(number(x))) == np.float32(x)
    assert eval(literal([x, True, None, "a'b", (1,)]))[1:] == [True, None, "a'b", (1,)]


def test_gradients_are_those_of_the_interpreter() -> None:
    graph = load(conv_net())
    made = exported(graph.model, "m", "m.npz")
    network, twin = module(made.text, made.state()).train(), Interpreter(graph.model).train()
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    torch.nn.functional.cross_entropy(network(x), labels).backward()
    torch.nn.functional.cross_entropy(twin({"image": x})["logits"], labels).backward()
    parameters = dict(network.named_parameters())
    for name, weight in made.weights.items():
        assert weight.value is not None
        if name in parameters:
            want = twin.weights[weight.value.name or ""].grad
            assert torch.allclose(parameters[name].grad, want.t() if weight.turned else want, atol=1e-6), name
    moved = dict(network.named_buffers())["stem_bn.running_mean"]
    assert torch.allclose(moved, twin.statistics["stem.bn.running_mean"], atol=1e-6)


# -- there and back --------------------------------------------------------------------------------------------------

TRAIN = """
import importlib, sys, numpy as np, torch
torch.set_num_threads(1)
torch.manual_seed(0)
for name in sys.argv[1:]:
    part = importlib.import_module(name)
    model = part.load()
    inputs = [torch.from_numpy(a) for a in np.load(name + "_in.npz").values()]
    first = model(*inputs)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    model(*inputs).square().mean().backward()
    optimiser.step()
    part.save(model, name + "_trained.npz")
    torch.save(model.state_dict(), name + "_trained.pt")
    with torch.no_grad():
        np.savez(name + "_out.npz", first=first.detach().numpy(), trained=model.eval()(*inputs).numpy())
assert not any(m == "spa" or m.startswith(("spa.", "onnx")) for m in sys.modules)
"""
ZOO = ("mobilenetv2_ts", "vit_fusedqkv_sdpa_dy", "hf_bert_sdpa_ts")


def subjects(tmp_path: Path) -> dict[str, tuple[Path, dict[str, Array]]]:
    """Models with inputs: what everybody has, and of the recorded ones a CNN, a ViT and a BERT or two."""
    onnx.save(conv_net(), tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    out = {"net": (tmp_path / "net.onnx", {"image": rng.normal(size=(4, 3, 8, 8)).astype(np.float32)})}
    for name in ZOO:
        path = ROOT / "zoo" / f"{name}.onnx"
        if path.is_file():
            with np.load(path.with_suffix(".npz")) as stored:
                out[name] = (path, {k[3:]: stored[k] for k in stored.files if k.startswith("in:")})
    return out


def relative(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def test_trained_without_spa_and_imported(tmp_path: Path) -> None:
    models = subjects(tmp_path)
    for name, (path, inputs) in models.items():
        made = spa.export_torch(path, tmp_path / f"{name}.py")
        assert made.verify is not None
        assert made.verify.max_rel_error < 1e-4
        np.savez(tmp_path / f"{name}_in.npz", **inputs)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *models], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, (path, inputs) in models.items():
        with np.load(tmp_path / f"{name}_out.npz") as stored:
            first, trained = stored["first"], stored["trained"]
        assert relative(next(iter(runtime(path, inputs).values())), first) < 1e-4
        out = tmp_path / f"{name}_trained.onnx"
        suffix = ".pt" if name == "net" else ".npz"
        result = spa.import_weights(path, tmp_path / f"{name}_trained{suffix}", out)
        assert result.changed > result.tensors // 2
        assert relative(trained, next(iter(runtime(out, inputs).values()))) < 1e-4
        assert relative(first, trained) > 1e-3  # there was something to bring back
        before, after = onnx.load(path), onnx.load(out)
        assert [n.op_type for n in before.graph.node] == [n.op_type for n in after.graph.node]


def test_a_state_dict_comes_back_whatever_its_file(tmp_path: Path) -> None:
    model = conv_net()
    made = exported(load(model).model, "m", "m.npz")
    state = {n: (x + 0.01).contiguous() for n, x in made.state().items()}
    want = {w.value.name: (state[n].t() if w.turned else state[n]).numpy() for n, w in made.weights.items() if w.value}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(raw)]}  # type: ignore[dict-item]  # the header is mixed
        body += raw
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    torch.save({"state_dict": {f"module.{n}": x for n, x in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    for source in (state, tmp_path / "w.safetensors", tmp_path / "w.pt", want):  # the last by the graph's own names
        result = spa.import_weights(model, source)
        got = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array)


def test_an_untrained_export_is_taken_apart() -> None:
    """Equal vectors that an exporter merged train on their own, and come back as vectors of their own."""
    net = Net()
    x, ones, zeros = net.input("x", "n", 8), net.value("ones", np.ones(8)), net.value("zeros", np.zeros(8))
    for name in "ab":
        x = net("MatMul", x, net.weight(f"{name}.weight", 8, 8))
        x = net("Relu", net("BatchNormalization", x, ones, zeros, zeros, ones))
    net.named(net.gemm(x, "head", 8, 3), "logits")
    model = net.model(logits=("n", 3))
    graph = load(model)
    from spa.interpreter import untie_if_merged

    untie_if_merged(graph.model)
    made = exported(graph.model, "m", "m.npz")
    state = {n: x + k for k, (n, x) in enumerate(made.state().items())}
    result = spa.import_weights(model, state)
    norms = [n for n in result.model.graph.node if n.op_type == "BatchNormalization"]
    assert len({name for n in norms for name in n.input[1:]}) == 8


def half_net() -> onnx.ModelProto:
    model = conv_net()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def test_half_precision(tmp_path: Path) -> None:
    onnx.save(half_net(), tmp_path / "half.onnx")
    made = spa.export_torch(tmp_path / "half.onnx", tmp_path / "half.py")
    assert "dtype=torch.float16" in made.output.read_text()
    with np.load(made.weights) as stored:
        state = {n: stored[n] * (1 if n.endswith("tracked") else 2) for n in stored.files}
    result = spa.import_weights(tmp_path / "half.onnx", state, tmp_path / "back.onnx")
    assert result.verify.max_rel_error < 2e-2
    before, after = (onnx.load(tmp_path / f"{n}.onnx").graph.initializer for n in ("half", "back"))
    for a, b in zip(before, after, strict=True):
        assert a.data_type == b.data_type
        if a.data_type == TensorProto.FLOAT16:
            np.testing.assert_array_equal(2 * numpy_helper.to_array(a), numpy_helper.to_array(b))


# -- mistakes --------------------------------------------------------------------------------------------------------


def state_of(model: onnx.ModelProto) -> dict[str, Any]:
    return exported(load(model).model, "m", "m.npz").state()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("head_fc.weight"), "lacks 'head_fc.weight'; save"),
        (lambda s: s.clear(), "lacks 'stem_conv.weight' and 6 more"),
        (lambda s: s.update(other=torch.zeros(1)), "has 'other'"),
        (
            lambda s: s.update({"head_fc.weight": torch.zeros(10, 95)}),
            r"shape \[10, 95\] where this model has \[10, 96\]",
        ),
        (
            lambda s: s.update({"head_fc.bias": torch.full((10,), torch.nan)}),
            "'head_fc.bias' holds numbers that are not",
        ),
        (lambda s: s.update({"head_fc.bias": np.array(["a"])}), "'head_fc.bias' is no tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, text: str) -> None:
    state = state_of(conv_net())
    change(state)
    with pytest.raises(UsageError, match=text) as caught:
        spa.import_weights(conv_net(), state)
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".txt"])
def test_damaged_files_are_one_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    for content in (b"", b"nonsense", b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a": {}}'):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(str(path))) as caught:
            spa.import_weights(conv_net(), path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"missing\.pt"):
        spa.import_weights(conv_net(), tmp_path / "missing.pt")


def test_code_in_a_file_of_weights_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Hostile()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="never loaded"):
        spa.import_weights(conv_net(), tmp_path / "w.pt")
    assert "run" not in capsys.readouterr().out


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    then = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["a"])], "t", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"])], "o", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    net = Net()
    x, flag = net.input("x", "n", 3), net.input("flag", dtype=np.bool_)
    x = net("Relu", x)
    for graph in (then, other):
        graph.node[0].input[0] = x
    net.named(net("If", flag, name="choice", then_branch=then, else_branch=other), "y")
    with pytest.raises(UnsupportedModelError, match=r"node 'choice' \(If\) cannot be written"):
        spa.export_torch(net.model(y=("n", 3)), tmp_path / "m.py")
    assert not list(tmp_path.iterdir())


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(conv_net(), path)
    ran = Ran(capsys, "export-torch", path, "-o", tmp_path / "module.py")
    assert ran.status == 0
    assert "max relative error" in ran.out
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "module.py", "module.npz"}
    body = Ran(capsys, "export-torch", path, "-o", tmp_path / "module.py", "--json").json()
    assert body["parameters"] == sum(
        w.tensor.numel() for w in exported(load(path).model, "m", "m.npz").weights.values()
    )
    body = Ran(capsys, "import-weights", path, tmp_path / "module.npz", "-o", tmp_path / "out.onnx", "--json").json()
    assert body["changed"] == 0
    assert body["tensors"] == 7
    for arguments, status in (
        (("export-torch", path, "-o", tmp_path / "no-module.py"), 2),
        (("export-torch", path, "-o", tmp_path / "nowhere" / "m.py"), 10),
        (("import-weights", path, tmp_path / "module.npz", "-o", path), 2),
        (("import-weights", path, path, "-o", tmp_path / "o.onnx"), 2),
    ):
        ran = Ran(capsys, *arguments)
        assert ran.status == status
        assert ran.err.count("\n") == 1
    assert not (tmp_path / "o.onnx").exists()


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="No space left"):
        spa.export_torch(conv_net(), tmp_path / "m.py")
    assert not list(tmp_path.iterdir())
