"""Sparsity while training: the proximal operator by hand, what shrinks and what keeps, and what pruning then costs."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import spa  # noqa: E402
from spa.errors import PlanError, UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.interpreter import Interpreter  # noqa: E402
from spa.train.settings import settled  # noqa: E402
from spa.train.sparsity import Penalised, Shrinkage, penalised  # noqa: E402
from tests.command_line import Ran  # noqa: E402
from tests.net import Net  # noqa: E402
from tests.test_finetune import SETTINGS  # noqa: E402

Array = np.ndarray[Any, Any]
TARGET = "params=0.4"
HIDDEN = 48


def untrained() -> onnx.ModelProto:
    """Two hidden layers, the second residual, on 64 pixels."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 64), "a", 64, HIDDEN))
    x = net("Relu", net("BatchNormalization", net.gemm(x, "b", HIDDEN, HIDDEN), *[
        net.value(f"norm.{k}", numbers) for k, numbers in enumerate((np.ones(HIDDEN), np.zeros(HIDDEN)) * 2)
    ][:2], net.value("norm.mean", np.zeros(HIDDEN)), net.value("norm.var", np.ones(HIDDEN))))  # fmt: skip
    net.named(net.gemm(x, "head", HIDDEN, 10), "logits")
    return net.model(logits=("n", 10))


@functools.cache
def digits() -> tuple[dict[str, Array], Array, Array]:
    pytest.importorskip("sklearn")
    from examples import digits as source

    x, test, y, answers = source.data()
    return {"x": x.reshape(len(x), 64), "labels": y}, test.reshape(len(test), 64), answers


def tuned(model: onnx.ModelProto, epochs: int = 6, **options: Any) -> Any:
    return spa.finetune(model, data=digits()[0], epochs=epochs, lr=0.02, held_out=0, **options)


@functools.cache
def dense() -> onnx.ModelProto:
    model: onnx.ModelProto = tuned(untrained(), epochs=8).model
    return model


def accuracy(model: onnx.ModelProto) -> float:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, x, y = digits()
    return float((session.run(None, {"x": x})[0].argmax(1) == y).mean())


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    result: onnx.ModelProto = spa.prune(model, target=TARGET).model
    return result


def norms(model: onnx.ModelProto) -> dict[str, Array]:
    """||everything of a unit||, by hand: rows of the layer, bias, norm, and columns of the next."""
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    squares = {
        "a": (w["a.weight"] ** 2).sum(1) + w["a.bias"] ** 2 + (w["b.weight"] ** 2).sum(0),
        "b": (w["b.weight"] ** 2).sum(1) + w["b.bias"] ** 2 + w["norm.0"] ** 2 + w["norm.1"] ** 2
        + (w["head.weight"] ** 2).sum(0),
    }  # fmt: skip
    return {name: np.sqrt(total) for name, total in squares.items()}


def removed(plan: Any) -> dict[str, Array]:
    """Per layer which units a plan removes."""
    out = {}
    for name in "ab":
        out[name] = np.zeros(HIDDEN, dtype=bool)
        for part in plan.removed:
            if part.initializer == f"{name}.weight" and part.axis == 0:
                out[name][list(part.indices)] = True
    return out


# -- the operator ----------------------------------------------------------------------------------------------------


def shrinkage(model: onnx.ModelProto, kind: str, strength: float, units: dict[str, list[int]] | None = None) -> Any:
    graph = load(model)
    analysis, found = penalised(graph, None, "", "group-lasso")
    if units is not None:
        chosen = []
        for item in found:
            mine = np.zeros(item.group.units, dtype=bool)
            mine[units.get(item.group.members[0].tensor.split(".")[0], [])] = True
            chosen.append(Penalised(item.group, mine))
        found = chosen
    network = Interpreter(graph)
    settings = settled(**SETTINGS | {"sparsity": kind, "strength": strength, "plan": True})
    return network, Shrinkage(network, analysis, found, settings)


def test_shrinking_is_the_proximal_operator_of_the_group_lasso() -> None:
    model = untrained()
    network, shrink = shrinkage(model, "mask", 0.5, {"a": [3, 7]})
    before = norms(model)["a"]
    shrink(0.4)
    after = onnx.ModelProto()
    after.CopyFrom(model)
    for tensor in after.graph.initializer:
        if tensor.name in network.weights:
            tensor.CopyFrom(numpy_helper.from_array(network.weights[tensor.name].detach().numpy(), tensor.name))
    now = norms(after)
    want = before.copy()
    want[[3, 7]] -= 0.5 * 0.4 * before[[3, 7]]
    np.testing.assert_allclose(now["a"], want, rtol=1e-5)
    old, new = (numpy_helper.to_array(m.graph.initializer[0]) for m in (model, after))
    np.testing.assert_allclose(new[3] / np.linalg.norm(new[3]), old[3] / np.linalg.norm(old[3]), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(new, [3, 7], 0), np.delete(old, [3, 7], 0))
    assert shrink.left() == pytest.approx(0.8, rel=1e-5)
    assert shrink.gone() == (0, 2)
    shrink(5.0)
    assert shrink.gone() == (2, 2)
    assert not network.weights["a.weight"][[3, 7]].any()
    assert not network.weights["b.weight"][:, [3, 7]].any()


