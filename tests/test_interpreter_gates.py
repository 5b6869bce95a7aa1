"""Gates: their derivatives against ONNX Runtime on models whose weights are scaled, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from spa.errors import UsageError  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.groups import Analysis, Group, analyze_model  # noqa: E402
from spa.interpreter import CrossEntropy, Gates, Interpreter  # noqa: E402
from spa.runtime import open_session, run  # noqa: E402
from tests.models import BUILT  # noqa: E402
from tests.net import feeds  # noqa: E402

Array = np.ndarray[Any, Any]
NAMES = [
    "residual_cnn", "flat_cnn", "unet", "shuffle_net", "group_norm", "vit_split", "vit_reshape", "swin", "decoder",
    "modern", "lstm_tagger", "experts", "two_layers", "merged", "fused_bert",
]  # fmt: skip
STEP = 1e-2


class Setup:
    """A model, its analysis, its interpreter in float64 and a projection of its float outputs to one number."""

    def __init__(self, name: str) -> None:
        self.proto = BUILT[name].build()
        self.graph = load(self.proto)
        self.analysis: Analysis = analyze_model(self.graph.model)
        self.network = Interpreter(self.graph).eval().double()
        self.feeds = feeds(self.proto)
        rng = np.random.default_rng(1)
        self.weights = {
            k: rng.standard_normal(v.shape) for k, v in self.runtime(self.proto).items() if v.dtype.kind == "f"
        }

    def runtime(self, proto: onnx.ModelProto) -> dict[str, Array]:
        return run(open_session(proto.SerializeToString(), provider="cpu", threads=1, optimize=False), self.feeds)

    def projected(self, proto: onnx.ModelProto) -> float:
        out = self.runtime(proto)
        return float(sum((out[k].astype(np.float64) * w).sum() for k, w in self.weights.items()))

    def loss(self, gates: Gates) -> Any:
        out = self.network(self.feeds, gates=gates)
        return sum((out[k] * torch.from_numpy(w)).sum() for k, w in self.weights.items())


def role_of(tensor: str, axis: int, role: str) -> str:
    """Recurrent weights consume the state along their last axis."""
    return "in" if tensor.endswith(".R") and axis == 2 else role


def columns(setup: Setup, group: Group, unit: int, role: str) -> Iterator[tuple[str, int, Array]]:
    """(weight, axis, positions of the unit) for the members of a group with a role."""
    solution = setup.analysis.coupling.solution
    mark = np.zeros(solution.positions, dtype=bool)
    mark[group.positions[unit]] = True
    for member in group.members:
        bias = role == "out" and member.role == "scale" and member.rank == 1
        if bias or role == role_of(member.tensor, member.axis, member.role):
            yield member.tensor, member.axis, np.flatnonzero(solution.spread(member.dim, mark))


def scaled(setup: Setup, group: Group, unit: int, role: str, factor: float) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(setup.proto)
    tensors = {t.name: t for t in proto.graph.initializer}
    for name, axis, positions in columns(setup, group, unit, role):
        array = numpy_helper.to_array(tensors[name]).copy()
        index: list[Any] = [slice(None)] * array.ndim
        index[axis] = positions
        array[tuple(index)] *= factor
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return proto


def scalable(setup: Setup, group: Group) -> tuple[str, float] | None:
    """Which weights to scale, and how the derivative of that relates to the gate's; None if no weights say it alone."""
    initializers = {t.name for t in setup.proto.graph.initializer}
    roles = [(m.tensor, role_of(m.tensor, m.axis, m.role)) for m in group.members]
    if not {name for name, _ in roles} <= initializers:
        return None
    consumers = [name for name, role in roles if role == "in"]
    if consumers:
        reads = len({place[0] for place in Gates(setup.analysis, [group])._places})
        return ("in", 1.0) if reads == len(consumers) else None
    return ("out", 2.0) if group.kind == "qk-dim" else None  # queries and keys are scaled, the gate is on the queries


def difference(function: Callable[[float], float], step: float) -> float:
    return (function(1 + step) - function(1 - step)) / (2 * step)


def gated(setup: Setup, gates: Gates, group: Group, unit: int, factor: float) -> float:
    values = np.ones(group.units)
    values[unit] = factor
    gates.set(group.name, values)
    loss = float(setup.loss(gates).detach())
    gates.set(group.name, np.ones(group.units))
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_agree_with_scaled_weights(name: str) -> None:
    setup = Setup(name)
    gates = Gates(setup.analysis, dtype=torch.float64)
    loss = setup.loss(gates)
    assert abs(float(loss.detach()) - setup.projected(setup.proto)) < 1e-3 * max(1.0, abs(float(loss.detach())))
    found = dict(
        zip(gates.vectors, torch.autograd.grad(loss, list(gates.vectors.values()), allow_unused=True), strict=True)
    )
    checked = 0
    for group in setup.analysis.groups:
        how = scalable(setup, group)
        if how is None or group.name not in found:
            continue
        for unit in (0, group.units - 1):
            runtime = difference(lambda f, g=group, u=unit, r=how: setup.projected(scaled(setup, g, u, r[0], f)), STEP)
            coarse = difference(lambda f, g=group, u=unit: gated(setup, gates, g, u, f), STEP)
            if how[1] == 1:  # the same function of the factor, kinks of activations included
                assert abs(coarse - runtime) < 1e-3 * max(1.0, abs(runtime)), (group.name, unit, coarse, runtime)
            else:
                assert abs(coarse - runtime / how[1]) < 2e-2 * max(1.0, abs(runtime)), (
                    group.name,
                    unit,
                    coarse,
                    runtime,
                )
            fine = difference(lambda f, g=group, u=unit: gated(setup, gates, g, u, f), 1e-6)
            have = float(found[group.name][unit])
            assert abs(have - fine) < 1e-4 * max(1.0, abs(fine)), (group.name, unit, have, fine)
            checked += 1
    assert checked


