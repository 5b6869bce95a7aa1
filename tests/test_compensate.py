"""Compensation: exact where nothing is lost, never worse than none, and what it writes against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from spa.calibration import Calibration, load_calibration
from spa.compensate.closed import refit_readers, shift_means
from spa.compensate.norm import recalibrate
from spa.compensate.pairs import pair_up
from spa.compensate.walk import refit_sites
from spa.executors.collect import Setup
from spa.graph import load
from spa.groups import Analysis, Group
from spa.measured import Measured
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.store import to_proto
from spa.study import snapshot
from tests.models import BUILT
from tests.net import Net
from tests.test_collect import activations, samples
from tests.trained import images, trained

Array = np.ndarray
Removed = Sequence[tuple[Group, Sequence[int]]]
HOW = ("none", "bias", "obs-dense", "obs")


def group_of(analysis: Analysis, tensor: str, axis: int = 0) -> Group:
    """The only group with these slices among its members."""
    (found,) = [g for g in analysis.groups if any((m.tensor, m.axis) == (tensor, axis) for m in g.members)]
    return found


def compensated(
    analysis: Analysis, data: Calibration, removed: Removed, how: str, setup: Setup | None = None, **more: Any
) -> onnx.ModelProto:
    """The pruned model."""
    setup = setup or Setup()
    kept = kept_without(analysis, removed)
    twin = rewritten(analysis, kept)
    measured = Measured(analysis, analysis.groups, data, setup)
    if how == "bias":
        shift_means(twin, measured, removed)
    elif how == "obs-dense":
        refit_readers(twin, measured, removed, **more)
    elif how == "obs":
        refit_sites(analysis, kept, twin, data, setup, **more)
    elif how == "norm":
        recalibrate(analysis, kept, twin, data, setup)
    proto = to_proto(twin.model)
    onnx.checker.check_model(proto)
    return proto


def outputs(model: onnx.ModelProto, data: Calibration) -> list[Array]:
    got = activations(model, data, [o.name for o in model.graph.output])
    return [a.astype(np.float64) for a in got.values()]


def error(model: onnx.ModelProto, other: onnx.ModelProto, data: Calibration) -> float:
    """Squared error of all outputs relative to their variance."""
    pairs = list(zip(outputs(model, data), outputs(other, data), strict=True))
    spread = sum(np.square(a - a.mean(0)).sum() for a, _ in pairs)
    return float(sum(np.square(a - b).sum() for a, b in pairs) / spread)


def close(model: onnx.ModelProto, other: onnx.ModelProto, data: Calibration, tolerance: float = 1e-4) -> None:
    for a, b in zip(outputs(model, data), outputs(other, data), strict=True):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * np.abs(a).max())


# -- means go to biases ----------------------------------------------------------------------------------------------


def _dead(net: Net, name: str, units: Sequence[int], values: Sequence[float], axis: int = 0) -> None:
    """Let some outputs of a layer be constant."""
    weight = net.weights[f"{name}.weight"]
    np.moveaxis(weight, axis, 0)[list(units)] = 0
    net.weights[f"{name}.bias"][list(units)] = values


GONE, VALUES = [1, 4, 5, 9], [2.0, -1.0, 0.5, 3.0]


def constant_channels(bias: bool) -> onnx.ModelProto:
    """Unpadded convolutions; the reader may have no bias of its own."""
    net = Net()
    x = net.conv(net.input("x", "n", 3, 8, 8), "a", 3, 16)
    _dead(net, "a", GONE, VALUES)
    weight = net.weight("b.weight", 12, 16, 3, 3)
    x = net("Relu", net("Conv", x, weight, *([net.weight("b.bias", 12)] if bias else []), name="b"))
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 12, 4), "y")
    return net.model(y=("n", 4))


def constant_neurons(kind: str) -> onnx.ModelProto:
    """The reader is a Gemm (with or without bias, scaled, with a shared bias) or a MatMul (with or without an Add)."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 16))
    _dead(net, "a", GONE, VALUES)
    w, b = net.weight("b.weight", 16, 8), net.weight("b.bias", 8)
    if kind == "gemm":
        y = net("Gemm", x, w, b, name="b", alpha=0.5, beta=2.0)
    elif kind == "gemm beta 0":
        y = net("Gemm", x, w, b, name="b", beta=0.0)
    elif kind == "gemm no bias":
        y = net("Gemm", x, w, name="b", beta=0.0)
    elif kind == "gemm shared bias":
        y = net("Gemm", x, w, b, name="b", beta=0.5)
        y = net("Gemm", y, net.weight("c.weight", 8, 8), b, name="c")
    elif kind == "gemm, then add":
        y = net("Add", net("Gemm", x, w, name="b"), b)
    elif kind == "matmul":
        y = net("Add", b, net("MatMul", x, w, name="b"))
    elif kind == "matmul shared bias":
        y = net("Add", net("MatMul", x, w, name="b"), b)
        y = net("Add", net("MatMul", y, net.weight("c.weight", 8, 8), name="c"), b)
    elif kind == "matmul read twice":
        y = net("MatMul", x, w, name="b")
        y = net("Add", net("Tanh", y), net("Sigmoid", y))
    elif kind == "fused shared bias":
        y = net("FusedGemm", x, w, b, name="b", domain="com.microsoft", activation="Relu")
        y = net("FusedGemm", y, net.weight("c.weight", 8, 8), b, name="c", domain="com.microsoft", activation="Relu")
    elif kind == "fused":
        y = net("FusedMatMul", x, w, name="b", domain="com.microsoft", alpha=0.5)
    else:
        y = net("MatMul", x, w, name="b")
    if kind == "matmul is the output":
        net.named(y, "y")
        return net.model(y=("n", 8))
    net.named(net("Tanh", y), "y")
    return net.model(y=("n", 8))


