"""Criteria that look at data, against plain numpy on activations that ONNX Runtime gives for the original graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

import spa
from spa.calibration import Calibration, load_calibration
from spa.criteria import CRITERIA, Aggregation
from spa.criteria.feature_moment import denoised_diagonal
from spa.criteria.obspa import consumers
from spa.errors import UsageError
from spa.evidence import Evidence
from spa.executors.collect import Setup
from spa.groups import Analysis
from spa.least_squares import Consumer, damped, greedy, loss_of, one_shot
from spa.measured import Measured
from tests.models import BUILT
from tests.net import Net
from tests.test_collect import activations, samples
from tests.test_least_squares import reference_loss

Array = np.ndarray
COUNT = 36
"""Enough samples for all matrices, and few enough that all positions of images are looked at."""


@dataclass(frozen=True)
class Read:
    """One reader of a group, by hand: which activation, which of its positions belong to which unit, which weight."""

    value: str
    axis: int
    units: Array
    weight: str
    transposed: bool = False


CNN = {
    "mix:channel": [Read("flatten31_out", 1, np.arange(40), "head.weight")],
    "block.conv1:channel": [Read("relu6_out", 1, np.arange(32), "block.conv2.weight")],
    "inverted.project:channel": [Read("concat27_out", 1, np.append(np.arange(48), [-1] * 16), "mix.weight")],
    "stem:channel": [
        Read("relu3_out", 1, np.arange(32), "block.conv1.weight"),
        Read("relu10_out", 1, np.arange(32), "inverted.expand.weight"),
        Read("relu10_out", 1, np.arange(32), "branch.weight"),
    ],
}
VIT = {
    "mlp.fc1:neuron": [Read("mul38_out", 2, np.arange(64), "mlp.fc2.weight", True)],
    "qkv:head": [Read("reshape27_out", 2, np.repeat(np.arange(4), 8), "proj.weight", True)],
    "qkv:v-dim": [Read("reshape27_out", 2, np.tile(np.arange(8), 4), "proj.weight", True)],
}
GROUPS = [("residual_cnn", g) for g in CNN] + [("vit_split", g) for g in VIT]


@dataclass(frozen=True)
class Known:
    """A built model with samples."""

    analysis: Analysis
    data: Calibration
    weights: dict[str, Array]
    values: dict[str, Array]

    def activation(self, read: Read) -> Array:
        """[samples, positions, channels], float64."""
        x = np.moveaxis(self.values[read.value].astype(np.float64), read.axis, -1)
        return x.reshape(len(x), -1, x.shape[-1])

    def matrix(self, read: Read) -> Array:
        """[m, channels, taps]."""
        w = self.weights[read.weight].astype(np.float64)
        w = w.T if read.transposed else w
        return w.reshape(*w.shape[:2], -1)

    def rows(self, read: Read) -> Array:
        """What the reader's outputs are sums over, [rows, channels, taps]; images of 3 x 3 convolutions are padded."""
        w, x = self.weights[read.weight], self.values[read.value].astype(np.float64)
        if w.ndim < 4 or w.shape[2:] == (1, 1):
            return self.activation(read).reshape(-1, x.shape[read.axis])[..., None]
        stride = 2 if read.weight == "branch.weight" else 1
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        view = sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        return view.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], 9)


