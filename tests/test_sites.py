"""Linear operators as matrices: matrix times patches is what ONNX Runtime computes, and its moments are numpy's."""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.executors.meter import Meter
from spa.executors.patches import output_space, sample, spread_evenly, window
from spa.graph import load
from spa.least_squares import Refitter
from spa.moments import Joint
from spa.runtime import place
from spa.sites import Site, find_sites
from tests.net import Net

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One operator: its weight, and the shape of what it reads (batch included)."""

    op: str
    weight: tuple[int, ...]
    data: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    domain: str = ""


def conv(weight: tuple[int, ...], *space: int, group: int = 1, bias: bool = True, **attributes: Any) -> Case:
    return Case("Conv", weight, (3, weight[1] * group, *space), {"group": group, **attributes}, bias)


def back(weight: tuple[int, ...], *space: int, group: int = 1, bias: bool = True, **attributes: Any) -> Case:
    return Case("ConvTranspose", weight, (3, weight[0], *space), {"group": group, **attributes}, bias)


CASES = {
    "conv1d": conv((6, 4, 3), 9, pads=[1, 1]),
    "conv1d dilated": conv((6, 4, 3), 12, dilations=[3], pads=[2, 0]),
    "conv": conv((6, 4, 3, 3), 5, 7, pads=[1, 1, 1, 1]),
    "conv no bias": conv((6, 4, 3, 3), 5, 7, bias=False),
    "conv 1x1": conv((6, 4, 1, 1), 5, 7),
    "conv stride": conv((6, 4, 3, 3), 8, 7, pads=[1, 1, 1, 1], strides=[2, 3]),
    "conv asymmetric": conv((6, 4, 2, 3), 6, 7, pads=[0, 2, 1, 0], strides=[2, 1], dilations=[1, 2]),
    "conv groups": conv((6, 2, 3, 3), 6, 6, group=3, pads=[1, 1, 1, 1]),
    "depthwise": conv((8, 1, 3, 3), 6, 6, group=4, pads=[1, 1, 1, 1], strides=[2, 2]),
    "same upper": conv((6, 4, 4, 3), 7, 8, auto_pad="SAME_UPPER", strides=[2, 3]),
    "same lower": conv((6, 4, 4, 2), 7, 8, auto_pad="SAME_LOWER", strides=[2, 1]),
    "same, stride beyond kernel": conv((6, 4, 2, 2), 9, 9, auto_pad="SAME_UPPER", strides=[4, 4]),
    "valid": conv((6, 4, 3, 3), 7, 8, auto_pad="VALID", strides=[2, 2]),
    "conv3d": conv((5, 3, 2, 3, 2), 4, 5, 6, pads=[1, 0, 1, 0, 1, 1], strides=[1, 2, 1]),
    "transposed": back((4, 6, 3, 3), 4, 5),
    "transposed 1d": back((4, 6, 4), 5, strides=[2], pads=[1, 1]),
    "transposed stride": back((4, 6, 3, 2), 4, 5, strides=[2, 3], pads=[1, 0, 0, 1]),
    "transposed padded": back((4, 6, 3, 3), 4, 5, strides=[2, 2], pads=[1] * 4, output_padding=[1, 0], bias=False),
    "transposed groups": back((6, 3, 3, 3), 4, 4, group=2, strides=[2, 1], pads=[1, 1, 1, 1]),
    "transposed dilated": back((4, 6, 2, 3), 4, 5, dilations=[3, 2], strides=[2, 1], pads=[2, 1, 0, 0]),
    "transposed same": back((4, 6, 3, 3), 4, 5, auto_pad="SAME_UPPER", strides=[2, 2]),
    "transposed same lower": back((4, 6, 3, 3), 4, 5, auto_pad="SAME_LOWER", strides=[2, 2]),
    "transposed to a shape": back((4, 6, 3, 3), 4, 5, output_shape=[8, 11], strides=[2, 2]),
    "transposed to a shape, upper": back(
        (4, 6, 3, 3), 4, 5, output_shape=[8, 9], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "transposed to a shape, lower": back(
        (4, 6, 3, 3), 4, 5, output_shape=[8, 9], strides=[2, 2], auto_pad="SAME_LOWER"
    ),
    "transposed 3d": back((3, 2, 2, 2, 3), 3, 3, 3, strides=[2, 1, 2], pads=[0, 1, 0, 0, 0, 1]),
    "gemm": Case("Gemm", (5, 7), (4, 5)),
    "gemm turned": Case("Gemm", (7, 5), (4, 5), {"transB": 1}),
    "gemm scaled": Case("Gemm", (7, 5), (4, 5), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "gemm no bias": Case("Gemm", (5, 7), (4, 5), {"alpha": -1.5}, bias=False),
    "matmul": Case("MatMul", (5, 7), (4, 3, 5), bias=False),
    "matmul on images": Case("MatMul", (5, 7), (4, 3, 2, 5), bias=False),
    "fused": Case("FusedMatMul", (5, 7), (4, 3, 5), {"alpha": 0.25}, bias=False, domain="com.microsoft"),
    "fused turned": Case("FusedMatMul", (7, 5), (4, 3, 5), {"transB": 1, "alpha": 3.0}, False, "com.microsoft"),
}


def built(case: Case) -> onnx.ModelProto:
    net = Net()
    x = net.input("x", "n", *case.data[1:])
    inputs = [x, net.weight("w", *case.weight)]
    if case.bias:
        turned = case.op == "Gemm" and not case.attributes.get("transB")
        outputs = (
            case.weight[1] * case.attributes.get("group", 1) if case.op == "ConvTranspose" else case.weight[turned]
        )
        inputs.append(net.weight("b", outputs))
    net.named(net(case.op, *inputs, name="op", domain=case.domain, **case.attributes), "y")
    return net.model(y=[None] * len(case.data))


def site_of(model: onnx.ModelProto) -> Site:
    (site,) = find_sites(load(model).model)
    return site


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def numbers(case: Case, seed: int = 0, count: int | None = None) -> Array:
    rng = np.random.default_rng(seed)
    shape = (count or case.data[0], *case.data[1:])
    return (rng.normal(size=shape) * 0.7 + 0.3).astype(np.float32)


def patches(site: Site, x: Array, chosen: Array | None = None) -> Array:
    """[rows, g, k c] of an activation, by the site's own indices; all positions unless some are chosen."""
    if site.layout == "tokens":
        flat = x.reshape(len(x), -1, site.channels)
        flat = flat if chosen is None else flat[:, chosen]
        return flat.reshape(-1, 1, site.channels).astype(np.float64)
    out = output_space(site, x.shape[2:])
    at = window(site, x.shape[2:], out, np.arange(math.prod(out)) if chosen is None else chosen)
    flat = np.pad(x.reshape(*x.shape[:2], -1).astype(np.float64), ((0, 0), (0, 0), (0, 1)))
    read = flat[:, :, at].reshape(len(x), site.groups, site.channels, len(at), site.taps)
    return read.transpose(0, 3, 1, 4, 2).reshape(-1, site.groups, site.columns)


