"""Scores against plain numpy on the raw arrays, and what normalising does to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from spa.criteria import CRITERIA, NORMALISATIONS, normalise
from spa.evidence import Evidence
from spa.groups import Analysis, Group
from tests.models import BUILT
from tests.net import Net

POWER = {"l1": 1, "l2": 2}


def loaded(name: str) -> tuple[Analysis, dict[str, np.ndarray]]:
    model = BUILT[name].build()
    return spa.analyze(model), {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def norms(array: np.ndarray, axis: int, power: int) -> np.ndarray:
    """Per position of `axis`, the norm of everything else."""
    flat = np.abs(np.moveaxis(array.astype(np.float64), axis, 0)).reshape(array.shape[axis], -1)
    return flat.sum(1) if power == 1 else np.sqrt(np.square(flat).sum(1))


def score(analysis: Analysis, name: str, criterion: str, how: str = "mean") -> np.ndarray:
    group = analysis.group(name)
    assert group is not None
    return CRITERIA[criterion].score(group, Evidence(analysis), how)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_norms_of_channels(criterion: str, how: str) -> None:
    """One row per weight matrix that has the channel, biases and norms left out, joined as asked."""
    analysis, w = loaded("residual_cnn")
    members = {
        "stem:channel": [("stem.weight", 0), ("block.conv2.weight", 0), ("block.conv1.weight", 1), ("branch.weight", 1),
                         ("inverted.expand.weight", 1)],
        "inverted.expand:channel": [("inverted.expand.weight", 0), ("inverted.depthwise.weight", 0),
                                    ("inverted.reduce.weight", 1), ("inverted.widen.weight", 0),
                                    ("inverted.project.weight", 1)],
        "mix:channel": [("mix.weight", 0), ("head.weight", 1)],
        "inverted.project:channel": [("inverted.project.weight", 0)],
    }  # fmt: skip
    for name, parts in members.items():
        rows = [norms(w[tensor], axis, POWER[criterion]) for tensor, axis in parts]
        if name == "inverted.project:channel":  # the first 48 of the 64 channels that are concatenated
            rows.append(norms(w["mix.weight"], 1, POWER[criterion])[:48])
        expected = getattr(np.stack(rows), how)(axis=0)
        np.testing.assert_allclose(score(analysis, name, criterion, how), expected, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_norms_of_heads(criterion: str) -> None:
    """A head is its three slices of the fused projection together, and its rows of the output projection."""
    analysis, w = loaded("vit_split")
    qkv, proj = w["qkv.weight"].reshape(32, 3, 4, 8), w["proj.weight"].reshape(4, 8, 32)
    rows = [norms(qkv, 2, POWER[criterion]), norms(proj, 0, POWER[criterion])]
    np.testing.assert_allclose(score(analysis, "qkv:head", criterion), np.mean(rows, axis=0), rtol=1e-6)
    rows = [norms(qkv[:, :2], 3, POWER[criterion])]
    np.testing.assert_allclose(score(analysis, "qkv:qk-dim", criterion), rows[0], rtol=1e-6)
    rows = [norms(qkv[:, 2], 2, POWER[criterion]), norms(proj, 1, POWER[criterion])]
    np.testing.assert_allclose(score(analysis, "qkv:v-dim", criterion), np.mean(rows, axis=0), rtol=1e-6)


def test_norms_do_not_depend_on_the_exporter() -> None:
    """Recorded shapes of initializers, which exporters leave out at will, change nothing."""
    model = BUILT["residual_cnn"].build()
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for tensor in model.graph.initializer:
        named.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    plans = [spa.prune(m, target="macs=0.6", check=False).plan.removed for m in (model, named)]
    assert plans[0] == plans[1]


def test_quantised_weights_count_with_their_scales() -> None:
    analysis, w = loaded("qdq")
    real = w["c1.weight_q"].astype(np.float64) * w["c1.scale"][:, None, None, None]
    following = w["c2.weight_q"].astype(np.float64) * w["c2.scale"][:, None, None, None]
    expected = (norms(real, 0, 2) + norms(following, 1, 2)) / 2
    np.testing.assert_allclose(score(analysis, "c1.weight_q:channel", "l2"), expected, rtol=1e-5)


def test_four_bit_weights_count_with_their_scales() -> None:
    """Packed bytes are no magnitudes: half of them stand for small numbers."""
    analysis, w = loaded("four_bits")

    def unpacked(name: str, zeros: bool) -> np.ndarray:
        packed = w[f"{name}.packed"]
        n, blocks, half = packed.shape
        levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, blocks, 2 * half).astype(np.float64)
        point = np.full((n, blocks), 8.0)
        if zeros:
            bytes_ = w[f"{name}.zeros"].reshape(n, -1)
            point = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(n, -1)[:, :blocks]
        return (levels - point[..., None]) * w[f"{name}.scales"].reshape(n, blocks)[..., None]

    expected = (norms(unpacked("fc3", True), 0, 2) + norms(w["head.weight"], 0, 2)) / 2
    np.testing.assert_allclose(score(analysis, "fc3:neuron", "l2"), expected, rtol=1e-5)


def test_indices_are_no_weights() -> None:
    """Integer tables that are as long as a layer is wide must not be taken for its weights."""
    net = Net()
    y = net.linear(net.input("x", "n", 4), "a", 4, 16)
    y = net("GatherElements", y, net.value("table", np.arange(32).reshape(2, 16) % 2), axis=0)
    net.named(net.linear(y, "b", 16, 3), "y")
    model = net.model(y=(2, 3))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    analysis = spa.analyze(model)
    (group,) = analysis.groups
    assert "table" in {m.tensor for m in group.members}
    expected = (norms(weights["a.weight"], 1, 2) + norms(weights["b.weight"], 0, 2)) / 2
    np.testing.assert_allclose(score(analysis, group.name, "l2"), expected, rtol=1e-6)


@pytest.mark.parametrize("name", list(BUILT))
def test_every_group_can_be_scored(name: str) -> None:
    analysis = spa.analyze(BUILT[name].build())
    evidence = Evidence(analysis)
    for group in analysis.groups:
        for criterion in (c for c in CRITERIA.values() if c.needs == "weights"):
            scores = criterion.score(group, evidence, "mean")
            assert scores.shape == (group.units,)
            assert scores.dtype == np.float64
            assert np.isfinite(scores).all()
            assert (scores >= 0).all()


def test_bn_scale() -> None:
    """|gamma| of all norms that the channel passes; l2 where there is none."""
    analysis, w = loaded("residual_cnn")
    rows = [np.abs(w[f"{name}.bn.scale"]) for name in ("stem", "block.conv2")]
    np.testing.assert_allclose(score(analysis, "stem:channel", "bn-scale"), np.mean(rows, axis=0), rtol=1e-6)
    expected = score(analysis, "mix:channel", "l2")
    np.testing.assert_array_equal(score(analysis, "mix:channel", "bn-scale"), expected)
    analysis, w = loaded("vit_split")
    rows = [w[f"{name}.scale"] for name in ("norm1", "norm2", "norm")]
    np.testing.assert_allclose(score(analysis, "patch:hidden", "bn-scale"), np.mean(rows, axis=0), rtol=1e-6)


RANDOM = """
import spa
from spa.criteria import CRITERIA
from spa.evidence import Evidence
from tests.models import BUILT
analysis = spa.analyze(BUILT["residual_cnn"].build())
print([CRITERIA["random"].score(g, Evidence(analysis, 7)).tolist() for g in reversed(analysis.groups)])
"""


def test_random_is_the_same_everywhere() -> None:
    """In another process, whatever the order; another seed and another group give other numbers."""
    analysis, _ = loaded("residual_cnn")
    mine = [CRITERIA["random"].score(g, Evidence(analysis, 7)).tolist() for g in reversed(analysis.groups)]
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONHASHSEED": "99", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", RANDOM], capture_output=True, text=True, env=env, cwd=root, check=True)
    assert done.stdout.strip() == str(mine)
    other = [CRITERIA["random"].score(g, Evidence(analysis, 8)).tolist() for g in reversed(analysis.groups)]
    seen = [tuple(row) for row in mine + other]
    assert len(set(seen)) == len(seen)
    assert all(0 <= x < 1 for row in seen for x in row)


# -- normalising -------------------------------------------------------------------------------------------------------


def _groups(analysis: Analysis) -> tuple[list[Group], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return list(analysis.groups), {
        g.name: rng.gamma(2.0, size=g.units) * 10.0 ** rng.integers(-3, 3) for g in analysis.groups
    }


def test_formulas() -> None:
    groups, raw = _groups(loaded("residual_cnn")[0])
    for g in groups:
        s = raw[g.name]
        expected = {"none": s, "sum": s / s.sum(), "mean": s / s.mean(), "max": s / s.max(),
                    "gaussian": (s - s.mean()) / s.std()}  # fmt: skip
        for how, values in expected.items():
            np.testing.assert_allclose(normalise(raw, groups, how)[g.name], values, rtol=1e-4)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_dead_units_do_not_disturb(how: str) -> None:
    """All-zero groups stay finite; the order within a group is kept."""
    groups, raw = _groups(loaded("residual_cnn")[0])
    raw[groups[0].name] = np.zeros(groups[0].units)
    out = normalise(raw, groups, how)
    for g in groups:
        assert np.isfinite(out[g.name]).all()
        order = np.argsort(raw[g.name], kind="stable")
        assert (np.diff(out[g.name][order]) >= -1e-12).all()


def test_isomorphic_buckets() -> None:
    """Layers of one structure are ranked together, others apart; scales of layers do not matter, only places."""
    groups, raw = _groups(loaded("vit_split")[0])
    out = normalise(raw, groups, "isomorphic")
    for g in groups:  # no two groups here are alike: each is ranked alone
        np.testing.assert_allclose(np.sort(out[g.name]), np.arange(1, g.units + 1) / g.units)

    net = spa.analyze(_twice())
    first, second = net.groups[0], net.groups[1]
    raw = {g.name: np.linspace(1, 2, g.units) for g in net.groups}
    raw[second.name] = raw[second.name] + 100
    out = normalise(raw, net.groups, "isomorphic")
    assert out[first.name].max() < out[second.name].min()
    joined = np.concatenate([out[first.name], out[second.name]])
    np.testing.assert_allclose(np.sort(joined), np.arange(1, joined.size + 1) / joined.size)


def _twice() -> onnx.ModelProto:
    """Two MLP blocks of one structure in a row."""
    net = Net()
    x = net.input("x", "n", 8)
    for k in range(2):
        y = net("Relu", net.linear(x, f"up{k}", 8, 16))
        x = net("Add", x, net.linear(y, f"down{k}", 16, 8))
    net.named(net("Relu", x), "y")
    return net.model(y=("n", 8))