@cache
def known(name: str) -> Known:
    model = BUILT[name].build()
    data = samples(model, COUNT // 2)
    table = CNN if name == "residual_cnn" else VIT
    names = sorted({r.value for reads in table.values() for r in reads})
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return Known(spa.analyze(model), data, weights, activations(model, data, names))


@cache
def evidence(name: str, batch: int = 32) -> Evidence:
    mine = known(name)
    return Evidence(mine.analysis, 0, Measured(mine.analysis, mine.analysis.groups, mine.data, Setup(batch)))


def per_unit(read: Read, values: Array) -> Array:
    return np.array([values[read.units == u].sum() for u in range(read.units.max() + 1)])


def distinct(reads: Sequence[Read]) -> list[Read]:
    """One per activation."""
    return list({r.value: r for r in reversed(reads)}.values())[::-1]


def reads_of(model: str, group: str) -> list[Read]:
    return (CNN if model == "residual_cnn" else VIT)[group]


def scored(model: str, group: str, criterion: str, batch: int = 32, how: Aggregation = "mean") -> Array:
    mine = known(model)
    found = mine.analysis.group(group)
    assert found is not None
    return CRITERIA[criterion].score(found, evidence(model, batch), how)


# -- statistics of activations -----------------------------------------------------------------------------------------


def formula(model: str, group: str, criterion: str) -> list[Array]:
    mine, out = known(model), []
    reads = reads_of(model, group)
    for r in reads if criterion == "fluctuation" else distinct(reads):
        h = mine.activation(r)
        if criterion == "variance":
            out.append(per_unit(r, h.reshape(-1, h.shape[2]).var(axis=0, ddof=1)))
        elif criterion == "fluctuation":
            energy = np.square(mine.matrix(r)).sum(axis=(0, 2))
            out.append(per_unit(r, h.reshape(-1, h.shape[2]).var(axis=0, ddof=1) * energy))
        elif criterion == "activation":
            out.append(np.sqrt(per_unit(r, np.square(np.abs(h).mean(1)).sum(0))))
        elif criterion == "activation-l2":
            out.append(per_unit(r, np.linalg.norm(h, axis=1).mean(0)))
        else:
            out.append(per_unit(r, np.square(h).mean(axis=(0, 1))))
    return out


@pytest.mark.parametrize(("model", "group"), GROUPS)
@pytest.mark.parametrize("criterion", ["variance", "fluctuation", "activation", "activation-l2", "activation-map"])
def test_statistics(model: str, group: str, criterion: str) -> None:
    rows = np.stack(formula(model, group, criterion))
    for how in ("mean", "sum", "max"):
        expected = getattr(rows, how)(axis=0)
        np.testing.assert_allclose(scored(model, group, criterion, how=how), expected, rtol=2e-4)


@pytest.mark.parametrize(("model", "group"), GROUPS)
def test_contributions(model: str, group: str) -> None:
    """AMP: mean |h W| of units with several columns, under a normal h W; mean |h| of others."""
    mine, rows = known(model), []
    for r in reads_of(model, group):
        x, w = mine.rows(r), mine.matrix(r)
        wide = w.shape[2] > 1 or np.bincount(r.units[r.units >= 0]).max() > 1
        if not wide:
            continue
        total = []
        for u in range(r.units.max() + 1):
            c = np.flatnonzero(r.units == u)
            z = np.einsum("nck,mck->nm", x[:, c], w[:, c])
            total.append(np.sqrt(2 / np.pi * np.square(z).mean(0)).sum())
        rows.append(np.array(total))
    if not rows:
        rows = [per_unit(r, np.abs(mine.activation(r)).mean(axis=(0, 1))) for r in distinct(reads_of(model, group))]
    np.testing.assert_allclose(scored(model, group, "amp"), np.mean(rows, axis=0), rtol=1e-3)


def test_relative_weights_times_activations() -> None:
    """CFSP on the neurons of an MLP and on channels: (share of |w| ||h|| + share of |w_out|) ||h||."""
    mine = known("vit_split")
    (r,) = VIT["mlp.fc1:neuron"]
    norm = np.sqrt(np.square(mine.activation(r)).mean(axis=(0, 1)))
    read = np.abs(mine.matrix(r)).sum(axis=(0, 2)) * norm
    made = np.abs(mine.weights["mlp.fc1.weight"].astype(np.float64)).sum(0)
    expected = (read / read.sum() + made / made.sum()) * norm
    np.testing.assert_allclose(scored("vit_split", "mlp.fc1:neuron", "cfsp"), expected, rtol=1e-4)
    mine, rows = known("residual_cnn"), []
    made = np.zeros(32)
    for name in ("stem.weight", "block.conv2.weight"):
        own = np.abs(mine.weights[name].astype(np.float64)).sum(axis=(1, 2, 3))
        made += own / own.sum()
    for r in CNN["stem:channel"]:
        norm = np.sqrt(np.square(mine.activation(r)).mean(axis=(0, 1)))
        read = np.abs(mine.matrix(r)).sum(axis=(0, 2)) * norm
        rows.append((read / read.sum() + made) * norm)
    np.testing.assert_allclose(scored("residual_cnn", "stem:channel", "cfsp"), np.mean(rows, axis=0), rtol=1e-4)


def test_denoising() -> None:
    """Pure noise has (almost) no signal; a strong low-rank signal keeps its own diagonal."""
    rng = np.random.default_rng(0)
    rows, d = 2000, 60
    noise = rng.normal(size=(rows, d))
    cov = np.cov(noise.T, bias=True)
    assert denoised_diagonal(cov, rows).sum() < 0.2 * np.trace(cov)
    basis = rng.normal(size=(3, d)) * 2
    mixed = rng.normal(size=(rows, 3)) @ basis + noise
    got = denoised_diagonal(np.cov(mixed.T, bias=True), rows)
    np.testing.assert_allclose(got, np.square(basis).sum(0), rtol=0.25, atol=0.5)
    assert (denoised_diagonal(np.zeros((4, 4)), 10) == 0).all()


@pytest.mark.parametrize(("model", "group"), [("residual_cnn", "stem:channel"), ("vit_split", "qkv:head")])
def test_denoised_moments(model: str, group: str) -> None:
    """By singular values of the centred patches, mean over kernel taps."""
    mine, rows = known(model), []
    for r in reads_of(model, group):
        x = mine.rows(r)
        flat = x.reshape(len(x), -1)
        _, s, v = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
        values = np.zeros(flat.shape[1])
        values[: len(s)] = s**2 / len(flat)
        edge = (1 + np.sqrt(len(values) / len(flat))) ** 2
        noise = np.median(values)
        for _ in range(20):
            noise = values[values <= noise * edge].mean()
        signal = values[: len(s)] > noise * edge
        diagonal = (np.square(v[signal]) * values[: len(s)][signal, None]).sum(0).reshape(x.shape[1:])
        rows.append(per_unit(r, diagonal.mean(1)))
    np.testing.assert_allclose(scored(model, group, "feature-moment"), np.mean(rows, axis=0), rtol=2e-3)


# -- optimal brain surgeon ---------------------------------------------------------------------------------------------


@cache
def by_hand(model: str, group: str) -> list[Consumer]:
    """Least-squares problems whose columns are ordered channel by channel."""
    mine, out = known(model), []
    for r in reads_of(model, group):
        x, w = mine.rows(r), mine.matrix(r)
        taps = w.shape[2]
        flat = x.reshape(len(x), -1)
        cov = np.cov(flat.T, bias=True)
        width = int(np.bincount(r.units[r.units >= 0]).max()) * taps
        columns = np.stack([
            (np.flatnonzero(r.units == u)[:, None] * taps + np.arange(taps)).reshape(-1)
            for u in range(r.units.max() + 1)
        ])  # fmt: skip
        assert columns.shape[1] == width
        matrix = w.reshape(len(w), -1)
        importance = 1 / np.einsum("md,de,me->", matrix, cov, matrix)
        out.append(Consumer.of(matrix, cov, columns, float(importance), 1e-2))
    return out


@pytest.mark.parametrize(("model", "group"), GROUPS)
def test_the_first_to_leave_is_the_cheapest(model: str, group: str) -> None:
    """Its score is the loss of a least-squares fit without it; the sum of all is the whole, and the order is greedy."""
    problems = by_hand(model, group)
    units = len(problems[0].columns)
    alone = one_shot(problems)
    scores = scored(model, group, "obspa")
    first = int(np.argmin(scores))
    assert scores[first] == pytest.approx(reference_loss(problems, [first], digits=16), rel=1e-3)
    assert alone[first] <= alone.min() * (1 + 1e-3)
    assert scores[first] == pytest.approx(alone.min(), rel=1e-3)
    order = np.argsort(scores, kind="stable")
    found = greedy(problems)
    for k in (1, 2, units // 2, units - 1):  # near ties may come in another order
        mine = loss_of(problems, order[:k])
        assert mine == pytest.approx(found.loss[k], rel=1e-2, abs=1e-9)
    assert (np.diff(scores[order]) > 0).all()


@pytest.mark.parametrize(("model", "group"), GROUPS)
def test_problems_are_built_as_by_hand(model: str, group: str) -> None:
    mine = known(model)
    found = mine.analysis.group(group)
    assert found is not None
    got = consumers(found, evidence(model).measured)
    assert consumers(found, evidence(model).measured) is got
    for one, two in zip(got, by_hand(model, group), strict=True):
        assert one.importance == pytest.approx(two.importance, rel=1e-3)
        np.testing.assert_allclose(one_shot([one]), one_shot([two]), rtol=5e-3)


def test_the_papers_own_score() -> None:
    """SPA: w^2 / [H^-1]_jj summed over the slices of consumers and producers, H from uncentred inputs."""
    mine = known("vit_split")
    (r,) = VIT["mlp.fc1:neuron"]
    norm2 = activations(BUILT["vit_split"].build(), mine.data, ["norm2_out"])["norm2_out"].astype(np.float64)
    rows = []
    for x, w, axis in (
        (mine.rows(r)[..., 0], mine.matrix(r)[..., 0], 0),
        (norm2.reshape(-1, 32), mine.weights["mlp.fc1.weight"].astype(np.float64).T, 1),
    ):
        second = damped(x.T @ x / len(x), 1e-2)
        rows.append((np.square(w) / np.diag(np.linalg.inv(second))).sum(axis))
    np.testing.assert_allclose(scored("vit_split", "mlp.fc1:neuron", "obspa-paper"), np.mean(rows, axis=0), rtol=1e-3)


def test_the_papers_own_score_of_a_grouped_transposed_convolution() -> None:
    """Outputs of both groups leave together; the first axis of the weight holds inputs, not what is produced."""
    rng = np.random.default_rng(3)
    up, head = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 3, 1, 1), (4, 6, 1, 1)))
    net = Net()
    x = net.input("x", "n", 8, 1, 1)  # one position: all are looked at
    hidden = net("ConvTranspose", x, net.value("up.weight", up), name="up", group=2)
    net("Conv", hidden, net.value("head.weight", head), name="head")
    model = net.model(head_out=["n", 4, 1, 1])
    images = rng.normal(size=(400, 8, 1, 1)).astype(np.float32)
    data = load_calibration({"x": images}, spa.load(model).model)
    analysis = spa.analyze(model)
    (group,) = (g for g in analysis.groups if g.name == "up:channel")
    assert {(m.tensor, m.axis): m.role for m in group.members} == {("up.weight", 1): "out", ("head.weight", 1): "in"}
    scores = CRITERIA["obspa-paper"].score(group, Evidence(analysis, 0, Measured(analysis, analysis.groups, data)))

    pixels = images.transpose(0, 2, 3, 1).reshape(-1, 2, 4).astype(np.float64)
    weight = up.astype(np.float64).reshape(2, 4, 3)
    made = np.einsum("pgc,gcm->pgm", pixels, weight).reshape(len(pixels), 6)

    def inverse(x: Array) -> Array:
        return np.asarray(np.diag(np.linalg.inv(damped(x.T @ x / len(x), 1e-2))))

    produced = sum((np.square(weight[g]) / inverse(pixels[:, g])[:, None]).sum(axis=0) for g in range(2))
    consumed = (np.square(head[..., 0, 0]) / inverse(made)).sum(axis=0).reshape(2, 3).sum(axis=0)
    np.testing.assert_allclose(scores, (produced + consumed) / 2, rtol=1e-3)


