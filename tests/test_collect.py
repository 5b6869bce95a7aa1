"""Parts of models against runs of the whole, taps against removing what they say, profiles against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

import spa
from spa.calibration import Calibration, load_calibration
from spa.consumers import Tap, taps
from spa.errors import UsageError
from spa.executors.collect import Setup, covariances, profiles
from spa.executors.flow import Flow
from spa.executors.front import Front
from spa.executors.segments import Segments, placed
from spa.graph import load
from spa.groups import Analysis, Group
from spa.measured import Measured
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.runtime import fetch
from spa.sites import find_sites
from spa.store import to_proto
from tests.models import BUILT
from tests.net import Net, feeds

Array = np.ndarray
RUNNABLE = [name for name, built in BUILT.items() if built.runtime]


def samples(model: onnx.ModelProto, count: int = 6, seed: int = 0) -> Calibration:
    """Random samples of a built model; some of them have a batch that is fixed."""
    several = [feeds(model, seed + k) for k in range(count)]
    arrays = {name: np.concatenate([f[name] for f in several]) for name in several[0]}
    return load_calibration(arrays, load(model).model)


def activations(model: onnx.ModelProto, data: Calibration, names: Sequence[str]) -> dict[str, Array]:
    """What ONNX Runtime computes for inner values of the model as it is, all samples at once."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    present = {o.name for o in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names) if n not in present)
    session = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    (bucket,) = data.feeds
    step = data.fixed or data.samples
    parts = [
        session.run(list(names), {k: v[s : s + step] for k, v in bucket.items()}) for s in range(0, data.samples, step)
    ]
    return {name: np.concatenate([p[k] for p in parts]) for k, name in enumerate(names)}


# -- segments and fronts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1 << 30, 1], ids=["held", "mapped"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_values_at_every_cut(name: str, memory: int) -> None:
    """Also with subgraphs that capture outer values, and operators that shape inference knows nothing of."""
    model = BUILT[name].build()
    (feed,) = samples(model, 1).feeds
    parts = Segments.of(load(model).model)
    full = {k: fetch(v) for k, v in parts.runner(list(parts.producer), ())(placed(feed)).items()}
    front = Front(parts, Calibration("", "", 2, (feed,)), 2, memory)
    tolerance = max(1e-4, BUILT[name].tolerance)
    for position in range(0, len(parts.proto.graph.node) + 1, 3 if memory > 1 else 7):
        wanted = [n for n, k in parts.producer.items() if position <= k < position + 3] + parts.outputs
        window = front.at(position, wanted)
        for _ in range(2):  # may be looked at again
            (values,) = window
            for n in wanted:
                got = fetch(values[n])
                np.testing.assert_allclose(got, full[n], rtol=tolerance, atol=tolerance, err_msg=n)


@pytest.mark.parametrize("name", ["residual_cnn", "branches", "loop", "old_inputs"])
def test_a_segment_reads_only_what_it_needs(name: str) -> None:
    parts = Segments.of(load(BUILT[name].build()).model)
    nodes = list(parts.proto.graph.node)
    for position in range(1, len(nodes)):
        live = parts.live(position)
        made = {o for node in nodes[:position] for o in node.output}
        assert set(live) <= made | set(parts.inputs)
        proto, reads = parts.extract(parts.outputs, live)
        assert set(reads) <= set(live)
        assert len(proto.graph.node) <= len(nodes) - position


def _two_linear(constants: bool) -> onnx.ModelProto:
    net = Net()
    x = net.linear(net.input("x", "n", 4), "a", 4, 5)
    x = net("Relu", net.linear(x, "b", 5, 6))
    net.named(net.linear(x, "c", 6, 3), "y")
    if constants:  # weights that live in nodes
        for key in list(net.weights):
            tensor = numpy_helper.from_array(net.weights.pop(key))
            node = onnx.helper.make_node("Constant", [], [key], value=tensor)
            net.nodes.insert(0, node)
    return net.model(y=("n", 3))


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "nodes"])
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_exchanged_weights_act_behind_the_cut_only(constants: bool, memory: int) -> None:
    """A cut keeps the values it has: only what is run from there on sees new weights."""
    model = _two_linear(constants)
    data = samples(model, 4)
    x = data.feeds[0]["x"].astype(np.float64)
    graph = load(model).model
    source = {i.name: i for i in _two_linear(False).graph.initializer}
    w = {name: numpy_helper.to_array(t).astype(np.float64) for name, t in source.items()}

    def out(weights: dict[str, Array]) -> Array:
        h = (x @ weights["a.weight"] + weights["a.bias"]) @ weights["b.weight"] + weights["b.bias"]
        return np.asarray(np.maximum(h, 0) @ weights["c.weight"] + weights["c.bias"])

    parts = Segments.of(graph)
    front = Front(parts, data, 3, memory)
    (second,) = [k for k, node in enumerate(parts.proto.graph.node) if "b.weight" in node.input]

    def now(position: int) -> Array:
        return np.concatenate([fetch(v["y"]) for v in front.at(position, ["y"])])

    np.testing.assert_allclose(now(second), out(w), rtol=1e-4, atol=1e-5)
    changed = w | {"c.weight": w["c.weight"] * 2}
    parts.override("c.weight", changed["c.weight"])
    np.testing.assert_allclose(now(second), out(changed), rtol=1e-4, atol=1e-5)
    assert parts.overrides["c.weight"].dtype == ir.DataType.FLOAT
    # what lies before the cut has been computed
    parts.override("a.weight", w["a.weight"] * 3)
    np.testing.assert_allclose(now(second), out(changed), rtol=1e-4, atol=1e-5)
    expected = out(changed | {"a.weight": w["a.weight"] * 3})
    fresh = np.concatenate([fetch(v["y"]) for v in Front(parts, data, 3, memory).at(0, ["y"])])
    np.testing.assert_allclose(fresh, expected, rtol=1e-4, atol=1e-5)