@pytest.mark.parametrize("kind", ["group-lasso", "growing", "mask"])
def test_shares_of_all_steps_add_up(kind: str) -> None:
    from spa.train.loop import factor

    _, shrink = shrinkage(untrained(), kind, 1.0)
    settings = settled(**SETTINGS)
    factors = [factor(k, 40, settings) for k in range(40)]
    shares = [shrink.threshold(k, 40, f, sum(factors)) for k, f in enumerate(factors)]
    assert sum(shares) == pytest.approx(1)
    assert (np.diff(shares) > 0).all() == (kind == "growing")


def test_without_a_gradient_masked_units_are_gone_in_the_end() -> None:
    _, shrink = shrinkage(untrained(), "growing", 1.0, {"a": [0], "b": [1, 2]})
    for step in range(25):
        shrink(shrink.threshold(step, 25, 1.0, 25.0))
    assert shrink.left() < 1e-5


def test_small_units_shrink_more_than_large_ones() -> None:
    model = untrained()
    network, shrink = shrinkage(model, "group-lasso", 1.0, {"a": list(range(HIDDEN))})
    before = norms(model)["a"]
    shrink(0.01)
    now = np.sqrt(
        (network.weights["a.weight"] ** 2).sum(1).detach().numpy()
        + network.weights["a.bias"].detach().numpy() ** 2
        + (network.weights["b.weight"] ** 2).sum(0).detach().numpy()
    )
    lost = before - now
    assert (np.diff(lost[np.argsort(before)]) <= 1e-6).all()
    assert lost.max() / lost.min() == pytest.approx(16, rel=0.05)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mask", "growing"])
def test_what_will_go_shrinks_and_the_rest_keeps(kind: str) -> None:
    model = dense()
    plan = spa.prune(model, target=TARGET).plan
    gone = removed(plan)
    assert all(0 < g.sum() < HIDDEN for g in gone.values())
    plain = tuned(model).model
    result = tuned(model, sparsity=kind, plan=plan)
    start, free, shrunk = norms(model), norms(plain), norms(result.model)
    for name in "ab":
        assert shrunk[name][gone[name]].max() < 0.01 * start[name].mean()
        assert shrunk[name][~gone[name]].mean() > 0.8 * free[name][~gone[name]].mean()
    assert result.gone == result.penalised == sum(int(g.sum()) for g in gone.values())
    trace = [e.parts["shrunk"] for e in result.history[1:]]
    assert all(a > b for a, b in itertools.pairwise(trace) if a > 0)
    first, after, without = accuracy(result.model), accuracy(pruned(result.model)), accuracy(pruned(plain))
    assert first > 0.9
    assert after == pytest.approx(first, abs=0.005)  # nothing is lost by pruning
    assert without < accuracy(plain) - 0.1  # where it was not, much is


def test_group_lasso_parts_units_and_pruning_costs_less() -> None:
    model = dense()
    plain, lasso = tuned(model, epochs=8).model, tuned(model, epochs=8, sparsity="group-lasso").model
    for name in "ab":
        free, shrunk = norms(plain)[name], norms(lasso)[name]
        assert shrunk.mean() < 0.9 * free.mean()
        assert shrunk.std() / shrunk.mean() > 1.2 * free.std() / free.mean()
    lost = [accuracy(m) - accuracy(pruned(m)) for m in (plain, lasso)]
    assert accuracy(lasso) > accuracy(model) - 0.03
    assert lost[1] < 0.5 * lost[0]


def test_the_last_epoch_counts() -> None:
    """The held-out metric is best where nothing was shrunk: it does not choose."""
    result = spa.finetune(dense(), data=digits()[0], epochs=3, lr=1e-5, sparsity="group-lasso", patience=1)
    assert result.best_epoch == 3


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": "mask"}, "--plan"),
        ({"sparsity": "lasso"}, "--sparsity"),
        ({"sparsity": "group-lasso", "strength": 0.0}, "--strength"),
        ({"strength": 1.0}, "--strength"),
        ({"sparsity": "group-lasso", "freeze": ["a.*", "b.*", "head.weight", "norm.*"]}, "--freeze"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], text: str) -> None:
    data = {"x": np.random.default_rng(0).random((12, 64), np.float32), "labels": np.arange(12) % 10}
    with pytest.raises(UsageError, match=text) as caught:
        spa.finetune(untrained(), data=data, epochs=1, **options)
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = spa.prune(untrained(), target=TARGET).plan
    with pytest.raises(PlanError, match="another model"):
        tuned(dense(), sparsity="mask", plan=plan)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(dense(), tmp_path / "dense.onnx")
    np.savez(tmp_path / "data.npz", **{k: a[:128] for k, a in digits()[0].items()})
    plan = tmp_path / "plan.json"
    ran = Ran(capsys, "prune", tmp_path / "dense.onnx", "-o", tmp_path / "p.onnx", "--target", TARGET, "--plan", plan)
    assert ran.status == 0
    ran = Ran(capsys, "finetune", tmp_path / "dense.onnx", "-o", tmp_path / "out.onnx", "--data", tmp_path / "data.npz",
              "--sparsity", "mask", "--plan", plan, "--strength", "1.5", "--epochs", "2")  # fmt: skip
    assert ran.status == 0, ran.err
    assert "penalised units are gone" in ran.out
    assert "shrunk" in ran.out