def test_query_and_key_dims_go_by_the_power_of_their_product() -> None:
    """No weight reads them: both sides of q k^T are activations."""
    mine = known("vit_split")
    names = ["transpose19_out", "transpose21_out"]
    q, k = activations(BUILT["vit_split"].build(), mine.data, names).values()
    product = np.square(q.astype(np.float64)).mean((0, 1, 2)) * np.square(k.astype(np.float64)).mean((0, 1, 3))
    np.testing.assert_allclose(scored("vit_split", "qkv:qk-dim", "obspa"), product / product.sum(), rtol=1e-4)


# -- in general --------------------------------------------------------------------------------------------------------

DATA = [c.name for c in CRITERIA.values() if c.needs == "data"]


@pytest.mark.parametrize("criterion", DATA)
def test_batches_do_not_matter(criterion: str) -> None:
    for model, group in (("residual_cnn", "stem:channel"), ("vit_split", "qkv:head"), ("vit_split", "mlp.fc1:neuron")):
        one, two = (scored(model, group, criterion, batch) for batch in (5, 32))
        np.testing.assert_allclose(one, two, rtol=1e-3 if "obspa" in criterion else 1e-5)


@pytest.mark.parametrize("name", ["flat_cnn", "unet", "decoder", "swin", "experts", "behind", "picked", "lstm_tagger",
                                  "fused_bert", "four_bits", "qdq", "branches", "loop", "opset7", "half"])  # fmt: skip