NEURONS = ["gemm", "gemm beta 0", "gemm no bias", "gemm shared bias", "gemm, then add", "matmul", "matmul no bias",
           "matmul shared bias", "matmul read twice", "matmul is the output", "fused", "fused shared bias"]  # fmt: skip
MODELS = {"conv": constant_channels(True), "conv no bias": constant_channels(False)} | {
    kind: constant_neurons(kind) for kind in NEURONS
}


@pytest.mark.parametrize("how", ["bias", "obs-dense", "obs"])
@pytest.mark.parametrize("name", MODELS)
def test_constants_leave_without_a_trace(name: str, how: str) -> None:
    """Units that are constant over the data: their part of every output goes into the reader's bias, exactly."""
    model = MODELS[name]
    before = model.SerializeToString()
    analysis, data = spa.analyze(model), samples(model, 60)
    removed = [(group_of(analysis, "a.weight"), GONE)]
    bare = compensated(analysis, data, removed, "none")
    small = compensated(analysis, data, removed, how)
    assert error(model, bare, data) > 1e-3
    close(model, small, data, 2e-5 if how == "bias" else 1e-4)
    assert model.SerializeToString() == before
    others = samples(model, 5, seed=100)  # and on data that was never seen
    close(model, small, others, 2e-5 if how == "bias" else 1e-3)
    if name in ("matmul no bias", "matmul read twice", "matmul is the output", "fused"):
        assert len(small.graph.node) == len(bare.graph.node) + 1
    elif name == "matmul shared bias":  # beside the Add that reads the common bias; `obs` refits the next layer, too
        assert len(small.graph.node) == len(bare.graph.node) + (2 if how == "obs" else 1)
    else:
        assert len(small.graph.node) == len(bare.graph.node)


def test_biases_of_old_models() -> None:
    """IR version 3: new constants are nodes."""
    model = MODELS["matmul no bias"]
    old = onnx.ModelProto()
    old.CopyFrom(model)
    old.ir_version = 3
    for t in old.graph.initializer:
        old.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    analysis, data = spa.analyze(old), samples(model, 40)
    for how in ("bias", "obs-dense", "obs"):
        small = compensated(analysis, data, [(group_of(analysis, "a.weight"), GONE)], how)
        assert small.ir_version == 3
        close(old, small, data)