def _anonymous() -> int:
    """Bytes of memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell what memory is taken")
def test_values_beyond_the_memory_are_on_disk() -> None:
    net = Net()
    x = net("Tile", net.input("x", "n", 1), net.value("repeats", np.array([1, 1 << 20])))
    net.named(net("Relu", net("Neg", x)), "y")
    parts = Segments.of(load(net.model(y=("n", 1 << 20))).model)
    rows = np.arange(16, dtype=np.float32)[:, None]
    data = Calibration("", "", 16, ({"x": -rows},))
    Front(parts, data, 1, 8 << 20).at(1, ["y"])  # what the runtime takes for itself the first time
    before = _anonymous()
    front = Front(parts, data, 1, 8 << 20)
    for position in range(1, 3):  # 16 values of 4 MB at each cut
        window = front.at(position, ["y"])
        assert [fetch(v["y"])[0, -1] for v in window] == rows[:, 0].tolist()
        assert _anonymous() - before < 32 << 20


# -- profiles and covariances of whole models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "decoder", "swin", "unet", "half"])
def test_profiles_are_numpy(name: str) -> None:
    """Mean, variance and magnitude per sample, whatever axis the units lie on; the batch size is no matter."""
    model = BUILT[name].build()
    analysis = spa.analyze(model)
    data = samples(model, 3)
    every = taps(analysis, analysis.groups, find_sites(analysis.coupling.model))
    mine = {t.key: t for tap in every.values() for t in tap}
    whole = activations(to_proto(analysis.coupling.model), data, [key[0] for key in mine])
    small, large = (profiles(analysis.coupling.model, list(mine.values()), data, Setup(b)) for b in (1, 6))
    for key, tap in mine.items():
        x = np.moveaxis(whole[key[0]].astype(np.float64), tap.axis, -1)
        got = large[key]
        x = x.reshape(len(got.mean), -1, x.shape[-1])
        scale, loose = np.abs(x).max(), 1e-3 if name == "half" else 1e-5
        np.testing.assert_allclose(got.mean, x.mean(1), rtol=loose, atol=loose * scale)
        np.testing.assert_allclose(got.variance, x.var(1), rtol=10 * loose, atol=loose * scale**2)
        np.testing.assert_allclose(got.absolute, np.abs(x).mean(1), rtol=loose, atol=loose * scale)
        assert got.positions.tolist() == [x.shape[1]] * len(x)
        pooled, again = got.pooled(), small[key].pooled()
        flat = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(pooled[1], flat.var(axis=0, ddof=1), rtol=10 * loose, atol=loose * scale**2)
        np.testing.assert_allclose(again[1], pooled[1], rtol=10 * loose, atol=loose * scale**2)


@pytest.mark.parametrize("name", ["residual_cnn", "decoder", "flat_cnn"])
def test_covariances_do_not_depend_on_batches_or_memory(name: str) -> None:
    model = BUILT[name].build()
    graph = load(model).model
    sites, data = find_sites(graph), samples(model, 8)
    whole = covariances(graph, sites, data, Setup(16))
    seen: list[tuple[str, int, int]] = []
    for setup in (Setup(3), Setup(16, memory=1)):
        seen.clear()
        other = covariances(graph, sites, data, setup, lambda *told: seen.append(told))
        for site in sites:
            one, two = whole[site.name], other[site.name]
            assert one.rows == two.rows
            scale = np.abs(one.covariance).max()
            np.testing.assert_allclose(two.covariance, one.covariance, rtol=1e-4, atol=1e-5 * scale)
            np.testing.assert_allclose(two.mean_x, one.mean_x, rtol=1e-4, atol=1e-5 * np.sqrt(scale))
        passes, rest = divmod(len(seen) - 1, len(list(data.batches(setup.batch))))
        total = passes * data.samples
        assert not rest
        assert seen[0] == ("collect", 0, total)
        assert seen[-1] == ("collect", total, total)
        assert seen == sorted(seen)


# -- taps --------------------------------------------------------------------------------------------------------------


def _zeroed_taps(analysis: Analysis, group: Group, mine: Sequence[Tap], units: Sequence[int]) -> onnx.ModelProto:
    """The original with zeros at the tap positions of some units, for the reader the tap stands for."""
    proto = to_proto(analysis.coupling.model)
    graph = proto.graph
    for k, tap in enumerate(mine):
        name, mask = tap.value.name or "", ~np.isin(tap.units, list(units))
        shape = [1] * tap.rank
        shape[tap.axis] = len(mask)
        kind = next((i.type.tensor_type.elem_type for i in graph.value_info if i.name == name), TensorProto.FLOAT)
        array = mask.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)).reshape(shape)
        graph.initializer.append(numpy_helper.from_array(array, f"mask{k}"))
        at = next(j for j, node in enumerate(graph.node) if name in node.output)
        for node in graph.node[at + 1 :]:
            for slot, read in enumerate(node.input):
                if read == name:
                    node.input[slot] = f"masked{k}"
        graph.node.insert(at + 1, onnx.helper.make_node("Mul", [name, f"mask{k}"], [f"masked{k}"]))
    return proto


UNREAD = {("picked", "c1:channel"), ("picked", "c1:channel#2"), ("behind", "lora.a:neuron")}
"""Channels that nothing reads, and the inner axis of a product of two weights: no activation carries them."""
EXACT = ["residual_cnn", "flat_cnn", "unet", "shuffle_net", "picked", "vit_split", "vit_reshape", "swin", "decoder",
         "modern", "behind", "two_ways", "old_inputs", "opset7", "merged"]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_zeros_at_the_taps_are_a_removal(name: str) -> None:
    """For all exact groups: zeros where the taps say, and a model without the units, give the same outputs."""
    model = BUILT[name].build()
    analysis = spa.analyze(model)
    data = samples(model, 1)
    every = taps(analysis, analysis.groups, find_sites(analysis.coupling.model))
    tried = 0
    for group in [g for g in analysis.groups if g.exact]:
        mine = list({t.key: t for t in every[group.name]}.values())
        if not mine:
            assert (name, group.name) in UNREAD
            continue
        units = list(range(0, group.units - 1, 2))
        outputs = [o.name for o in model.graph.output]
        small = to_proto(rewritten(analysis, kept_without(analysis, [(group, units)])).model)
        got = activations(_zeroed_taps(analysis, group, mine, units), data, outputs)
        want = activations(small, data, outputs)
        for o in outputs:
            np.testing.assert_allclose(
                got[o], want[o], rtol=1e-3, atol=2e-4 * np.abs(want[o]).max(), err_msg=group.name
            )
        tried += 1
    assert tried


def _taps_of(model: onnx.ModelProto) -> tuple[Analysis, dict[str, list[Tap]]]:
    analysis = spa.analyze(model)
    return analysis, dict(taps(analysis, analysis.groups, find_sites(analysis.coupling.model)))


def test_tables_of_an_attention_block() -> None:
    """Heads are read by the projection, value dims too; query and key dims by the product of both."""
    analysis, found = _taps_of(BUILT["vit_split"].build())
    (heads,) = [t for t in found["qkv:head"] if t.site is not None]
    assert heads.site is not None
    assert heads.site.weight.name == "proj.weight"
    np.testing.assert_array_equal(heads.units, np.repeat(np.arange(4), 8))
    np.testing.assert_array_equal(heads.columns(4), np.arange(32).reshape(1, 4, 8))
    (dims,) = [t for t in found["qkv:v-dim"] if t.site is not None]
    assert dims.site is heads.site
    np.testing.assert_array_equal(dims.units, np.tile(np.arange(8), 4))
    np.testing.assert_array_equal(np.sort(dims.columns(8)[0]), np.arange(32).reshape(4, 8).T)
    both = found["qkv:qk-dim"]
    assert [t.site for t in both] == [None, None]
    assert {t.axis for t in both} == {2, 3} or {t.axis for t in both} == {3, 2}
    for tap in both:
        np.testing.assert_array_equal(tap.units, np.arange(8))
    (neurons,) = found["mlp.fc1:neuron"]
    assert neurons.site is not None
    assert neurons.site.weight.name == "mlp.fc2.weight"
    assert analysis.group("mlp.fc1:neuron") is not None


def test_tables_of_flattened_and_grouped_channels() -> None:
    """One unit has many positions behind a Flatten, one per group in a grouped convolution, and k taps in each."""
    _, found = _taps_of(BUILT["flat_cnn"].build())
    (flat,) = found["c3:channel"]
    np.testing.assert_array_equal(flat.units, np.repeat(np.arange(8), 25))
    np.testing.assert_array_equal(flat.columns(8)[0], np.arange(200).reshape(8, 25))
    (grouped,) = found["c1:channel"]
    assert grouped.site is not None
    assert grouped.site.groups == 4
    columns = grouped.columns(int(grouped.units.max()) + 1)
    table = grouped.units.reshape(4, 4)
    for g in range(4):
        for unit, mine in enumerate(columns[g].tolist()):
            expected = [tap * 4 + c for c in np.flatnonzero(table[g] == unit).tolist() for tap in range(9)]
            assert sorted(k for k in mine if k >= 0) == sorted(expected)


@pytest.mark.parametrize("name", EXACT)
def test_columns_are_the_weights_that_a_zero_switches_off(name: str) -> None:
    """A zeroed unit and zeroed columns of the site's matrix are the same to the site."""
    analysis, found = _taps_of(BUILT[name].build())
    for group in analysis.groups:
        for tap in found[group.name]:
            site = tap.site
            if site is None:
                continue
            columns = tap.columns(group.units)
            assert columns.shape[:2] == (site.groups, group.units)
            by_hand = np.tile(tap.units.reshape(site.groups, 1, site.channels), (1, site.taps, 1))
            by_hand = by_hand.reshape(site.groups, site.columns)
            for g in range(site.groups):
                for unit in range(group.units):
                    mine = columns[g, unit]
                    assert sorted(mine[mine >= 0].tolist()) == np.flatnonzero(by_hand[g] == unit).tolist()


