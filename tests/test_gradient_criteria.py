"""Criteria from derivatives, against ONNX Runtime with units removed, finite differences and torch written by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.calibration import Calibration, load_calibration
from spa.criteria import CRITERIA
from spa.criteria.gates import rearranged, shrunk
from spa.errors import UsageError
from spa.evidence import Evidence
from spa.gradients import Gradients
from spa.graph import load
from spa.groups import Analysis
from tests.net import Net

torch = pytest.importorskip("torch")

Array = np.ndarray
GRADIENT = [c.name for c in CRITERIA.values() if c.needs == "gradients"]


def mlp() -> onnx.ModelProto:
    net = Net()
    x = net("Tanh", net.gemm(net.input("x", "n", 5), "a", 5, 8))
    x = net("Tanh", net.gemm(x, "b", 8, 7))
    net.named(net.gemm(x, "c", 7, 4), "logits")
    return net.model(logits=("n", 4))


def labelled(count: int = 24) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 5)).astype(np.float32), rng.integers(0, 4, count)


def evidence(model: onnx.ModelProto, loss: Any = "auto", count: int = 24) -> tuple[Analysis, Evidence, Calibration]:
    x, y = labelled(count)
    analysis = spa.analyze(model)
    data = load_calibration({"x": x, "labels": y}, load(model).model)
    return analysis, Evidence(analysis, derivatives=Gradients(analysis, analysis.groups, data, loss)), data


def by_hand(model: onnx.ModelProto) -> tuple[dict[str, Any], Any]:
    """The weights as torch tensors, and the losses of all samples with gates on the hidden units."""
    x, y = (torch.from_numpy(a) for a in labelled())
    w = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()).double() for t in model.graph.initializer}
    for t in w.values():
        t.requires_grad_()

    def losses(one: Any, two: Any, temperature: float = 1.0) -> Any:
        h = torch.tanh(x.double() @ w["a.weight"].T + w["a.bias"]) * one
        h = torch.tanh(h @ w["b.weight"].T + w["b.bias"]) * two
        out = (h @ w["c.weight"].T + w["c.bias"]) / temperature
        return torch.nn.functional.cross_entropy(out, y, reduction="none")

    return w, losses


def scores(criterion: str, loss: Any = "auto") -> dict[str, Array]:
    analysis, found, _ = evidence(mlp(), loss)
    return {g.name[0]: CRITERIA[criterion].score(g, found, "sum") for g in analysis.groups}


def test_first_derivatives_of_gates() -> None:
    _, losses = by_hand(mlp())
    gates = [torch.ones(24, n, dtype=torch.float64, requires_grad=True) for n in (8, 7)]
    grads = [g.numpy() for g in torch.autograd.grad(losses(*gates).sum(), gates)]
    for name, g in zip("ab", grads, strict=True):
        np.testing.assert_allclose(scores("taylor")[name], np.abs(g.mean(0)), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(scores("fisher")[name], 0.5 * np.square(g).mean(0), rtol=1e-3, atol=1e-7)
        mean = np.abs(g).mean(0)
        np.testing.assert_allclose(scores("heads")[name], mean / np.linalg.norm(mean), rtol=1e-3)


def test_second_derivatives_of_gates() -> None:
    """The estimate lies within its standard error of the exact diagonal; the criterion is half of it, without noise."""
    _, losses = by_hand(mlp())
    gates = torch.ones(15, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: losses(z[:8], z[8:]).mean(), gates)
    exact = torch.diagonal(hessian).numpy()
    analysis, found, _ = evidence(mlp())
    value, error = (np.concatenate([found.gradients.curvature[g.name][k] for g in analysis.groups]) for k in (0, 1))
    assert (error >= 0).all()
    apart = np.abs(value - exact) / np.maximum(error, 1e-6)
    assert np.mean(apart < 2.5) > 0.8
    for letter, group in zip("ab", analysis.groups, strict=True):
        want = 0.5 * shrunk(*found.gradients.curvature[group.name])
        np.testing.assert_allclose(scores("hap")[letter], want, rtol=1e-6)


def test_curvature_without_labels_is_the_fisher_information() -> None:
    """Labels are not drawn there but taken on average; for first derivatives they are drawn."""
    w, _ = by_hand(mlp())
    x = torch.from_numpy(labelled()[0]).double()

    def logits(gates: Any) -> Any:
        h = torch.tanh(x @ w["a.weight"].T + w["a.bias"]) * gates[:8]
        h = torch.tanh(h @ w["b.weight"].T + w["b.bias"]) * gates[8:]
        return h @ w["c.weight"].T + w["c.bias"]

    one = torch.ones(15, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits, one)  # [n, classes, gates]
    p = torch.softmax(logits(one), 1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("ncg,ncd,ndg->g", jacobian, metric, jacobian).detach().numpy() / len(x)
    analysis, found, _ = evidence(mlp(), "sampled")
    value, error = (np.concatenate([found.gradients.curvature[g.name][k] for g in analysis.groups]) for k in (0, 1))
    apart = np.abs(value - exact) / np.maximum(error, 1e-6)
    assert np.mean(apart < 2.5) > 0.8
    assert (exact > 0).all()
    grads = np.concatenate([found.gradients.gates[g.name] for g in analysis.groups], axis=1)
    assert np.abs(grads).max() > 1e-3


def test_noise_is_taken_from_estimates() -> None:
    """Sums over the units that look least important are right, where those of raw estimates are far too low."""
    rng = np.random.default_rng(0)
    truth = rng.lognormal(0, 0.5, 2000)
    for noise in (0.0, 0.5, 1.0):
        error = np.full(2000, noise)
        raw = truth + rng.normal(0, 1, 2000) * error
        better = shrunk(raw, error)
        lowest = np.argsort(better, kind="stable")[:500]
        assert better[lowest].sum() == pytest.approx(truth[lowest].sum(), rel=0.15)
        if noise:
            gone = np.argsort(raw, kind="stable")[:500]
            assert np.maximum(raw, 0)[gone].sum() < 0.85 * truth[gone].sum()
            assert np.square(better - truth).mean() < np.square(raw - truth).mean()
    np.testing.assert_allclose(shrunk(truth, np.zeros(2000)), truth)
    assert (shrunk(-truth, np.ones(2000)) == 0).all()


def test_units_are_exchanged_by_their_joint_loss() -> None:
    """Never worse than given, often the best of all sets; two units whose derivatives cancel leave together."""
    best, found = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        units = int(rng.integers(3, 9))
        g = rng.normal(size=(30, units)) @ rng.normal(size=(units, units))
        count = int(rng.integers(1, units))
        start = np.argsort(np.square(g).sum(0))[:count]
        better = rearranged(g, start)
        assert len(set(better.tolist())) == count
        losses = {s: float(np.square(g[:, list(s)].sum(1)).sum()) for s in itertools.combinations(range(units), count)}
        mine = losses[tuple(sorted(better.tolist()))]
        assert mine <= losses[tuple(sorted(start.tolist()))] * (1 + 1e-9)
        best.append(min(losses.values()))
        found.append(mine)
    assert np.mean(np.isclose(best, found)) > 0.7
    g = np.array([[1.0, -1.0, 0.9, 0.9], [2.0, -2.0, 1.8, 1.8]])
    assert rearranged(g, np.array([2, 3])).tolist() == [0, 1]


@pytest.mark.parametrize("criterion", ["snip", "taylor-weights", "crop", "grasp", "taylor-filters"])
def test_derivatives_of_weights(criterion: str) -> None:
    """Summed over the rows and biases of the layer that makes a unit, and the columns of the one that reads it.

    `taylor-filters` looks at the rows alone.
    """
    w, losses = by_hand(mlp())
    names = list(w)
    total = losses(1.0, 1.0, 200.0 if criterion == "grasp" else 1.0).mean()
    g = dict(zip(names, torch.autograd.grad(total, [w[n] for n in names], create_graph=True), strict=True))
    if criterion in ("crop", "grasp"):
        inner = sum((g[n] * g[n].detach()).sum() for n in names)
        g = dict(zip(names, torch.autograd.grad(inner, [w[n] for n in names]), strict=True))
    s = {n: (w[n] * g[n]).detach().numpy() for n in names}
    s = s if criterion == "grasp" else {n: np.abs(a) for n, a in s.items()}
    for name, reader in (("a", "b"), ("b", "c")):
        want = s[f"{name}.weight"].sum(1)
        if criterion != "taylor-filters":
            want = want + s[f"{name}.bias"] + s[f"{reader}.weight"].sum(0)
        np.testing.assert_allclose(scores(criterion)[name], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_synaptic_flow() -> None:
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 5), "a", 5, 8))
    net.named(net.gemm(x, "b", 8, 4), "y")
    model = net.model(y=("n", 4))
    w = {t.name: np.abs(onnx.numpy_helper.to_array(t).astype(np.float64)) for t in model.graph.initializer}
    hidden = w["a.weight"].sum(1) + w["a.bias"]
    want = hidden * w["b.weight"].sum(0)  # what flows through a unit, once per weight set that it passes
    analysis, found, _ = evidence(model)
    (group,) = analysis.groups
    np.testing.assert_allclose(CRITERIA["synflow"].score(group, found, "sum"), 2 * want, rtol=1e-5)


def test_traces_of_the_hessian_over_slices() -> None:
    w, losses = by_hand(mlp())
    names = ["a.weight", "b.weight"]
    total = losses(1.0, 1.0).mean()
    grads = torch.autograd.grad(total, [w[n] for n in names], create_graph=True)
    for name, grad, letter in zip(names, grads, "ab", strict=True):
        rows = []
        for k in range(len(grad)):
            diagonal = [
                torch.autograd.grad(grad[k, j], w[name], retain_graph=True)[0][k, j].item()
                for j in range(grad.shape[1])
            ]
            rows.append(sum(diagonal))
        _, found, _ = evidence(mlp())
        value, error = found.gradients.traces({"a.weight": 0, "b.weight": 0})[name]
        assert np.mean(np.abs(value - rows) < 2.5 * error + 1e-6) > 0.7
        size = w[name].shape[1]
        want = 0.5 * np.maximum(value, 0) / size * np.square(w[name].detach().numpy()).sum(1)
        np.testing.assert_allclose(scores("hap-weights")[letter], want, rtol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "sampled", "gaussian"])
@pytest.mark.parametrize("criterion", GRADIENT)
def test_every_criterion_with_every_loss(criterion: str, loss: str) -> None:
    x, y = labelled()
    result = spa.prune(mlp(), target="macs=0.7", criterion=criterion, loss=loss, calibration={"x": x, "labels": y})
    assert result.report.macs.after <= 0.7 * result.report.macs.before


def test_a_loss_of_ones_own() -> None:
    """It gets outputs, inputs and labels by name."""
    seen: set[str] = set()

    def loss(outputs: dict[str, Any], targets: dict[str, Any]) -> Any:
        seen.update(outputs, targets)
        return torch.nn.functional.cross_entropy(outputs["logits"], targets["labels"], reduction="none")

    mine, theirs = scores("fisher", loss), scores("fisher", "ce")
    assert seen == {"logits", "x", "labels"}
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6)


def test_what_is_said_when_it_cannot_be() -> None:
    with pytest.raises(UsageError, match="needs samples"):
        spa.prune(mlp(), target="macs=0.7", criterion="fisher")
    x, _ = labelled()
    with pytest.raises(UsageError, match="labels"):
        spa.prune(mlp(), target="macs=0.7", criterion="fisher", loss="ce", calibration=x)
    with pytest.raises(UsageError, match=r"unknown loss 'x'; choose one of auto, ce"):
        spa.prune(mlp(), target="macs=0.7", criterion="fisher", loss="x", calibration=x)


def test_kept_for_the_next_query(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.interpreter import statistics

    x, y = labelled()
    how: dict[str, Any] = {"criterion": "fisher", "calibration": {"x": x, "labels": y}, "cache": tmp_path}
    first = spa.prune(mlp(), target="macs=0.7", **how)

    def never(*_: object) -> None:
        raise AssertionError("derivatives are taken again")

    monkeypatch.setattr(statistics, "gate_gradients", never)
    assert spa.prune(mlp(), target="macs=0.7", **how).plan.removed == first.plan.removed
    spa.prune(mlp(), target="macs=0.6", **how)
    with pytest.raises(AssertionError):
        spa.prune(mlp(), target="macs=0.6", **{**how, "loss": "sampled"})