def test_means_of_padded_convolutions_are_right_on_average() -> None:
    """Zeros count: each output channel keeps its mean over all positions."""
    net = Net()
    x = net.conv(net.input("x", "n", 3, 8, 8), "a", 3, 16)
    x = net.conv(x, "b", 16, 12, act=None)
    net.named(net("GlobalAveragePool", x), "y")
    model = net.model(y=("n", 12, 1, 1))
    analysis, data = spa.analyze(model), samples(model, 10)  # so few that all positions are looked at
    small = compensated(analysis, data, [(group_of(analysis, "a.weight"), GONE)], "bias")
    (want,), (got,) = outputs(model, data), outputs(small, data)
    np.testing.assert_allclose(got.mean(0), want.mean(0), rtol=1e-4, atol=1e-5)


# -- linear dependence -----------------------------------------------------------------------------------------------


def _mixed(weight: Array, bias: Array, axis: int = 0) -> None:
    """Outputs 10 and 12 become copies of others, times a positive factor: the same behind a ReLU."""
    rows = np.moveaxis(weight, axis, 0)
    for target, source, factor in ((10, 0, 1.0), (12, 3, 2.0)):
        rows[target], bias[target] = factor * rows[source], factor * bias[source]


COPIES = [10, 12]


def dependent(kind: str) -> onnx.ModelProto:
    """A layer with duplicated channels in front of a reader of some kind."""
    net = Net()
    if kind in ("gemm", "matmul"):
        x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 16))
        _mixed(net.weights["a.weight"], net.weights["a.bias"])
        y = net.gemm(x, "b", 16, 8) if kind == "gemm" else net.linear(x, "b", 16, 8)
        net.named(net("Tanh", y), "y")
        return net.model(y=("n", 8))
    x = net.conv(net.input("x", "n", 3, 8, 8), "a", 3, 16)
    _mixed(net.weights["a.weight"], net.weights["a.bias"])
    if kind == "transposed":
        x = net("ConvTranspose", x, net.weight("b.weight", 16, 8, 3, 3), name="b", strides=[2, 2], pads=[1] * 4)
    elif kind == "depthwise":
        x = net.conv(net.conv(x, "d", 16, 16, group=16, act=None), "b", 16, 8)
        net.weights["d.weight"][COPIES] = net.weights["d.weight"][[0, 3]]
        net.weights["d.bias"][COPIES] = net.weights["d.bias"][[0, 3]]
        net.weights["d.bias"][12] *= 2
    elif kind == "residual":
        y = net.conv(net.conv(x, "r1", 16, 16), "r2", 16, 16, act=None)
        _mixed(net.weights["r2.weight"], net.weights["r2.bias"])
        x = net.conv(net("Relu", net("Add", x, y)), "b", 16, 8)
    else:
        x = net.conv(x, "b", 16, 8, stride=2)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", net("Sigmoid", x))), "head", 8, 4), "y")
    return net.model(y=("n", 4))


@pytest.mark.parametrize("how", ["obs-dense", "obs"])
@pytest.mark.parametrize("kind", ["gemm", "matmul", "conv", "transposed", "depthwise", "residual"])
def test_copies_leave_without_a_trace(kind: str, how: str) -> None:
    model = dependent(kind)
    analysis, data = spa.analyze(model), samples(model, 60)
    removed = [(group_of(analysis, "a.weight"), COPIES)]
    bare = compensated(analysis, data, removed, "none")
    small = compensated(analysis, data, removed, how, damping=1e-6)
    assert error(model, bare, data) > 1e-5
    assert error(model, small, data) < 1e-6
    close(model, small, data, 1e-3)
    others = samples(model, 5, seed=100)
    close(model, small, others, 3e-3)


