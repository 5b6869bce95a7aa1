"""Layer-wise relevance propagation against rules written by hand on the matrices of small networks, and its laws."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from spa.calibration import load_calibration
from spa.criteria import CRITERIA
from spa.evidence import Evidence
from spa.gradients import Gradients
from spa.graph import load
from spa.groups import analyze_model
from tests.models import BUILT
from tests.net import Net, feeds
from tests.trained import images, trained

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from spa.interpreter import Gates, Interpreter  # noqa: E402
from spa.interpreter.propagation import Rule, Rules  # noqa: E402
from spa.interpreter.relevance import Propagation, gate_relevance, start  # noqa: E402
from spa.interpreter.statistics import Task  # noqa: E402

Array = np.ndarray[Any, Any]
NAMES: tuple[Literal["epsilon", "z+", "alpha-beta", "gamma"], ...] = ("epsilon", "z+", "alpha-beta", "gamma")


# -- by hand ---------------------------------------------------------------------------------------------------------


def back(rule: Rule, x: Array, matrix: Array, bias: Array, relevance: Array) -> Array:
    """Relevance of the inputs of y = matrix x + bias, from the textbook formulas, for one sample."""
    z = matrix * x  # [outputs, inputs]
    y = z.sum(1) + bias
    high, low = np.maximum(z, 0), np.minimum(z, 0)

    def share(parts: Array, total: Array) -> Array:
        safe = np.where(total == 0, 1, total)
        return np.where(total == 0, 0, relevance / safe) @ parts

    if rule.name == "epsilon":
        return share(z, y + rule.epsilon * np.where(y >= 0, 1, -1))
    if rule.name == "z+":
        return share(high, high.sum(1))
    if rule.name == "alpha-beta":
        return rule.alpha * share(high, high.sum(1)) + (1 - rule.alpha) * share(low, low.sum(1))
    own = z + rule.gamma * np.where((y > 0)[:, None], high, low)
    return share(own, own.sum(1) + bias)


def dense_of(weight: Array, size: int, stride: int) -> Array:
    """A convolution with 3 x 3 kernels and padding 1 as a matrix [c_out * s' * s', c_in * s * s], by its definition."""
    out, channels = weight.shape[:2]
    small = (size + 2 - 3) // stride + 1
    matrix = np.zeros((out, small, small, channels, size, size))
    for i, j, a, b in np.ndindex(small, small, 3, 3):
        row, column = i * stride + a - 1, j * stride + b - 1
        if 0 <= row < size and 0 <= column < size:
            matrix[:, i, j, :, row, column] = weight[:, :, a, b]
    return matrix.reshape(out * small * small, channels * size * size)


def tensors(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def mlp(bias: bool = True) -> onnx.ModelProto:
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 5), "a", 5, 8))
    x = net("Relu", net.gemm(x, "b", 8, 7))
    net.named(net.gemm(x, "c", 7, 4), "logits")
    if not bias:
        net.weights.update({n: 0 * a for n, a in net.weights.items() if n.endswith("bias")})
    return net.model(logits=("n", 4))


def cnn(norm: bool = False) -> onnx.ModelProto:
    """Two convolutions (the second reads negative numbers, too), flattened."""
    net = Net()
    x = net.conv(net.input("x", "n", 2, 6, 6), "a", 2, 4, act="Relu", norm=norm)
    x = net.conv(x, "b", 4, 3, act=None, stride=2)
    x = net.conv(x, "c", 3, 3, act="Relu")
    x = net.reshape(x, -1, 27)
    net.named(net.gemm(x, "d", 27, 4), "logits")
    return net.model(logits=("n", 4))


def relevance(model: onnx.ModelProto, x: Array, y: Array | None = None, rules: Rules | None = None) -> dict[str, Array]:
    analysis = spa.analyze(model)
    given = {"x": x} if y is None else {"x": x, "labels": y}
    data = load_calibration(given, load(model).model)
    found = gate_relevance(Task(analysis, analysis.groups, data, batch=4), rules)
    return {name.partition(":")[0]: rows for name, rows in found.items()}


def explained(logits: Array, y: Array | None) -> tuple[int, float]:
    k = int(np.argmax(logits)) if y is None else int(y)
    return k, float(logits[k])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_mlp_by_hand(name: Any, labelled: bool) -> None:
    rule = Rule(name)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 4, 9)
    w = tensors(mlp())
    found = relevance(mlp(), x, y if labelled else None, Rules(dense=rule))
    for n in range(9):
        one = np.maximum(w["a.weight"] @ x[n] + w["a.bias"], 0)
        two = np.maximum(w["b.weight"] @ one + w["b.bias"], 0)
        logits = w["c.weight"] @ two + w["c.bias"]
        k, score = explained(logits, y[n] if labelled else None)
        first = np.zeros(4)
        first[k] = score
        r2 = back(rule, two, w["c.weight"], w["c.bias"], first)
        r1 = back(rule, one, w["b.weight"], w["b.bias"], r2)
        np.testing.assert_allclose(found["b"][n], r2, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["a"][n], r1, rtol=1e-3, atol=1e-4)
    assert min(np.abs(r).max() for r in found.values()) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_cnn_by_hand(name: Any) -> None:
    rule = Rule(name)
    x = np.random.default_rng(1).normal(size=(5, 2, 6, 6)).astype(np.float32)
    w = tensors(cnn())
    sizes = {"a": (6, 1), "b": (6, 2), "c": (3, 1)}
    matrices = {n: dense_of(w[f"{n}.weight"], *s) for n, s in sizes.items()}
    biases = {n: np.repeat(w[f"{n}.bias"], len(m) // len(w[f"{n}.bias"])) for n, m in matrices.items()}
    found = relevance(cnn(), x, None, Rules(convolution=rule))
    for n in range(5):
        a = np.maximum(matrices["a"] @ x[n].reshape(-1) + biases["a"], 0)
        b = matrices["b"] @ a + biases["b"]
        c = np.maximum(matrices["c"] @ b + biases["c"], 0)
        logits = w["d.weight"] @ c + w["d.bias"]
        k, score = explained(logits, None)
        first = np.zeros(4)
        first[k] = score
        rc = back(Rule(), c, w["d.weight"], w["d.bias"], first)
        rb = back(rule, b, matrices["c"], biases["c"], rc)
        ra = back(rule, a, matrices["b"], biases["b"], rb)
        for name_, r, count in (("a", ra, 4), ("b", rb, 3), ("c", rc, 3)):
            np.testing.assert_allclose(found[name_][n], r.reshape(count, -1).sum(1), rtol=2e-3, atol=2e-4)


def test_a_batch_normalisation_behind_a_convolution_is_merged() -> None:
    """As if the file had it folded into the weights: negative scales turn what counts as positive."""
    net = Net()
    x = net.conv(net.input("x", "n", 2, 6, 6), "a", 2, 4)
    x = net.conv(x, "b", 4, 3, norm=True)
    net.named(net.gemm(net.reshape(x, -1, 108), "d", 108, 4), "logits")
    net.weights["b.bn.scale"][1] *= -1
    model = net.model(logits=("n", 4))
    w = net.weights
    factor = w["b.bn.scale"] / np.sqrt(w["b.bn.var"] + 1e-5)
    folded = Net()
    x = folded.conv(folded.input("x", "n", 2, 6, 6), "a", 2, 4)
    x = folded.conv(x, "b", 4, 3)
    folded.named(folded.gemm(folded.reshape(x, -1, 108), "d", 108, 4), "logits")
    folded.weights["b.weight"] = w["b.weight"] * factor[:, None, None, None]
    folded.weights["b.bias"] = (w["b.bias"] - w["b.bn.mean"]) * factor + w["b.bn.bias"]
    x = np.random.default_rng(1).normal(size=(5, 2, 6, 6)).astype(np.float32)
    for name in NAMES:
        rules = Rules(convolution=Rule(name))
        have, want = relevance(model, x, None, rules), relevance(folded.model(logits=("n", 4)), x, None, rules)
        for key in ("a", "b"):
            np.testing.assert_allclose(have[key], want[key], rtol=1e-3, atol=1e-4)


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_relevance_is_conserved(name: Any) -> None:
    """Without biases all relevance of the class comes through each layer. A sample whose layer is dead has none."""
    model = mlp(bias=False)
    x = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32)
    session = Interpreter(load(model)).eval()
    with torch.no_grad():
        logits = session({"x": x})["logits"].numpy()
    found = relevance(model, x, None, Rules(dense=Rule(name, epsilon=1e-9)))
    if name == "alpha-beta":  # only where there is something negative to take the other share
        assert found["b"].sum() == pytest.approx(logits.max(1).sum(), rel=1.0)
        return
    for group in ("a", "b"):
        np.testing.assert_allclose(found[group].sum(1), logits.max(1), rtol=1e-4, atol=1e-5)


GATED = ["vit_split", "decoder", "fused_bert", "swin", "modern", "group_norm", "unet", "four_bits", "qdq", "experts"]


@pytest.mark.parametrize("name", GATED)
def test_what_the_network_computes_stays(name: str) -> None:
    """Only derivatives are others: and all of them are finite."""
    model = BUILT[name].build()
    graph = load(model)
    fed = feeds(model)
    gates = Gates(analyze_model(graph.model), dtype=torch.float64)
    changed, plain = (kind(graph).double().eval() for kind in (Propagation, Interpreter))
    have, want = changed(fed, gates=gates), plain(fed)
    for key, value in want.items():
        torch.testing.assert_close(have[key], value, rtol=1e-9, atol=1e-9, check_dtype=False)
    total = start(changed(fed, changed.explained(), gates), None).sum()
    grads = torch.autograd.grad(total, list(gates.vectors.values()), allow_unused=True)
    found = [g for g in grads if g is not None]
    assert found
    assert all(bool(torch.isfinite(g).all()) for g in found)


ACTIVATIONS = ["Relu", "Tanh", "Gelu", "Silu", "TanhGelu", "HardSwish", "Mish", "Clip"]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_pass_all_relevance_on(act: str) -> None:
    """Also where an exporter spells them out as products: x Sigmoid(x), x (1 + Erf(x / sqrt 2)) / 2 ..."""

    def spelled(net: Net, x: str) -> str:
        if act == "Silu":
            return str(net("Mul", x, net("Sigmoid", x)))
        if act == "Gelu":
            return net.gelu(x)
        if act == "Mish":
            return str(net("Mul", x, net("Tanh", net("Softplus", x))))
        if act == "TanhGelu":
            cube = net("Mul", net("Pow", x, net.value("three", 3.0)), net.value("k", 0.044715))
            inner = net("Mul", net("Add", x, cube), net.value("root", 0.7978845608))
            return str(
                net("Mul", net("Mul", x, net.value("half", 0.5)), net("Add", net("Tanh", inner), net.value("one", 1.0)))
            )
        if act == "Clip":
            return str(net("Clip", x, net.value("low", 0.0), net.value("high", 6.0)))
        return str(net(act, x))

    def build(net: Net) -> None:
        x = net("Gemm", net.input("x", "n", 5), net.weight("a.weight", 8, 5), transB=1)
        x = spelled(net, x)
        x = spelled(net, net("Gemm", x, net.weight("b.weight", 8, 8), transB=1))
        net.named(net("Gemm", x, net.weight("c.weight", 1, 8), transB=1), "y")

    net = Net(opset=20)
    build(net)
    x = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
    model = net.model(y=("n", 1))
    found = relevance(model, x, None, Rules(dense=Rule(epsilon=1e-9)))
    with torch.no_grad():
        want = Interpreter(load(model)).eval()({"x": x})["y"].abs().sum(1).numpy()
    assert len(found) == 2
    for rows in found.values():
        np.testing.assert_allclose(rows.sum(1), want, rtol=1e-3, atol=1e-4)


def test_factors_have_half_each() -> None:
    net = Net()
    x = net("Gemm", net.input("x", "n", 5), net.weight("up.weight", 8, 5), transB=1, name="up")
    gate = net("Tanh", net("Gemm", "x", net.weight("gate.weight", 8, 5), transB=1))
    net.named(net("Gemm", net("Mul", x, gate), net.weight("c.weight", 1, 8), transB=1), "y")
    rows, want = explained_by(net, "up")
    np.testing.assert_allclose(rows.sum(1), want, rtol=1e-3)


def test_attention_has_half_for_values_and_a_quarter_for_queries() -> None:
    """By hand: the gate of the query dims has a quarter of the scores' gradient times activation."""
    from tests.small_models import attention

    model = attention()
    graph = load(model)
    analysis = analyze_model(graph.model)
    gates = Gates(analysis, dtype=torch.float64)
    x = np.random.default_rng(0).normal(size=(2, 3, 32))
    found = {}
    for kind in (Propagation, Interpreter):
        network = kind(graph).double().eval()
        outputs = network({"x": x}, gates=gates)
        total = sum(y.square().sum() for y in outputs.values())
        grads = torch.autograd.grad(total, list(gates.vectors.values()), allow_unused=True)
        found[kind] = {n: g for n, g in zip(gates.vectors, grads, strict=True) if g is not None}
    query = next(g for g in analysis.groups if g.kind == "qk-dim").name
    value = next(g for g in analysis.groups if g.kind == "v-dim").name
    assert set(found[Propagation]) >= {query, value}
    torch.testing.assert_close(found[Propagation][query], found[Interpreter][query] / 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[Propagation][value], found[Interpreter][value], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divided", [True, False])
def test_a_norm_written_as_several_operators(divided: bool) -> None:
    """The root mean square scales, as one over it does."""
    net = Net()
    x = net("Relu", net("Gemm", net.input("x", "n", 5), net.weight("a.weight", 8, 5), transB=1, name="a"))
    x = net("MatMul", x, net.weight("b.weight", 8, 6))
    root = net("Sqrt", net("Add", net("ReduceMean", net("Mul", x, x), axes=[1]), net.value("eps", 1e-6)))
    x = net("Div", x, root) if divided else net("Mul", net("Reciprocal", root), x)
    net.named(net("MatMul", x, net.weight("c.weight", 6, 1)), "y")
    rows, want = explained_by(net, "a")
    np.testing.assert_allclose(rows.sum(1), want, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"]
)
def test_a_norm_in_one_operator(name: str) -> None:
    """With a mean it is linear in what it centres: all relevance but the bias's comes through."""
    net = Net(opset=23)
    x = net("Relu", net("Gemm", net.input("x", "n", 5), net.weight("a.weight", 8, 5), transB=1, name="a"))
    x = net("MatMul", x, net.weight("b.weight", 8, 12))
    shape = {"LayerNormalization": (12,), "RMSNormalization": (12,)}.get(name, (4,))
    more = {"GroupNormalization": {"num_groups": 2}}.get(name, {})
    if shape == (4,):
        x = net.reshape(x, -1, 4, 3)
    bias = [] if name == "RMSNormalization" else [net.value("shift", np.zeros(shape))]
    x = net(name, x, net.positive("scale", *shape), *bias, **more)
    if shape == (4,):
        x = net.reshape(x, -1, 12)
    net.named(net("MatMul", x, net.weight("c.weight", 12, 1)), "y")
    rows, want = explained_by(net, "a")
    np.testing.assert_allclose(rows.sum(1), want, rtol=1e-3, atol=1e-4)


def explained_by(net: Net, group: str) -> tuple[Array, Array]:
    """Relevance of the units of a group [n, units], and the magnitude of the outputs that is explained."""
    model = net.model(y=("n", 1))
    x = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
    rows = relevance(model, x, None, Rules(dense=Rule(epsilon=1e-9)))[group]
    with torch.no_grad():
        return rows, Interpreter(load(model)).eval()({"x": x})["y"].abs().sum(1).numpy()


# -- as a criterion --------------------------------------------------------------------------------------------------


def test_scores_are_mean_magnitudes() -> None:
    x, y = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32), np.arange(9) % 4
    analysis = spa.analyze(mlp())
    data = load_calibration({"x": x, "labels": y}, load(mlp()).model)
    evidence = Evidence(analysis, derivatives=Gradients(analysis, analysis.groups, data))
    rows = relevance(mlp(), x, y)
    for group in analysis.groups:
        want = np.abs(rows[group.name[0]]).mean(0)
        np.testing.assert_allclose(CRITERIA["lrp"].score(group, evidence), want, rtol=1e-5)
    other = relevance(mlp(), x, None)
    assert any(np.abs(rows[k] - other[k]).max() > 1e-2 for k in rows), "labels must matter"