# -- measured ----------------------------------------------------------------------------------------------------------


def test_too_few_samples_say_how_many_are_needed() -> None:
    """The number in the message is the smallest that is enough."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 4), "a", 4, 64))
    net.named(net.gemm(x, "b", 64, 3), "y")
    model = net.model(y=("n", 3))
    analysis = spa.analyze(model)
    site = find_sites(analysis.coupling.model)[1]

    def rows(count: int) -> int:
        array = np.random.default_rng(0).normal(size=(count, 4))
        return Measured(analysis, analysis.groups, load_calibration({"x": array}, load(model).model)).joint(site).rows

    with pytest.raises(UsageError, match=r"2 samples .* 64 inputs .* at least \d+ samples") as caught:
        rows(2)
    need = int(str(caught.value).split("at least ")[1].split()[0])
    assert rows(need) == need
    with pytest.raises(UsageError, match=f"at least {need} samples"):
        rows(need - 1)


def test_overflow_is_named() -> None:
    net = Net()
    x = net("Exp", net("Exp", net.gemm(net.input("x", "n", 4), "a", 4, 8)))
    net.named(net.gemm(x, "b", 8, 3), "y")
    model = net.model(y=("n", 3))
    analysis = spa.analyze(model)
    data = load_calibration({"x": np.random.default_rng(0).normal(size=(32, 4)) * 30}, load(model).model)
    measured = Measured(analysis, analysis.groups, data)
    with pytest.raises(UsageError, match="NaN or infinite"):
        measured.joint(measured.sites[1])
    with pytest.raises(UsageError, match="NaN or infinite"):
        measured.profile(measured.taps(analysis.groups[0])[0])


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "decoder", "branches", "loop"])
def test_values_in_stages(name: str) -> None:
    """A model that is run in parts, because its activations do not fit, gives what it gives in one run."""
    model = BUILT[name].build()
    data = samples(model, 5)
    parts = Segments.of(load(model).model)
    names = [n for n, k in parts.producer.items() if k % 2 == 0 and n not in parts.constant]
    whole, pieces = Flow(parts, names, data, 2, 1 << 30), Flow(parts, names, data, 2, 1)
    for (size, one), (same, many) in zip(whole, pieces, strict=True):
        assert size == same
        (full,) = one
        stages = list(many)
        assert len(stages) > 1
        assert sorted(n for values in stages for n in values) == sorted(names)
        for n, value in ((n, v) for values in stages for n, v in values.items()):
            np.testing.assert_allclose(fetch(value), fetch(full[n]), rtol=1e-4, atol=1e-4, err_msg=n)