@pytest.mark.parametrize("how", ["obs-dense", "obs"])
def test_copies_inside_the_groups_of_a_convolution(how: str) -> None:
    """Each group loses one channel, and has a copy of it."""
    net = Net()
    x = net.conv(net.input("x", "n", 3, 8, 8), "a", 3, 16)
    for g in range(4):
        net.weights["a.weight"][4 * g + 2] = net.weights["a.weight"][4 * g]
        net.weights["a.bias"][4 * g + 2] = net.weights["a.bias"][4 * g]
    x = net.conv(x, "b", 16, 8, group=4)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 8, 4), "y")
    model = net.model(y=("n", 4))
    analysis, data = spa.analyze(model), samples(model, 60)
    group = next(g for g in analysis.groups if any(m.tensor == "b.weight" and m.axis == 1 for m in g.members))
    assert group.units == 4  # the same of each group
    removed = [(group, [2])]
    assert error(model, compensated(analysis, data, removed, "none"), data) > 1e-5
    assert error(model, compensated(analysis, data, removed, how, damping=1e-6), data) < 1e-6


def test_copies_of_heads_values() -> None:
    """Two value dims of every head carry the same: one can leave for nothing."""
    model = BUILT["vit_split"].build()
    w = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    for h in range(4):  # v is the last third
        w["qkv.weight"][:, 64 + 8 * h + 5] = w["qkv.weight"][:, 64 + 8 * h + 1]
        w["qkv.bias"][64 + 8 * h + 5] = w["qkv.bias"][64 + 8 * h + 1]
    for t in model.graph.initializer:
        t.CopyFrom(numpy_helper.from_array(w[t.name], t.name))
    analysis, data = spa.analyze(model), samples(model, 40)
    (group,) = [g for g in analysis.groups if g.kind == "v-dim"]
    for how in ("obs-dense", "obs"):
        small = compensated(analysis, data, [(group, [5])], how, damping=1e-6)
        assert error(model, small, data) < 1e-6


