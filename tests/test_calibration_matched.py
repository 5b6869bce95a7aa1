"""Calibration data made up to match a model's batch normalisation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import spa
from spa.calibration import Calibration, load_calibration
from spa.calibration.matching import choose, matchable
from spa.calibration.statistics import deviation, norms, tapped
from spa.calibration.synthetic import Recipe, pictures
from spa.errors import ExternalDataError, UsageError
from spa.runtime import open_session, run
from spa.signature import as_ir
from tests.models import BUILT
from tests.test_calibration import model

Array = np.ndarray[Any, Any]
WIDTHS = (16, 24, 32)


def photos(count: int, size: int = 32) -> Array:
    """Pieces of two photographs `[n, 3, size, size]` with values 0..1."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    pieces = []
    for image in datasets.load_sample_images().images:
        small = image[::4, ::4]
        for _ in range(count // 2):
            y, x = (rng.integers(0, edge - size) for edge in small.shape[:2])
            pieces.append(small[y : y + size, x : x + size])
    return (np.stack(pieces) / 255).transpose(0, 3, 1, 2).astype(np.float32)


def build(statistics: Sequence[tuple[Array, Array]], opset: int = 17, nhwc: bool = False, outputs: bool = False) -> Any:
    """Three convolutions with batch normalisation; with `outputs` the inputs of the norms are outputs."""
    rng = np.random.default_rng(1)
    nodes, weights, x, before = [], {}, "x", 3
    if nhwc:
        nodes.append(helper.make_node("Transpose", [x], ["t"], perm=[0, 3, 1, 2]))
        x = "t"
    for k, width in enumerate(WIDTHS):
        mean, variance = statistics[k]
        weights |= {
            f"w{k}": rng.normal(0, 1 / np.sqrt(before * 9), (width, before, 3, 3)),
            f"scale{k}": rng.uniform(0.5, 1.5, width),
            f"shift{k}": rng.normal(0, 0.5, width),
            f"mean{k}": mean,
            f"var{k}": variance,
        }
        stride = {"strides": [2, 2]} if k else {}
        nodes += [
            helper.make_node("Conv", [x, f"w{k}"], [f"c{k}"], pads=[1, 1, 1, 1], **stride),
            helper.make_node(
                "BatchNormalization", [f"c{k}", *(f"{n}{k}" for n in ("scale", "shift", "mean", "var"))], [f"b{k}"]
            ),
            helper.make_node("Relu", [f"b{k}"], [f"r{k}"]),
        ]
        x, before = f"r{k}", width
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["y"]))
    shape = ["n", 32, 32, 3] if nhwc else ["n", 3, 32, 32]
    names = [f"c{k}" for k in range(len(WIDTHS))] if outputs else ["y"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def activations(statistics: Sequence[tuple[Array, Array]], x: Array) -> list[Array]:
    session = open_session(build(statistics, outputs=True).SerializeToString(), provider="cpu", threads=2)
    return list(run(session, {"x": x}).values())


def trained() -> list[tuple[Array, Array]]:
    """The statistics that training on photographs would leave, layer by layer."""
    x = (photos(256) - 0.45) / 0.225
    statistics = [(np.zeros(width), np.ones(width)) for width in WIDTHS]
    for k in range(len(WIDTHS)):
        c = activations(statistics, x)[k]
        statistics[k] = c.mean(axis=(0, 2, 3)), c.var(axis=(0, 2, 3))
    return statistics


def distance(statistics: Sequence[tuple[Array, Array]], x: Array) -> float:
    """The definition, from whole activations."""
    total = 0.0
    for (mean, variance), c in zip(statistics, activations(statistics, x), strict=True):
        m, s = c.mean(axis=(0, 2, 3)), c.std(axis=(0, 2, 3))
        total += float((((m - mean) ** 2 + (s - np.sqrt(variance)) ** 2) / (variance + 1e-5)).mean())
    return total


def reported(calibration: Calibration) -> tuple[float, float]:
    found = re.search(r": ([\d.e+-]+) \(N\(0, 1\) noise: ([\d.e+-]+)\)", calibration.note)
    assert found, calibration.note
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def statistics() -> list[tuple[Array, Array]]:
    return trained()


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_taps_see_what_whole_activations_say(opset: int, statistics: list[tuple[Array, Array]]) -> None:
    graph = ir.from_proto(build(statistics, opset))
    before = ir.to_proto(graph).SerializeToString()
    found = norms(graph)
    assert [norm.value for norm in found] == ["c0", "c1", "c2"]
    x = np.random.default_rng(2).standard_normal((10, 3, 32, 32)).astype(np.float32)
    with tapped(graph, found, None) as taps:
        moments = taps.moments({"x": x}, 4)
    for (mean, power), c in zip(moments, activations(statistics, x), strict=True):
        np.testing.assert_allclose(mean, c.mean(axis=(2, 3)), atol=1e-4)
        np.testing.assert_allclose(power, (c**2).mean(axis=(2, 3)), rtol=1e-3)
    pooled = [[part.mean(axis=0) for part in parts] for parts in zip(*moments, strict=True)]
    assert deviation(found, *pooled) == pytest.approx(distance(statistics, x), rel=1e-3)
    assert ir.to_proto(graph).SerializeToString() == before


@pytest.mark.parametrize("nhwc", [False, True])
def test_images_match_far_better_than_noise(nhwc: bool, statistics: list[tuple[Array, Array]]) -> None:
    graph = ir.from_proto(build(statistics, nhwc=nhwc))
    calibration = load_calibration("none", graph, samples=64)
    assert (calibration.name, calibration.samples) == ("bn-matched", 64)
    x = calibration.feeds[0]["x"]
    assert x.shape == ((64, 32, 32, 3) if nhwc else (64, 3, 32, 32))
    images = x.transpose(0, 3, 1, 2) if nhwc else x
    reached, noise = (
        distance(statistics, images),
        distance(statistics, load_calibration("noise", graph, samples=64).feeds[0]["x"].reshape(images.shape)),
    )
    assert reached < noise / 10
    told = reported(calibration)
    assert told[0] == pytest.approx(reached, rel=0.02)
    assert told[1] > 10 * told[0]
    # as close as real photographs of the same kind, and no picture twice
    other = (photos(512)[256:320] - 0.45) / 0.225
    assert reached < 2 * distance(statistics, other)
    assert len({image.tobytes() for image in images}) == 64


def test_a_seed_gives_the_same_images(statistics: list[tuple[Array, Array]]) -> None:
    graph = ir.from_proto(build(statistics))
    first, again, other = (load_calibration("bn", graph, samples=8, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest


def test_a_fixed_batch_is_kept(statistics: list[tuple[Array, Array]]) -> None:
    proto = build(statistics)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    calibration = load_calibration("bn", ir.from_proto(proto), samples=7)
    assert (calibration.samples, calibration.fixed) == (9, 3)
    assert [len(batch["x"]) for batch in calibration.batches(1)] == [3, 3, 3]


def test_weights_in_a_second_file(
    tmp_path: Path, statistics: list[tuple[Array, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = build(statistics)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"  # so that noise has to try what runs
    expected = load_calibration("noise", ir.from_proto(proto), samples=8).digest
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = as_ir(tmp_path / "m.onnx")
    for _ in range(2):
        assert load_calibration("noise", graph, samples=8).digest == expected
        assert load_calibration("noise", spa.load(tmp_path / "m.onnx").model, samples=8).digest == expected
        monkeypatch.setattr("spa.calibration.noise._INSIDE", 0)  # as if there were gigabytes
    assert isinstance(graph.graph.initializers["w0"].const_value, ir.ExternalTensor)
    assert load_calibration("bn", graph, samples=8, dims={"h": 32}).samples == 8
    (tmp_path / "w.bin").unlink()
    for source in ("none", "bn", "noise"):
        with pytest.raises(ExternalDataError, match=r"w\.bin"):
            load_calibration(source, as_ir(tmp_path / "m.onnx"), samples=8)


def test_models_without_statistics_say_so() -> None:
    without = model(x=(["n", 3, 8, 8], TensorProto.FLOAT))
    assert not matchable(without)
    assert load_calibration("none", without, samples=2).name == "noise"
    with pytest.raises(UsageError, match="this model has none: use `noise`"):
        load_calibration("bn", without)
    nodes = [helper.make_node("BatchNormalization", ["x", "o", "z", "z", "o"], ["y"])]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 5]) for n in ("x", "y")]
    weights = [numpy_helper.from_array(np.full(5, v, np.float32), n) for n, v in (("o", 1), ("z", 0))]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    table = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    with pytest.raises(UsageError, match="needs one image input"):
        load_calibration("bn", table)
    assert load_calibration("none", table).name == "noise"


def test_choosing_finds_nearly_the_best() -> None:
    """Against every subset."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        rows = rng.normal(0.5, 1, (12, 6))
        lengths = {c: float(np.linalg.norm(rows[list(c)].mean(axis=0))) for c in itertools.combinations(range(12), 4)}
        chosen = choose(rows @ rows.T, 4)
        assert len(set(chosen.tolist())) == 4
        rank = sorted(lengths.values()).index(lengths[tuple(chosen.tolist())])
        assert rank < len(lengths) // 50  # of 495
    assert choose(rows @ rows.T, 12).tolist() == list(range(12))


def test_pictures_have_the_statistics_of_natural_ones() -> None:
    made = pictures(np.random.default_rng(0), 256, 32, 32, 3, Recipe())
    real = photos(256)
    assert made.shape == real.shape
    assert 0 <= made.min() <= made.max() <= 1

    def measured(x: Array) -> tuple[float, float]:
        colours = np.corrcoef(x.transpose(1, 0, 2, 3).reshape(3, -1))[0, 1]
        centred = x - x.mean(axis=(2, 3), keepdims=True)
        power = (np.abs(np.fft.fft2(centred)) ** 2).mean(axis=(0, 1))[1:9, 0]
        slope = np.polyfit(np.log(np.arange(1, 9)), np.log(power), 1)[0]
        return float(colours), float(slope)

    for mine, theirs in zip(measured(made), measured(real), strict=True):
        assert mine == pytest.approx(theirs, abs=0.5)
    for channels, height, width in ((1, 7, 9), (4, 8, 8), (2, 1, 3)):
        assert pictures(np.random.default_rng(0), 5, height, width, channels, Recipe()).shape == (
            5,
            channels,
            height,
            width,
        )


def test_other_inputs_are_made_up_too() -> None:
    built = ir.from_proto(BUILT["residual_cnn"].build())
    assert load_calibration("none", built, samples=4).samples == 4


@pytest.mark.slow
def test_a_trained_network_takes_them_for_its_training_data(data_root: Any) -> None:
    path = data_root / "data" / "models" / "resnet20_cifar10_bn.onnx"
    if not path.is_file():
        pytest.skip(f"no trained models in {data_root}")
    reached, noise = reported(load_calibration("none", as_ir(path), samples=128))
    assert reached < noise / 15