def outputs(site: Site, y: Array, chosen: Array | None = None) -> Array:
    """[rows, g m]."""
    if site.layout == "tokens":
        flat = y.reshape(len(y), -1, y.shape[-1])
        return (flat if chosen is None else flat[:, chosen]).reshape(-1, y.shape[-1])
    flat = y.reshape(*y.shape[:2], -1).transpose(0, 2, 1)
    return (flat if chosen is None else flat[:, chosen]).reshape(-1, y.shape[1])


def check_operator(case: Case) -> None:
    model = built(case)
    site, x = site_of(model), numbers(case)
    y = run(model, x)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weight = site.matrix(stored["w"])
    assert weight.shape == (site.groups, site.rows, site.columns)
    np.testing.assert_allclose(site.stored(weight), stored["w"].astype(np.float64), rtol=1e-12)
    np.testing.assert_array_equal(site.weights, weight)
    if site.layout != "tokens":
        assert output_space(site, x.shape[2:]) == y.shape[2:]
    mine = np.einsum("gmd,ngd->ngm", weight, patches(site, x)).reshape(-1, site.groups * site.rows)
    assert (site.bias is not None) == case.bias
    if case.bias:
        mine = mine + site.bias_scale * stored["b"]
    np.testing.assert_allclose(mine, outputs(site, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_matrix_times_patches_is_the_operator(name: str) -> None:
    check_operator(CASES[name])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    """Any kernel, stride, dilation, pads and groups, plain and transposed, in one to three dimensions."""
    rank = data.draw(st.integers(1, 3))

    def few(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(rank)]

    kernel, strides, dilations, group = few(1, 3), few(1, 3), few(1, 2), data.draw(st.integers(1, 3))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": group}
    if data.draw(st.booleans()):
        attributes["pads"] = [min(p, s - 1) for p, s in zip(few(0, 2) + few(0, 2), spans * 2, strict=True)]
        space = [s + n for s, n in zip(spans, few(0, 3), strict=True)]
        check_operator(conv((2 * group, 2, *kernel), *space, **attributes))
    else:
        attributes["output_padding"] = [min(p, s - 1) for p, s in zip(few(0, 2), strides, strict=True)]
        attributes["pads"] = [min(p, (s - 1) // 2) for p, s in zip(few(0, 1) + few(0, 1), spans * 2, strict=True)]
        check_operator(back((2 * group, 2, *kernel), *few(1, 4), **attributes))


def test_kinds_of_weights_that_are_no_sites() -> None:
    """Shared, computed and batched weights, and constants on the other side; turned at run time is no hindrance."""
    net = Net()
    x = net.input("x", "n", 4, 6)
    shared = net.weight("shared", 6, 6)
    a = net("MatMul", net("MatMul", x, shared), shared)
    a = net("MatMul", a, net("Transpose", net.weight("turned", 5, 6), perm=[1, 0]))
    a = net("MatMul", a, net("Transpose", net.weight("kept", 5, 6), perm=[0, 1]))
    twice = net("Transpose", net.weight("twice", 6, 6), perm=[1, 0])
    a = net("MatMul", net("MatMul", a, twice), twice)
    a = net("MatMul", a, net.weight("batched", 1, 6, 6))
    a = net("MatMul", net.weight("left", 4, 4), a)
    last = net.linear(a, "last", 6, 3)
    net.named(last, "y")
    sites = find_sites(load(net.model(y=("n", 4, 3))).model)
    assert [s.weight.name for s in sites] == ["turned", "last.weight"]
    np.testing.assert_array_equal(sites[0].weights[0], net.weights["turned"])
    np.testing.assert_array_equal(sites[0].stored(sites[0].weights), net.weights["turned"])
    assert sites[1].bias is not None
    assert sites[1].bias.name == "last.bias"


def test_biases_are_only_taken_if_they_are_the_layers_own() -> None:
    net = Net()
    x = net.input("x", "n", 6)
    zero = net.value("zero", np.zeros(6))
    a = net("Gemm", x, net.weight("w1", 6, 6), zero, name="g1")
    a = net("Gemm", a, net.weight("w2", 6, 6), zero, name="g2")
    a = net("Add", net("MatMul", a, net.weight("w3", 6, 6)), zero)
    m = net("MatMul", a, net.weight("w4", 6, 1))
    wide = net("Add", m, net.weight("wide", 6))  # broadcasts: no bias of one output
    b = net("MatMul", wide, net.weight("w5", 6, 6))
    net.named(net("Add", b, net.weight("column", 6, 1)), "y")  # one number per row
    sites = {s.weight.name: s for s in find_sites(load(net.model(y=(6, 6))).model)}
    assert {name: s.bias for name, s in sites.items()} == dict.fromkeys(("w1", "w2", "w3", "w4", "w5"))


# -- moments -----------------------------------------------------------------------------------------------------------


def reference(rows: Array, targets: Array | None = None, groups: int = 1) -> tuple[Array, Array | None, Array | None]:
    """Cov(x) [g, d, d], Cov(t, x) [g, m, d] and Var(t) [g, m] in numpy."""
    centred = rows - rows.mean(0)
    cov = np.einsum("ngd,nge->gde", centred, centred) / len(rows)
    if targets is None:
        return cov, None, None
    t = targets.reshape(len(targets), groups, -1)
    apart = t - t.mean(0)
    return cov, np.einsum("ngm,ngd->gmd", apart, centred) / len(rows), np.square(apart).mean(0)


def close(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def chosen_positions(site: Site, x: Array, samples: int) -> Array | None:
    """The positions that a meter looks at; None for all."""
    if site.layout == "tokens":
        return None if x.ndim < 3 else sample(site, x.shape[1:-1], samples)
    return sample(site, output_space(site, x.shape[2:]), samples)


@pytest.mark.parametrize("samples", [3, 100000], ids=["all positions", "some positions"])
@pytest.mark.parametrize("name", CASES)
def test_measured_moments(name: str, samples: int) -> None:
    """Of the inputs and of targets that come with more channels than the site has."""
    case = CASES[name]
    model = built(case)
    site = site_of(model)
    batches = [numbers(case, k, n) for k, n in enumerate((4, 1, 3))]
    x = np.concatenate(batches)
    y = run(model, x)
    at = chosen_positions(site, x, samples)
    rows = patches(site, x, at)
    plain = Meter(site, samples)
    for batch in batches:
        plain.add(place(batch))
    total = plain.moments()
    assert total is not None
    assert total.rows == len(rows)
    cov, _, _ = reference(rows)
    close(total.covariance, cov)
    close(total.mean_x, rows.mean(0))

    # the original has two channels more, in between
    width, axis = site.groups * site.rows, -1 if site.layout == "tokens" else 1
    select = np.delete(np.arange(width + 2), [1, width])
    shape = list(y.shape)
    shape[axis] = width + 2
    wide = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    np.moveaxis(wide, axis, 0)[select] += np.moveaxis(y, axis, 0)
    meter = Meter(site, samples, select=select, width=width + 2)
    start = 0
    for batch in batches:
        meter.add(place(batch), {"t": place(np.ascontiguousarray(wide[start : start + len(batch)]))})
        start += len(batch)
    targets = outputs(site, wide, at)[:, select]
    cov, cross, variance = reference(rows, targets, site.groups)
    total = meter.moments()
    assert total is not None
    assert cross is not None
    assert variance is not None
    close(total.covariance, cov)
    close(total.cross, cross)
    close(total.variance_t, variance)
    close(total.mean_t, targets.mean(0).reshape(site.groups, -1))


def test_measured_with_a_residual_branch() -> None:
    """t + (plus - minus) / scale, where plus has the original's channels and minus those of the pruned model."""
    for name in ("conv groups", "matmul", "gemm", "transposed stride"):
        case = CASES[name]
        model = built(case)
        site, x = site_of(model), numbers(case, 0, 6)
        y = run(model, x)
        width, axis = site.groups * site.rows, -1 if site.layout == "tokens" else 1
        rng = np.random.default_rng(2)
        select = np.arange(width) + 1
        shape = list(y.shape)
        shape[axis] = width + 3
        wide, plus = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        minus, scale = rng.normal(size=y.shape).astype(np.float32), rng.uniform(0.5, 2, width).astype(np.float32)
        scale[::2] *= -1
        meter = Meter(site, 6, select=select, width=width + 3, skip=True)
        given = {"t": wide, "plus": plus, "minus": minus, "scale": scale}
        meter.add(place(x), {k: place(v) for k, v in given.items()})
        at = chosen_positions(site, x, 6)
        flat = [outputs(site, a, at) for a in (wide, plus, minus)]
        targets = flat[0][:, select] + (flat[1][:, select] - flat[2]) / scale
        _, cross, variance = reference(patches(site, x, at), targets, site.groups)
        total = meter.moments()
        assert total is not None
        assert cross is not None
        assert variance is not None
        close(total.cross, cross)
        close(total.variance_t, variance)


@pytest.mark.parametrize("name", ["conv groups", "matmul", "gemm", "matmul on images"])
def test_halves(name: str) -> None:
    """Every second sample, over batches of any size; together they are all samples."""
    case = CASES[name]
    model = built(case)
    site, x = site_of(model), numbers(case, 0, 9)
    y = run(model, x)
    width = site.groups * site.rows
    halves, plain = (Meter(site, 9, width=width) for _ in range(2))
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        one, two = place(x[start:stop]), {"t": place(y[start:stop])}
        halves.split(one, two)
        plain.add(one, two)
    at = chosen_positions(site, x, 9)
    first, second = halves.halves()
    for k, half in enumerate((first, second)):
        assert half is not None
        cov, cross, _ = reference(patches(site, x[k::2], at), outputs(site, y[k::2], at), site.groups)
        assert cross is not None
        close(half.covariance, cov)
        close(half.cross, cross)
    whole = plain.moments()
    assert whole is not None
    assert second is not None
    first.merge(second)
    assert first.rows == whole.rows
    close(first.covariance, whole.covariance)
    close(first.cross, whole.cross)
    single = Meter(site, 1, width=width)
    single.split(place(x[:1]), {"t": place(y[:1])})
    assert single.halves()[1] is None


def test_wide_inputs_in_many_batches() -> None:
    """Rows are held until they are worth a Gram matrix, which is then computed in tiles."""
    net = Net()
    net.named(net("MatMul", net.input("x", "n", 50, 1030), net.weight("w", 1030, 3)), "y")
    site = site_of(net.model(y=("n", 50, 3)))
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(size=1030), 1, (46, 50, 1030)).astype(np.float32)
    t = rng.normal(size=(46, 50, 3)).astype(np.float32)
    meter = Meter(site, 1, width=3)
    for start, stop in ((0, 1), (1, 4), (4, 30), (30, 31), (31, 46)):
        meter.add(place(x[start:stop]), {"t": place(t[start:stop])})
    cov, cross, _ = reference(x.reshape(-1, 1, 1030).astype(np.float64), t.reshape(-1, 3))
    total = meter.moments()
    assert total is not None
    assert total.rows == 2300
    assert cross is not None
    close(total.covariance, cov)
    close(total.cross, cross)


def test_half_precision_is_widened_first() -> None:
    net = Net(dtype=np.float16)
    net.named(net("MatMul", net.input("x", "n", 5, 6), net.weight("w", 6, 4)), "y")
    site = site_of(net.model(y=("n", 5, 4)))
    rng = np.random.default_rng(0)
    x, t = rng.normal(100, 1, (64, 5, 6)).astype(np.float16), rng.normal(size=(64, 5, 4)).astype(np.float32)
    meter = Meter(site, 1, width=4, dtypes=(ir.DataType.FLOAT16, ir.DataType.FLOAT))
    meter.add(place(x), {"t": place(t)})
    cov, cross, _ = reference(x.reshape(-1, 1, 6).astype(np.float64), t.reshape(-1, 4))
    total = meter.moments()
    assert total is not None
    assert cross is not None
    close(total.covariance, cov)
    close(total.cross, cross)


# -- activations behind a site -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, 0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "keep"), [("conv groups", 0), ("conv groups", 2**30), ("gemm turned", 0), ("matmul", 2**30)]
)
def test_bent_targets(name: str, keep: int, skip: bool, low: float, high: float) -> None:
    """The kernel against numpy, and what it is for: a bound of the error behind the activation never rises.

    The bound counts (y' - y)^2 where the activation lets the original pass, and by how much y' is inside where it does
    not. Each round is the best bound over targets, then over weights.
    """
    case = CASES[name]
    model = built(case)
    site, x = site_of(model), numbers(case, 0, 40)
    y = run(model, x)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    g, m, width = site.groups, site.rows, site.groups * site.rows
    t = (y + rng.normal(size=y.shape)).astype(np.float32)
    plus, minus = (rng.normal(size=y.shape).astype(np.float32) for _ in range(2))
    scale = rng.uniform(0.5, 2, width) * rng.choice([-1, 1], width)
    shift = rng.normal(size=width)
    rows = patches(site, x)
    flat = [outputs(site, a).astype(np.float64) for a in (t, plus, minus)]
    wanted = flat[0] + (flat[1] - flat[2]) / scale if skip else flat[0]
    rest = shift + (flat[2] if skip else 0.0)

    def clip(z: Array) -> Array:
        return np.clip(z, low, high)

    behind = clip(scale * wanted + rest)

    def out(weight: Array, offset: Array) -> Array:
        return (np.einsum("gmd,ngd->ngm", weight, rows) + offset).reshape(len(rows), width)

    def bound(now: Array) -> Array:
        z = scale * wanted + rest
        gap = np.where(z < low, np.maximum(now - low, 0), np.where(z > high, np.minimum(now - high, 0), now - z))
        assert (np.square(gap) >= np.square(clip(now) - behind) - 1e-9).all()
        return np.square(gap / scale).sum(axis=0)

    cov, cross, _ = reference(rows, wanted, g)
    assert cross is not None
    solvers = [Refitter(cov[k], np.zeros((m, site.columns)), 1e-12) for k in range(g)]
    weight = np.stack([s(cross[k]) for k, s in enumerate(solvers)])
    offset = wanted.mean(0).reshape(g, m) - np.einsum("gmd,gd->gm", weight, rows.mean(0))
    bounds = [bound(scale * out(weight, offset) + rest)]
    for _ in range(5):
        now = scale * out(weight, offset) + rest
        z = scale * wanted + rest
        bent = np.where(z < low, np.minimum(now, low), np.where(z > high, np.maximum(now, high), z))
        bent = (bent - rest) / scale
        meter = Meter(site, 1, width=width, skip=skip, keep=keep)
        bend: dict[str, Any] = {
            "scale": scale, "shift": shift, "weight": weight, "offset": offset[:, None],
            "low": np.clip(low, -1e30, 1e30), "high": np.clip(high, -1e30, 1e30),
        }  # fmt: skip
        given = {"t": t, **({"plus": plus, "minus": minus, "scale": scale} if skip else {})}
        values = [{k: place(np.asarray(v, dtype=np.float32)) for k, v in each.items()} for each in (given, bend)]
        for _ in range(2 if keep else 1):  # twice the same samples: the same moments
            meter.add(place(x), values[0])
        assert meter.moments() is not None
        moments: Joint | None = meter.bent(values[1], [(place(x), values[0])] if not keep else [])
        _, cross, variance = reference(rows, bent, g)
        assert moments is not None
        assert cross is not None
        assert variance is not None
        close(moments.cross, cross)
        close(moments.variance_t, variance)
        close(moments.mean_t, bent.mean(0).reshape(g, m))
        weight = np.stack([s(moments.cross[k]) for k, s in enumerate(solvers)])
        offset = moments.mean_t - np.einsum("gmd,gd->gm", weight, rows.mean(0))
        bounds.append(bound(scale * out(weight, offset) + rest))
    for before, after in itertools.pairwise(bounds):
        assert (after <= before * (1 + 1e-4) + 1e-6).all()
    assert bounds[-1].sum() < bounds[0].sum()


# -- which positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "count"), [((8, 8), 9), ((28, 28), 40), ((196,), 20), ((3, 5, 7), 11), ((1, 6), 6)])
def test_positions_cover_a_grid_evenly(space: tuple[int, ...], count: int) -> None:
    """Each half along each axis has its share of them, give or take three; drawn by chance it often has not."""
    found = spread_evenly(space, count)
    assert len(set(found.tolist())) == count
    for along, size in zip(np.unravel_index(found, space), space, strict=True):
        low = float((along < size / 2).mean())
        assert abs(low - math.ceil(size / 2) / size) * count <= 3
    assert sorted(spread_evenly(space, math.prod(space)).tolist()) == list(range(math.prod(space)))


def test_samples_of_positions() -> None:
    """The same for everybody, sorted, without repetition, and enough rows for the columns."""
    site = site_of(built(CASES["conv"]))
    assert sample(site, (10,), 1).tolist() == list(range(10))
    few = sample(site, (1000,), 50)
    np.testing.assert_array_equal(few, sample(site, (1000,), 50))
    assert (np.diff(few) > 0).all()
    assert few[-1] < 1000
    assert len(few) * 50 >= 20 * site.columns or len(few) >= 1000 * site.rows // site.columns
    assert len(sample(site, (1000,), 10**9)) >= 1