def test_the_refit_is_numpy_least_squares() -> None:
    """One layer behind the cut: weights and bias are those of lstsq on the pruned inputs."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 16))
    net.named(net.gemm(x, "b", 16, 4), "y")
    model = net.model(y=("n", 4))
    analysis, data = spa.analyze(model), samples(model, 200)
    gone = [0, 3, 7, 8]
    h = activations(model, data, ["relu2_out"])["relu2_out"].astype(np.float64)
    (y,) = outputs(model, data)
    design = np.hstack([np.delete(h, gone, axis=1), np.ones((len(h), 1))])
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    for how in ("obs-dense", "obs"):
        small = compensated(analysis, data, [(group_of(analysis, "a.weight"), gone)], how, damping=1e-9)
        w = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
        np.testing.assert_allclose(w["b.weight"].T, solution[:-1], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(w["b.bias"], solution[-1], rtol=1e-3, atol=1e-3)


# -- trained networks ------------------------------------------------------------------------------------------------


def _data(model: onnx.ModelProto, count: int = 112) -> Calibration:
    return load_calibration({"image": images(count)}, load(model).model)


def _third(analysis: Analysis) -> Removed:
    """A third of every exact group, by the size of the weights."""
    from spa.criteria import CRITERIA
    from spa.evidence import Evidence

    evidence = Evidence(analysis)
    out = []
    for g in analysis.groups:
        if g.exact and g.kind != "qk-dim":
            order = np.argsort(CRITERIA["l2"].score(g, evidence), kind="stable")
            out.append((g, sorted(order[: max(1, g.units // 3)].tolist())))
    return out


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_trained_networks_suffer_less(name: str) -> None:
    """On the samples: obs at most half of the error of no compensation; and the source stays what it was."""
    model = trained(name)
    before = model.SerializeToString()
    analysis, data = spa.analyze(model), _data(model)
    source = to_proto(analysis.coupling.model).SerializeToString()
    removed = _third(analysis)
    errors = {how: error(model, compensated(analysis, data, removed, how), data) for how in HOW}
    assert errors["obs"] < 0.5 * errors["none"]
    if name == "cnn":  # rounds that adapt to the ReLUs lower the error behind them
        assert errors["obs"] < error(model, compensated(analysis, data, removed, "obs", bends=0), data)
    assert errors["obs"] < errors["obs-dense"]
    assert errors["obs-dense"] < errors["none"]
    assert model.SerializeToString() == before
    assert to_proto(analysis.coupling.model).SerializeToString() == source


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_obs_never_hurts_one_group(name: str) -> None:
    model = trained(name)
    analysis, data = spa.analyze(model), _data(model)
    for group in [g for g in analysis.groups if g.exact][:: 3 if name == "cnn" else 5]:
        removed = [(group, list(range(0, group.units, 2)))]
        bare, small = (error(model, compensated(analysis, data, removed, how), data) for how in ("none", "obs"))
        assert small <= bare * (1 + 1e-6) + 1e-9, group.name


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("how", ["bias", "obs-dense", "obs", "norm"])
def test_the_same_every_time(name: str, how: str) -> None:
    """Bit for bit; and with another batch size or with little memory up to rounding."""
    model = trained(name)
    analysis, data = spa.analyze(model), _data(model, 48)
    removed = _third(analysis)
    one = compensated(analysis, data, removed, how)
    assert one.SerializeToString() == compensated(analysis, data, removed, how).SerializeToString()
    other = compensated(analysis, data, removed, how, Setup(batch=17, memory=4 if how != "obs" else 1 << 20))
    assert error(one, other, data) < 1e-6


# -- norms -----------------------------------------------------------------------------------------------------------


def test_norms_are_estimated_in_forward_order() -> None:
    """Each BatchNormalization has the mean and variance of what it reads in the model as it is written."""
    model = trained("cnn")
    analysis, data = spa.analyze(model), _data(model)
    removed = _third(analysis)[-2:]
    small = compensated(analysis, data, removed, "norm")
    bare = compensated(analysis, data, removed, "none")
    norms = [n for n in small.graph.node if n.op_type == "BatchNormalization"]
    w, old = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (small, bare))
    values = activations(small, data, [n.input[0] for n in norms])
    changed = 0
    for n in norms:
        x = values[n.input[0]].astype(np.float64)
        mean, variance = w[n.input[3]], w[n.input[4]]
        if np.array_equal(mean, old[n.input[3]]):  # reads nothing that changed
            continue
        changed += 1
        np.testing.assert_allclose(mean, x.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        flat = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
        np.testing.assert_allclose(variance, flat.var(axis=1, ddof=1), rtol=1e-4, atol=1e-6)
    assert 0 < changed < len(norms)
    first = norms[0]
    np.testing.assert_array_equal(w[first.input[3]], old[first.input[3]])


def test_folded_norms_are_matched_channel_by_channel() -> None:
    """Every convolution that reads something changed has the original's mean and variance per channel again."""
    model = trained("cnn", folded=True)
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
    analysis, data = spa.analyze(model), _data(model)
    removed = _third(analysis)
    small = compensated(analysis, data, removed, "norm")
    kept = kept_without(analysis, removed)
    pairs = [p for p in pair_up(analysis, kept, rewritten(analysis, kept)) if p.pruned.layout == "conv"]
    assert len(pairs) > 5
    names = [p.pruned.name for p in pairs]
    after, before = activations(small, data, names), activations(model, data, names)
    for p in pairs:
        x, y = (a[p.pruned.name].astype(np.float64) for a in (after, before))
        y = y[:, p.outputs]
        alive = np.sqrt(x.var((0, 2, 3))) > 0
        np.testing.assert_allclose(x.mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-3 * np.abs(y).max())
        ratio = (x.std((0, 2, 3)) / np.maximum(y.std((0, 2, 3)), 1e-12))[alive]
        assert np.mean(np.abs(ratio - 1) < 1e-2) > 0.9
    bare = compensated(analysis, data, removed, "none")
    assert error(model, small, data) < error(model, bare, data)


