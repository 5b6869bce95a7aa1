"""The interpreter against ONNX Runtime and torch: values, modes, types, devices, errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from spa import rules  # noqa: E402
from spa.errors import RuntimeFailure, UnsupportedModelError, UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.interpreter import Interpreter, supported, table, untie  # noqa: E402
from spa.interpreter.listing import markdown  # noqa: E402
from spa.interpreter.program import to_host  # noqa: E402
from spa.interpreter.types import to_numpy  # noqa: E402
from spa.runtime import open_session, run  # noqa: E402
from spa.unsigned import has_signed, unsigned  # noqa: E402
from tests.models import BUILT  # noqa: E402
from tests.net import Net, feeds  # noqa: E402
from tests.subject import Case, difference, execute  # noqa: E402
from tests.test_law import CASES  # noqa: E402
from tests.zoo import MISSING, Recorded, recorded, trained  # noqa: E402

Array = np.ndarray[Any, Any]
RUNNABLE = {name: built for name, built in BUILT.items() if built.runtime}


def runtime(source: Path | onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    data = source if isinstance(source, Path) else source.SerializeToString()
    model = ir.load(source) if isinstance(source, Path) else ir.from_proto(source)
    if has_signed(model):  # in kernels that are exact on all processors
        data = ir.to_proto(unsigned(model)).SerializeToString()
    return run(open_session(data, provider="cpu", threads=1, optimize=False), inputs)


def computed(network: Interpreter, inputs: dict[str, Array]) -> dict[str, Array]:
    kinds = {v.name: v.dtype for v in network.model.graph.outputs}
    with torch.no_grad():
        return {k: to_numpy(v, kinds[k]) for k, v in network(inputs).items()}


# -- values ----------------------------------------------------------------------------------------------------------

STRANGE = {
    "Dropout 3x4 {0.5} bool:{1}": "random",
    "com.microsoft::FusedGemm 3x4 4x5 5": "the kernel that tests bring along always has a Relu",
    "com.microsoft::MoE 5x8 5x6 !6x4x8 - !6x8x4 k=2 activation_type=relu use_sparse_mixer=1": "no sparse mixer here",
    "Resize 2x3x4x4 [0.0,0.0,0.0,0.0,0.5,1.0,1.0,1.0]": "ONNX Runtime takes no region of the batch axis",
}
STEPS = 6e-3
"""One step of 8 bits, where a value falls on the border between two."""


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_operators_agree_with_the_runtime(spec: Case) -> None:
    reason = next((why for start, why in STRANGE.items() if str(spec).startswith(start)), None)
    if reason is not None:
        pytest.skip(reason)
    subject = spec.subject
    proto, inputs = subject.with_arrays(subject.arrays), subject.feeds(subject.arrays)
    network = Interpreter(ir.from_proto(proto)).eval()
    want = execute(spec.engine, proto, inputs)
    with torch.no_grad():
        got = network(inputs)
    for name, array in want.items():
        have = to_numpy(got[name]).astype(array.dtype)
        limit = max(subject.tolerance.relative, STEPS if spec.operator.startswith("QLinear") else 0)
        assert difference(array, have) <= limit, name


@pytest.mark.parametrize("name", RUNNABLE)
def test_models_agree_with_the_runtime(name: str) -> None:
    proto = BUILT[name].build()
    inputs = feeds(proto)
    got = computed(Interpreter(load(proto)).eval(), inputs)
    for key, want in runtime(proto, inputs).items():
        assert difference(want, got[key]) <= min(BUILT[name].tolerance, 1e-3)


def arrays_of(model: Recorded) -> dict[str, Array]:
    file = model.path.with_suffix(".npz")
    if not file.is_file():
        pytest.skip(f"no recorded inputs for {model.name}")
    with np.load(file) as stored:
        return {key[3:]: stored[key] for key in stored.files if key.startswith("in:")}


HALF = 4e-3
NOT_HERE = {
    "skl_logreg": "LinearClassifier",
    "skl_pipe_mlp": "Scaler",
    "tf_grouped_jitcompile_known_bad_keras": "Stateful",
}
MODELS = recorded() or [pytest.param(None, marks=pytest.mark.skip(MISSING))]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name if m else "none")
def test_recorded_models_agree_with_the_runtime(model: Recorded) -> None:
    graph = load(model.path)
    if model.name in NOT_HERE:
        with pytest.raises(UnsupportedModelError, match=NOT_HERE[model.name]):
            Interpreter(graph)
        return
    inputs = arrays_of(model)
    try:
        want = runtime(model.path, inputs)
    except RuntimeFailure:
        pytest.skip("ONNX Runtime does not run it")
    got = computed(Interpreter(graph).eval(), inputs)
    half = any(
        v.const_value is not None and v.const_value.dtype == ir.DataType.FLOAT16
        for v in graph.model.graph.initializers.values()
    )
    for key, array in want.items():
        assert difference(array, got[key]) <= (HALF if half else 1e-4), key


TRAINED = [m for m in trained() if m.path.stat().st_size < 6 << 20]


@pytest.mark.parametrize(
    "model", TRAINED or [pytest.param(None, marks=pytest.mark.skip(MISSING))], ids=lambda m: m.name if m else "none"
)
def test_trained_models_agree_with_the_runtime(model: Recorded) -> None:
    graph = load(model.path)
    rng = np.random.default_rng(0)
    inputs = {}
    for value in graph.model.graph.inputs:
        if value.const_value is not None:
            continue
        dims = list(value.shape or ())
        shape = [d if isinstance(d, int) else 64 if k > 1 and len(dims) == 4 else 2 for k, d in enumerate(dims)]
        kind = value.dtype.numpy() if value.dtype else np.float32
        inputs[value.name] = (rng.integers(1, 9, shape) if np.dtype(kind).kind == "i" else rng.random(shape)).astype(
            kind
        )
    try:
        want = runtime(model.path, inputs)
    except RuntimeFailure:
        pytest.skip("ONNX Runtime does not run it on random inputs")
    got = computed(Interpreter(graph).eval(), inputs)
    for key, array in want.items():  # the runtime's Sigmoid is exact to 1e-7 of its range, not of tiny results
        assert difference(array, got[key]) <= 1e-4 or np.abs(array - got[key]).max() <= 1e-6, key


def test_every_operator_with_a_rule_is_here() -> None:
    missing = {f"{d}::{n}" for (d, n) in rules.table() if (d, n) not in table()}
    assert missing == set()


def test_the_document_is_true() -> None:
    path = Path(__file__).parents[1] / "docs" / "interpreter.md"
    assert path.read_text(encoding="utf-8") == markdown(), "run: python -m spa.interpreter > docs/interpreter.md"


# -- parameters ------------------------------------------------------------------------------------------------------


def network_of(name: str) -> tuple[onnx.ModelProto, Interpreter]:
    proto = BUILT[name].build()
    return proto, Interpreter(load(proto)).eval()


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "decoder", "lstm_tagger", "half", "scan", "loop"])
def test_trained_weights_fit_the_model(name: str) -> None:
    """Parameters are changed, handed back by name, written into the file: ONNX Runtime computes the same."""
    proto, network = network_of(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.weights.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    found = network.trained()
    assert found
    tensors = {t.name: t for t in proto.graph.initializer}
    for key, array in found.items():
        assert array.dtype == numpy_helper.to_array(tensors[key]).dtype
        tensors[key].CopyFrom(numpy_helper.from_array(array, key))
    inputs = feeds(proto)
    got = computed(network, inputs)
    for key, want in runtime(proto, inputs).items():
        assert difference(want, got[key]) <= BUILT[name].tolerance * 2


def test_what_is_a_parameter() -> None:
    net = Net(opset=17)
    x = net.input("x", "n", 4)
    x = net("Mul", x, net.value("half", 0.5))
    x = net("Add", x, net.value("mask", [0.0, 0.0, 0.0, -3e38]))
    x = net("Add", x, net.weight("bias", 4))
    x = net("PRelu", x, net.positive("slope", 1))
    net.named(net("Clip", x, net.value("low", -9.0), net.value("high", 9.0)), "y")
    model = load(net.model(y=("n", 4)))
    assert set(Interpreter(model).weights) == {"bias", "slope"}
    assert set(Interpreter(model, parameters=["half"]).weights) == {"half"}
    with pytest.raises(UsageError, match="no float initializer 'other'"):
        Interpreter(model, parameters=["other"])


def test_shared_weights_are_one_parameter() -> None:
    _, network = network_of("tied")
    assert [n for n in network.weights if n == "table"] == ["table"]
    network({"ids": np.array([[1, 2, 3, 4, 5, 6]])})["logits"].square().sum().backward()
    gradient = network.weights["table"].grad
    assert gradient is not None
    assert (gradient != 0).any(1).all()  # rows that are not looked up get theirs from the output projection


def test_untied_vectors() -> None:
    net = Net(opset=17)
    x = net.input("x", "n", 4, 5, 5)
    ones, zeros = net.value("ones", np.ones(4)), net.value("zeros", np.zeros(4))
    for k in range(2):
        x = net("BatchNormalization", x, ones, net("Identity", zeros), zeros, ones, name=f"bn{k}")
    net.named(net("Relu", x), "y")
    graph = load(net.model(y=("n", 4, 5, 5)))
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 4, 5, 5)).astype(np.float32)}
    before = computed(Interpreter(graph).eval(), inputs)["y"]
    with pytest.raises(UsageError, match="untie"):
        Interpreter(graph).train()(inputs)
    assert untie(graph.model) == 6
    network = Interpreter(graph).eval()
    assert len(network.weights) == 4
    assert len(network.statistics) == 4
    assert np.array_equal(computed(network, inputs)["y"], before)


# -- modes -----------------------------------------------------------------------------------------------------------


def norm_model(momentum: float) -> onnx.ModelProto:
    net = Net(opset=17)
    x = net.conv(net.input("x", "n", 3, 6, 6), "c", 3, 5, act=None)
    stats = [net.positive("scale", 5), net.weight("shift", 5), net.weight("mean", 5), net.positive("var", 5)]
    x = net("BatchNormalization", x, *stats, name="bn", epsilon=1e-3, momentum=momentum)
    net.named(net("Relu", x), "y")
    return net.model(y=("n", 5, 6, 6))


def test_train_mode_is_that_of_torch() -> None:
    """BatchNormalization: outputs, gradients and statistics of three steps."""
    proto = norm_model(0.7)
    ours = Interpreter(load(proto)).train()
    conv, norm = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    weights, stats = ours.weights, ours.statistics
    pairs = {"c.weight": conv.weight, "c.bias": conv.bias, "scale": norm.weight, "shift": norm.bias}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(weights[name])
        norm.running_mean.copy_(stats["mean"])
        norm.running_var.copy_(stats["var"])
    theirs = torch.nn.Sequential(conv, norm, torch.nn.ReLU()).train()
    mine = torch.optim.SGD(ours.parameters(), 0.05)
    other = torch.optim.SGD(theirs.parameters(), 0.05)
    torch.manual_seed(0)
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        y, z = ours({"x": x})["y"], theirs(x)
        assert torch.allclose(y, z, atol=1e-6)
        for optimiser, out in ((mine, y), (other, z)):
            optimiser.zero_grad()
            out.square().mean().backward()
            optimiser.step()
    for name, parameter in pairs.items():
        assert torch.allclose(ours.weights[name], parameter, atol=1e-6)
    assert torch.allclose(ours.statistics["mean"], norm.running_mean, atol=1e-6)
    assert torch.allclose(ours.statistics["var"], norm.running_var, atol=1e-6)
    assert torch.allclose(ours.eval()({"x": x})["y"], theirs.eval()(x), atol=1e-6)
    assert set(ours.trained()) == {*pairs, "mean", "var"}


def test_checkpointing_changes_nothing_in_train_mode() -> None:
    results = []
    for segments in (0, 3):
        proto, network = network_of("residual_cnn")
        network.train().segments = segments
        loss = network({k: torch.from_numpy(v) for k, v in feeds(proto).items()})["logits"].square().sum()
        network.eval()  # what is computed again is computed as it was
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in network.weights.values()), *network.statistics.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_keeps_less() -> None:
    proto, network = network_of("residual_cnn")
    kept = []
    for segments in (0, 4):
        network.segments = segments
        seen: set[int] = set()
        total = 0

        def keep(x: Any, seen: set[int] = seen) -> Any:
            nonlocal total
            if x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            network(feeds(proto, dims={"n": 16, "t": 6}))
        kept.append(total)
    assert kept[1] < kept[0] / 2


def test_mixed_precision_trains_statistics() -> None:
    """Under autocast activations are halves and statistics are not."""
    network = Interpreter(load(norm_model(0.9))).train()
    before = network.statistics["mean"].clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network({"x": torch.ones(2, 3, 6, 6)})["y"]
    assert y.dtype == torch.bfloat16
    assert network.statistics["mean"].dtype == torch.float32
    assert not torch.equal(network.statistics["mean"], before)


def test_copies_are_independent() -> None:
    """As an average of weights over time needs them."""
    proto, network = network_of("residual_cnn")
    network.to(torch.float64).segments = 2
    inputs = feeds(proto)
    twin = copy.deepcopy(network)
    want = network(inputs)["logits"]
    assert torch.equal(twin(inputs)["logits"], want)
    assert (twin.segments, twin.training) == (2, False)
    with torch.no_grad():
        twin.weights["head.bias"].add_(1)
    twin.train()(inputs)
    assert torch.equal(network(inputs)["logits"], want)


def test_dropout_drops_in_train_mode() -> None:
    net = Net(opset=17)
    net.named(net("Dropout", net.input("x", "n", 400), net.value("ratio", 0.25)), "y")
    network = Interpreter(load(net.model(y=("n", 400))))
    x = torch.ones(5, 400)
    assert torch.equal(network.eval()({"x": x})["y"], x)
    torch.manual_seed(0)
    y = network.train()({"x": x})["y"]
    assert sorted(set(y.unique().tolist())) == [0.0, pytest.approx(1 / 0.75)]
    assert 0.2 < float((y == 0).float().mean()) < 0.3


# -- types, devices, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "decoder", "lstm_tagger", "group_norm", "half"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-2), (torch.bfloat16, 0.15), (torch.float16, 0.05)], ids=str
)
def test_other_types(name: str, dtype: Any, tolerance: float) -> None:
    proto, network = network_of(name)
    inputs = feeds(proto)
    want = computed(network, inputs)
    network.to(dtype)
    out = network(inputs)
    for key, array in want.items():
        assert out[key].dtype == dtype
        gap = np.abs(out[key].detach().double().numpy() - array.astype(np.float64)).max()
        assert gap <= tolerance * max(1.0, float(np.abs(array.astype(np.float64)).max()))
    sum(v.float().square().sum() for v in out.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.weights.values() if p.grad is not None)
    assert all(
        network.trained()[k].dtype == numpy_helper.to_array(t).dtype
        for t in proto.graph.initializer
        if (k := t.name) in network.weights
    )


WAITING = {"branches", "homonyms", "loop_script_ts"}
"""Their control flow depends on data."""


def every_model() -> Iterator[Any]:
    for name in RUNNABLE:
        if name not in WAITING:
            yield pytest.param(lambda n=name: (b := BUILT[n].build(), feeds(b)), id=name)
    for model in recorded():
        if model.name not in NOT_HERE and model.name not in WAITING:
            yield pytest.param(lambda m=model: (m.path, arrays_of(m)), id=model.name)


@pytest.mark.parametrize("make", list(every_model()))
def test_nothing_waits_for_the_device(make: Any) -> None:
    """On a device without data every value that is read, or met on the wrong side, is an error."""
    source, inputs = make()
    network = Interpreter(load(source)).eval()
    assert not [step for step in network._compiler.main.steps if step.kernel is to_host]
    with torch.no_grad():
        want = network(inputs)
        got = network.to("meta")(inputs)
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", RUNNABLE)
def test_on_cuda(name: str) -> None:
    proto, network = network_of(name)
    inputs = feeds(proto)
    want = computed(network, inputs)
    got = computed(network.to("cuda"), inputs)
    assert all(difference(want[key], got[key]) <= max(1e-3, BUILT[name].tolerance) for key in want)


def test_values_are_let_go() -> None:
    """Every value but outputs, parameters and constants is freed once, after its last use."""
    _, network = network_of("vit_split")
    plan = network._plan(("logits",), ())
    freed = [slot for _, frees in plan.steps for slot in frees]
    written = [slot for step, _ in plan.steps for slot in step.writes if slot]
    assert len(freed) == len(set(freed))
    assert set(written) - set(plan.outputs) <= set(freed)


# -- asking ----------------------------------------------------------------------------------------------------------


def test_intermediate_values() -> None:
    """They are those that ONNX Runtime gives when the value is made an output; the rest is not computed."""
    proto, network = network_of("residual_cnn")
    inputs = feeds(proto)
    name = proto.graph.node[3].output[0]
    more = onnx.ModelProto()
    more.CopyFrom(proto)
    more.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    got = network(inputs, [name])
    assert list(got) == [name]
    assert difference(runtime(more, inputs)[name], to_numpy(got[name])) < 1e-5
    assert len(network._plan((name,), ()).steps) < len(network._plan(("logits",), ()).steps) / 2
    assert torch.equal(network(inputs, ["stem.bn.mean"])["stem.bn.mean"], network.statistics["stem.bn.mean"])


def test_mistakes_are_named() -> None:
    proto, network = network_of("residual_cnn")
    inputs = feeds(proto)
    with pytest.raises(UsageError, match="input 'image' is not fed"):
        network({})
    with pytest.raises(UsageError, match="no input 'pixels'"):
        network({**inputs, "pixels": inputs["image"]})
    with pytest.raises(UsageError, match="no value 'nothing'"):
        network(inputs, ["nothing"])
    with pytest.raises(RuntimeFailure, match=r"node 'stem' \(Conv\) cannot be computed"):
        network({"image": np.zeros((1, 4, 12, 12), np.float32)})


def test_unsupported_nodes_are_named_before_anything_runs() -> None:
    proto = BUILT["custom"].build()
    with pytest.raises(UnsupportedModelError, match=r"node 'mystery' \(org.example.custom::Mystery\) of opset 1"):
        Interpreter(load(proto))
    listed = {(s.domain, s.operator): s for s in supported(load(proto))}
    assert not listed["org.example.custom", "Mystery"].ok
    assert all(s.ok for key, s in listed.items() if key[0] == "")


WITHOUT = """
import sys
sys.modules["torch"] = None
import spa
try:
    import spa.interpreter
except spa.UsageError as error:
    print(error)
"""


def test_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert "pip install 'spa-prune[torch]'" in done.stdout, done.stderr