def test_disconnected_units_have_none_and_leave_first() -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        if tensor.name == "c.weight":  # nobody reads units 2 and 5 of b
            array = numpy_helper.to_array(tensor).copy()
            array[:, [2, 5]] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, "c.weight"))
        if tensor.name == "a.bias":  # unit 1 of a is never active
            array = numpy_helper.to_array(tensor).copy()
            array[1] = -100
            tensor.CopyFrom(numpy_helper.from_array(array, "a.bias"))
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    found = relevance(model, x)
    assert not found["b"][:, [2, 5]].any()
    assert not found["a"][:, 1].any()
    assert np.count_nonzero(np.abs(found["b"]).mean(0)) >= 4
    assert np.count_nonzero(np.abs(found["a"]).mean(0)) >= 6
    result = spa.prune(model, target="macs=0.75", criterion="lrp", calibration=x, align=1, normalisation="mean")
    removed = {g.name[0]: g.removed for g in result.plan.groups}
    for name, gone in removed.items():
        dead = set(np.flatnonzero(~found[name].any(0)).tolist())
        assert dead <= set(gone) or set(gone) <= dead


def test_a_softmax_at_the_end_is_not_explained() -> None:
    bare = mlp()
    ended = mlp()
    node = onnx.helper.make_node("Softmax", ["logits"], ["shares"], axis=-1)
    ended.graph.node.append(node)
    del ended.graph.output[:]
    ended.graph.output.append(onnx.helper.make_tensor_value_info("shares", 1, ["n", 4]))
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    have, want = relevance(ended, x), relevance(bare, x)
    for key, rows in want.items():
        np.testing.assert_allclose(have[key], rows, rtol=1e-5)


def test_better_than_chance_on_a_trained_network() -> None:
    """On the CNN of the examples, cut so far that random choices ruin it (the small ViT hardly notices them)."""
    import onnxruntime as ort

    from examples import digits

    _, unseen, _, right = digits.data()

    def accuracy(model: Any) -> float:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return float((session.run(["logits"], {"image": unseen})[0].argmax(1) == right).mean())

    how: dict[str, Any] = {"target": "macs=0.7", "calibration": {"image": images(64)}, "normalisation": "mean"}
    mine = accuracy(spa.prune(trained("cnn"), criterion="lrp", **how).model)
    chance = np.mean([accuracy(spa.prune(trained("cnn"), criterion="random", seed=s, **how).model) for s in range(5)])
    assert chance < 0.5 * accuracy(trained("cnn"))
    assert mine > chance