def test_readers_of_layer_norms_are_matched_output_by_output() -> None:
    model = trained("vit")
    analysis, data = spa.analyze(model), _data(model)
    removed = _third(analysis)
    small = compensated(analysis, data, removed, "norm")
    kept = kept_without(analysis, removed)
    pairs = [p for p in pair_up(analysis, kept, rewritten(analysis, kept)) if p.pruned.layout == "tokens"]
    assert len(pairs) > 5
    names = [p.pruned.name for p in pairs]
    after, before = activations(small, data, names), activations(model, data, names)
    for p in pairs:
        x, y = (a[p.pruned.name].astype(np.float64).reshape(-1, a[p.pruned.name].shape[-1]) for a in (after, before))
        y = y[:, p.outputs]
        alive = x.std(0) > 0.11 * y.std(0)  # the factor is at most 10
        np.testing.assert_allclose(x.std(0)[alive], y.std(0)[alive], rtol=2e-2)
        assert alive.mean() > 0.9


@pytest.mark.parametrize("name", ["conv no bias", "conv", "gemm shared bias"])
def test_a_recalibration_can_be_taken_back(name: str) -> None:
    """Biases that were inserted for it included."""
    model = MODELS[name]
    analysis, data = spa.analyze(model), samples(model, 60)
    removed = [(group_of(analysis, "a.weight"), [0, 2])]
    kept = kept_without(analysis, removed)
    twin = rewritten(analysis, kept)
    bare = to_proto(twin.model)
    undo = snapshot(twin)
    recalibrate(analysis, kept, twin, data, Setup())
    refit_sites(analysis, kept, twin, data, Setup())
    assert error(bare, to_proto(twin.model), data) > 1e-3
    undo()
    assert error(bare, to_proto(twin.model), data) < 1e-10


@pytest.mark.parametrize(("shape", "follows"), [((8, 1, 1), True), ((1, 8, 1, 1), True), ((1,), True), ((8,), False),
                                            ((8, 1), False)])  # fmt: skip
def test_what_lies_behind_a_convolution(shape: tuple[int, ...], follows: bool) -> None:
    """A constant on the way to the ReLU is a shift per channel, or not: an image may be as wide as it has channels."""
    net = Net()
    x = net.conv(net.input("x", "n", 3, 8, 8), "a", 3, 16)
    x = net("Add", net.conv(x, "b", 16, 8, act=None), net.weight("more", *shape))
    net.named(net("Clip", x, net.value("low", 0.0), net.value("high", 6.0)), "y")
    analysis = spa.analyze(net.model(y=("n", 8, 8, 8)))
    kept = kept_without(analysis, [(group_of(analysis, "a.weight"), [0])])
    (pair,) = pair_up(analysis, kept, rewritten(analysis, kept))
    assert pair.behind.bends == follows
    if follows:
        assert (pair.behind.low, pair.behind.high) == (0, 6)
        np.testing.assert_allclose(pair.behind.shift, np.broadcast_to(net.weights["more"].reshape(-1), 8), rtol=1e-6)


@pytest.mark.parametrize("name", [n for n, b in BUILT.items() if b.runtime and b.exact])
@pytest.mark.parametrize("how", ["bias", "obs-dense", "obs", "norm"])
def test_every_built_model_can_be_compensated(name: str, how: str) -> None:
    """Whatever is built here: a valid model with finite outputs comes out, and the source is not touched."""
    model = BUILT[name].build()
    analysis, data = spa.analyze(model), samples(model, 60)
    source = to_proto(analysis.coupling.model).SerializeToString()
    removed = [(g, list(range(0, g.units - 1, 3))) for g in analysis.groups if g.exact]
    small = compensated(analysis, data, removed, how)
    assert to_proto(analysis.coupling.model).SerializeToString() == source
    for a, b in zip(outputs(model, data), outputs(small, data), strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all()
    if how.startswith("obs") and BUILT[name].tolerance < 1e-3:
        bare = compensated(analysis, data, removed, "none")
        assert error(model, small, data) < 1.02 * error(model, bare, data) + 1e-6