def test_which_groups_have_no_gates() -> None:
    """What is summed in a subgraph, or inside a fused attention: half a gate would be wrong."""
    without = {
        n: Gates(analyze_model(load(BUILT[n].build()).model)).without for n in [*NAMES, "loop", "scan", "branches"]
    }
    assert {name: groups for name, groups in without.items() if groups} == {
        "fused_bert": ("attention:qk-dim",),
        "loop": ("fc1:neuron", "body.wide:neuron"),
        "scan": ("fc1:neuron",),
        "branches": ("fc1:neuron",),
    }


def test_gate_zero_removes_the_unit() -> None:
    setup = Setup("residual_cnn")
    gates = Gates(setup.analysis, dtype=torch.float64)
    for group in setup.analysis.groups:
        how = scalable(setup, group)
        if how is None or how[0] != "in":
            continue
        values = np.ones(group.units)
        values[1] = 0
        gates.set(group.name, values)
        assert abs(float(setup.loss(gates).detach()) - setup.projected(scaled(setup, group, 1, "in", 0.0))) < 1e-3
        gates.set(group.name, np.ones(group.units))


@pytest.mark.parametrize(
    "name", ["residual_cnn", "flat_cnn", "vit_split", "decoder", "fused_bert", "lstm_tagger", "unet", "group_norm"]
)
def test_hessian_vector_products(name: str) -> None:
    """By double backward, against differences of gradients."""
    setup = Setup(name)
    gates = Gates(setup.analysis, dtype=torch.float64)
    vectors = list(gates.vectors.values())

    def gradient(create: bool) -> list[Any]:
        loss = setup.loss(gates).square() * 1e-2
        found = torch.autograd.grad(loss, vectors, create_graph=create, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, vectors, strict=True)]

    torch.manual_seed(0)
    direction = [torch.randint(0, 2, v.shape, dtype=torch.float64) * 2 - 1 for v in vectors]
    first = gradient(True)
    product = torch.autograd.grad(first, vectors, direction, allow_unused=True)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for v, d in zip(vectors, direction, strict=True):
                v.add_(d, alpha=sign * 1e-5)
        sides.append(gradient(False))
        with torch.no_grad():
            for v, d in zip(vectors, direction, strict=True):
                v.add_(d, alpha=-sign * 1e-5)
    for h, a, b in zip(product, *sides, strict=True):
        want = (a - b) / 2e-5
        assert h is not None
        assert torch.allclose(h, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "vit_reshape", "decoder", "swin"])
def test_gates_of_single_samples(name: str) -> None:
    """One backward pass gives what each sample alone would."""
    setup = Setup(name)
    setup.feeds = feeds(setup.proto, dims={"n": 3, "t": 6})
    key = next(iter(setup.weights))
    shape = setup.network(setup.feeds)[key].shape
    weight = torch.from_numpy(np.random.default_rng(2).standard_normal(shape[1:]))

    def loss(batch: dict[str, Array], gates: Gates) -> Any:
        return (setup.network(batch, gates=gates)[key] * weight).square().sum()

    each = Gates(setup.analysis, samples=3, dtype=torch.float64)
    rows = torch.autograd.grad(loss(setup.feeds, each), list(each.vectors.values()))
    for n in range(3):
        one = Gates(setup.analysis, dtype=torch.float64)
        batch = {k: v[n : n + 1] if v.ndim and v.shape[0] == 3 else v for k, v in setup.feeds.items()}
        want = torch.autograd.grad(loss(batch, one), list(one.vectors.values()))
        for have, alone in zip(rows, want, strict=True):
            assert torch.allclose(have[n], alone, rtol=1e-6, atol=1e-9)


def test_gates_of_single_samples_refuse_weights() -> None:
    with pytest.raises(UsageError, match="recurrent"):
        Gates(Setup("lstm_tagger").analysis, samples=2)


def test_gates_of_another_model_are_refused() -> None:
    setup = Setup("residual_cnn")
    other = analyze_model(load(setup.proto).model)
    with pytest.raises(UsageError, match="no node of this model"):
        setup.network(setup.feeds, gates=Gates(other))


def test_gates_and_checkpointing() -> None:
    """Activation checkpointing changes nothing, with second derivatives too."""
    setup = Setup("vit_split")
    results = []
    for segments in (0, 4):
        setup.network.segments = segments
        gates = Gates(setup.analysis, dtype=torch.float64)
        loss = CrossEntropy()(setup.network(setup.feeds, gates=gates), {"y": torch.tensor([1, 2])}).mean()
        vectors = list(gates.vectors.values())
        first = torch.autograd.grad(loss, vectors, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), vectors)
        results.append([*first, *second])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