def test_every_group_has_scores(name: str) -> None:
    model = BUILT[name].build()
    analysis = spa.analyze(model)
    evidence = Evidence(analysis, 0, Measured(analysis, analysis.groups, samples(model, 60)))
    for group in analysis.groups:
        for criterion in DATA:
            scores = CRITERIA[criterion].score(group, evidence)
            assert scores.shape == (group.units,)
            assert np.isfinite(scores).all(), criterion
            assert (scores >= 0).all(), criterion


def test_constant_channels_are_the_first_to_leave() -> None:
    """A channel that is the same everywhere costs nothing once its mean is known; a large mean alone is no merit."""
    model = _with_constants()
    analysis = spa.analyze(model)
    (group,) = [g for g in analysis.groups if g.name.startswith("a")]
    evidence = Evidence(analysis, 0, Measured(analysis, analysis.groups, samples(model, 40)))
    for criterion in ("variance", "fluctuation", "obspa", "feature-moment"):
        scores = CRITERIA[criterion].score(group, evidence)
        assert set(np.argsort(scores)[:3].tolist()) == {1, 4, 5}, criterion


def _with_constants() -> onnx.ModelProto:
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 16))
    net.weights["a.weight"][[1, 4, 5]] = 0
    net.weights["a.bias"][[1, 4, 5]] = [50, 3, -1]
    net.named(net.gemm(x, "b", 16, 4), "y")
    return net.model(y=("n", 4))


def test_without_data_it_says_what_to_give() -> None:
    analysis = known("residual_cnn").analysis
    for name in DATA:
        with pytest.raises(UsageError, match="--calibration"):
            CRITERIA[name].score(analysis.groups[0], Evidence(analysis))
