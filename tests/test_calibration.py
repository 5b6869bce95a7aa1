"""Calibration data: arrays from files and from Python, noise, and how samples are handed out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from spa.calibration import Calibration, load_calibration
from spa.calibration.data import spread
from spa.errors import RuntimeFailure, UsageError
from tests.models import BUILT

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def model(**inputs: Any) -> ir.Model:
    """A model with these inputs (`name=(shape, type)`), of which nothing else matters."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in inputs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, None) for name, (_, kind) in inputs.items()]
    graph = helper.make_graph(nodes, "g", infos, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def embedding(rows: int = 50, kind: int = INT64) -> ir.Model:
    table = onnx.numpy_helper.from_array(np.ones((rows, 4), np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        "g",
        [helper.make_tensor_value_info("ids", kind, ["n", "t"])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [table],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def rand(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PLAIN = model(x=(["n", 3, 4], FLOAT))
TWO = model(a=(["n", 3], FLOAT), b=(["n", 2], INT64))


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "calib.npz", **arrays)
    return folder / "calib.npz"


def joined(calibration: Calibration, size: int = 3) -> dict[str, Any]:
    batches = list(calibration.batches(size))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# ---- what is handed out


def test_batches_cover_every_sample_once_in_order(tmp_path: Path) -> None:
    x = rand(7, 3, 4)
    calibration = load_calibration(npz(tmp_path, x=x, labels=np.arange(7)), PLAIN)
    assert (calibration.samples, calibration.name, calibration.fixed) == (7, "npz calib.npz", None)
    assert [len(batch["x"]) for batch in calibration.batches(3)] == [3, 3, 1]
    np.testing.assert_array_equal(joined(calibration)["x"], x)
    assert calibration.labels is not None
    assert calibration.labels.tolist() == list(range(7))
    assert calibration.labels.dtype == np.int64
    with pytest.raises(UsageError, match="1 sample or more"):
        next(calibration.batches(0))


@pytest.mark.parametrize(("samples", "held"), [(10, 3), (10, 1), (10, 9), (2, 1)])
def test_split_is_a_partition_that_is_spread_evenly(samples: int, held: int) -> None:
    x = rand(samples, 3, 4)
    calibration = load_calibration([(x, np.arange(samples))], PLAIN)
    fit, out = calibration.split(held)
    assert (fit.samples, out.samples) == (samples - held, held)
    assert fit.labels is not None
    assert out.labels is not None
    assert sorted([*fit.labels, *out.labels]) == list(range(samples))
    np.testing.assert_array_equal(joined(out)["x"], x[out.labels])
    np.testing.assert_array_equal(joined(fit)["x"], x[fit.labels])
    # no stretch of samples/held without one
    assert np.diff([-1, *out.labels, samples]).max() <= samples / held + 1
    assert len({calibration.digest, fit.digest, out.digest}) == 3
    assert calibration.split(held)[1].digest == out.digest


@pytest.mark.parametrize("held", [0, -1, 4, 5])
def test_split_leaves_samples_on_both_sides(held: int) -> None:
    with pytest.raises(UsageError, match=f"hold out {held} of 4 samples"):
        load_calibration(rand(4, 3, 4), PLAIN).split(held)


def test_buckets_are_never_mixed() -> None:
    flexible = model(x=(["n", "t"], FLOAT))
    data = [(rand(2, 5), [0, 1]), (rand(3, 4, seed=1), [2, 3, 4]), (rand(2, 5, seed=2), [5, 6])]
    calibration = load_calibration(data, flexible)
    assert [bucket["x"].shape for bucket in calibration.feeds] == [(4, 5), (3, 4)]
    assert [batch["x"].shape for batch in calibration.batches(3)] == [(3, 5), (1, 5), (3, 4)]
    assert calibration.labels is not None
    assert calibration.labels.tolist() == [0, 1, 5, 6, 2, 3, 4]
    fit, held = calibration.split(2)
    assert fit.samples + held.samples == 7
    assert held.labels is not None
    assert set(held.labels) <= set(range(7))


def test_a_fixed_batch_size_is_kept() -> None:
    fixed = model(x=([2, 3], FLOAT))
    x = rand(7, 3)
    calibration = load_calibration([(x, np.arange(7))], fixed)
    assert (calibration.fixed, calibration.samples) == (2, 6)
    assert calibration.labels is not None
    assert calibration.labels.tolist() == list(range(6))
    assert [batch["x"].shape for batch in calibration.batches(100)] == [(2, 3)] * 3
    fit, held = calibration.split(1)
    assert (fit.samples, held.samples) == (4, 2)
    with pytest.raises(UsageError, match="takes 2 of the same shape"):
        load_calibration(x[:1], fixed)
    with pytest.raises(UsageError, match="fixed first axes of 1 and 2"):
        load_calibration(x, model(a=([1, 3], FLOAT), b=([2, 3], FLOAT)))
    with pytest.raises(UsageError, match="'s' is a scalar"):
        load_calibration(x, model(a=(["n", 3], FLOAT), s=([], FLOAT)))


@pytest.mark.parametrize(("total", "samples"), [(10, 3), (100, 99), (7, 7), (5, 9), (1000, 1)])
def test_spread_takes_one_of_each_stretch(total: int, samples: int) -> None:
    chosen = spread(total, samples, seed=3)
    count = min(samples, total)
    assert len(set(chosen.tolist())) == count
    assert all(k * total // count <= item < (k + 1) * total // count for k, item in enumerate(chosen.tolist()))
    assert chosen.tolist() == spread(total, samples, seed=3).tolist()


def test_samples_takes_matching_inputs_and_labels(tmp_path: Path) -> None:
    ids = np.arange(20)
    path = npz(tmp_path, a=np.repeat(ids[:, None], 3, 1).astype(np.float32), b=np.stack([ids, ids], 1), labels=ids)
    calibration = load_calibration(path, TWO, samples=6, seed=1)
    assert calibration.labels is not None
    got = joined(calibration)
    assert calibration.samples == 6
    assert got["a"][:, 0].tolist() == got["b"][:, 0].tolist() == calibration.labels.tolist()
    digests = {load_calibration(path, TWO, samples=6, seed=seed).digest for seed in (1, 1, 2)}
    assert len(digests) == 2
    with pytest.raises(UsageError, match="samples must be 1 or more"):
        load_calibration(path, TWO, samples=0)


def test_the_digest_sees_values_types_shapes_labels_and_names() -> None:
    x = rand(4, 6)
    changed = x.copy()
    changed[3, 5] += 1
    flexible = model(x=(["n", None], FLOAT))
    variants = [
        load_calibration(x, flexible),
        load_calibration(changed, flexible),
        load_calibration(x.reshape(8, 3), flexible),
        load_calibration([(x, [0, 1, 2, 3])], flexible),
        load_calibration(x, model(y=(["n", None], FLOAT))),
        load_calibration(x, model(x=(["n", None], TensorProto.DOUBLE))),
    ]
    assert len({v.digest for v in variants}) == len(variants)
    assert load_calibration(x.copy(), flexible).digest == variants[0].digest


# ---- forms of arrays


def test_forms_of_python_data() -> None:
    a, b = rand(4, 3), np.arange(8).reshape(4, 2)
    whole = load_calibration({"a": a, "b": b}, TWO)
    parts = load_calibration(({"a": a[k : k + 2], "b": b[k : k + 2]} for k in (0, 2)), TWO)
    assert whole.digest == parts.digest
    assert whole.name == "arrays"
    labelled = load_calibration([({"a": a, "b": b}, np.arange(4))], TWO)
    assert labelled.labels is not None
    assert load_calibration(whole, TWO) is whole
    with pytest.raises(UsageError, match="is for a model with inputs 'a', 'b', but this one has 'x'"):
        load_calibration(whole, PLAIN)

    class Tensor:  # as torch's: on a device, with a gradient
        def __init__(self, array: Any) -> None:
            self.array = array

        def detach(self) -> Tensor:
            return self

        def cpu(self) -> Any:
            return self.array

    x = rand(4, 3, 4)
    assert load_calibration([[Tensor(x), Tensor(np.arange(4))]], PLAIN).labels is not None


def test_floats_are_cast_and_names_need_not_match_for_one_input(tmp_path: Path) -> None:
    x = rand(4, 3, 4).astype(np.float64)
    got = load_calibration(npz(tmp_path, anything=x), PLAIN).feeds[0]["x"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x.astype(np.float32))
    half = load_calibration(x, model(x=(["n", 3, 4], TensorProto.BFLOAT16))).feeds[0]["x"]
    assert half.dtype == ml_dtypes.bfloat16
    stored = npz(tmp_path, **{"in:x": x, "out:y": np.ones(3)})
    assert load_calibration(stored, PLAIN).samples == 4
    ints = load_calibration(np.arange(8, dtype=np.int32).reshape(4, 2), embedding(8)).feeds[0]["ids"]
    assert ints.dtype == np.int64


BAD: dict[str, tuple[ir.Model, dict[str, Any], str]] = {
    "missing": (TWO, {"a": rand(4, 3)}, r"lacks 'b' \(it has 'a'\)"),
    "extra": (TWO, {"a": rand(4, 3), "b": np.arange(8).reshape(4, 2), "c": rand(4)}, "'c', which is no input"),
    "rank": (PLAIN, {"x": rand(4, 3)}, r"shape \[4, 3\], but the model takes \[n, 3, 4\]"),
    "size": (PLAIN, {"x": rand(4, 5, 4)}, r"shape \[4, 5, 4\], but the model takes \[n, 3, 4\]"),
    "kind": (PLAIN, {"x": np.arange(48).reshape(4, 3, 4)}, "int64, but the model takes float32"),
    "floats for integers": (embedding(), {"ids": rand(4, 3)}, "float32, but the model takes int64"),
    "pixels": (PLAIN, {"x": np.ones((4, 3, 4), np.uint8)}, "say with `preprocess`"),
    "counts": (TWO, {"a": rand(4, 3), "b": np.arange(6).reshape(3, 2)}, "4 samples in 'a' but 3 in 'b'"),
    "labels": (PLAIN, {"x": rand(4, 3, 4), "labels": np.arange(3)}, "4 samples but 3 labels"),
    "soft labels": (PLAIN, {"x": rand(4, 3, 4), "labels": rand(4)}, "labels of type float32"),
    "empty": (PLAIN, {"x": rand(0, 3, 4)}, "no samples"),
    "identical": (PLAIN, {"x": np.ones((4, 3, 4), np.float32)}, "all 4 samples .* are identical"),
    "vocabulary": (embedding(10), {"ids": np.array([[3, 10]])}, "10 in 'ids', but .* table of 10"),
    "range": (model(x=(["n", 2], TensorProto.INT8)), {"x": np.array([[3, 300]])}, "3 to 300 in 'x'.* int8"),
    "scalar": (PLAIN, {"x": np.float32(3)}, "single number"),
    "text": (PLAIN, {"x": np.full((4, 3, 4), "a")}, "<U1, but the model takes float32"),
    "bool": (PLAIN, {"x": np.ones((4, 3, 4), bool)}, "bool, but the model takes float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_clear_sentence(name: str, tmp_path: Path) -> None:
    graph, arrays, message = BAD[name]
    path = npz(tmp_path, **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        load_calibration(path, graph)
    assert str(path) in str(caught.value)
    if "labels" not in arrays:
        with pytest.raises(UsageError, match=message):
            load_calibration(arrays, graph)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    x = rand(5, 3, 4)
    x[3, 1, 2] = value
    with pytest.raises(UsageError, match="NaN or infinity in 'x', first in sample 3"):
        load_calibration(npz(tmp_path, x=x), PLAIN)
    wide = rand(5, 3, 4).astype(np.float64)
    wide[2] = 1e300  # finite, but not in the graph's type
    with pytest.raises(UsageError, match="first in sample 2"):
        load_calibration(wide, PLAIN)


def test_one_constant_input_among_others_is_fine() -> None:
    b = np.ones((4, 2), np.int64)
    assert load_calibration({"a": rand(4, 3), "b": b}, TWO).samples == 4
    assert load_calibration(rand(1, 3, 4), PLAIN).samples == 1


def test_damaged_and_dangerous_files(tmp_path: Path) -> None:
    path = tmp_path / "calib.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="Python objects, which are never loaded"):
        load_calibration(path, PLAIN)
    with path.open("wb") as stream:
        np.save(stream, rand(2, 2))
    with pytest.raises(UsageError, match="single array"):
        load_calibration(path, PLAIN)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UsageError, match=r"not an \.npz file"):
        load_calibration(path, PLAIN)
    np.savez(path, x=rand(400, 3, 4))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"not an \.npz file"):
        load_calibration(path, PLAIN)
    np.savez_compressed(path, x=rand(400, 3, 4))
    data = bytearray(path.read_bytes())
    data[2000:2100] = os.urandom(100)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"not an \.npz file"):
        load_calibration(path, PLAIN)


def test_sources_that_are_none(tmp_path: Path) -> None:
    for source, message in {
        str(tmp_path / "gone.npz"): "do not exist",
        tmp_path / "gone": "do not exist",
        "": "empty name",
        42: "cannot be of type int",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_calibration(source, PLAIN)
    (tmp_path / "data.csv").touch()
    with pytest.raises(UsageError, match="no known kind"):
        load_calibration(tmp_path / "data.csv", PLAIN)
    for source, message in (
        ([], "no samples"),
        ([(1, 2, 3)], "tuple of 3"),
        ([object()], "Python objects"),
        ([rand(2, 3)], "one array, but the model has 2 inputs"),
    ):
        with pytest.raises(UsageError, match=message):
            load_calibration(source, TWO)
    with pytest.raises(UsageError, match="labels with all"):
        load_calibration([(rand(2, 3, 4), [0, 1]), rand(2, 3, 4)], PLAIN)
    with pytest.raises(UsageError, match="preprocess is for images"):
        load_calibration("noise", PLAIN, preprocess="unit")
    with pytest.raises(UsageError, match="tokenizer is for text"):
        load_calibration(rand(2, 3, 4), PLAIN, tokenizer="t.json")
    with pytest.raises(UsageError, match="max_length is for text"):
        load_calibration(rand(2, 3, 4), PLAIN, max_length=3)


# ---- noise


def test_noise_is_standard_normal_and_seeded() -> None:
    calibration = load_calibration("none", PLAIN)
    assert (calibration.name, calibration.samples) == ("noise", 256)
    x = calibration.feeds[0]["x"]
    assert x.shape == (256, 3, 4)
    assert abs(float(x.mean())) < 0.06
    assert abs(float(x.std()) - 1) < 0.05
    again, other = (load_calibration("noise", PLAIN, seed=seed) for seed in (0, 1))
    assert again.digest == calibration.digest != other.digest
    with pytest.raises(UsageError, match="samples must be 1 or more"):
        load_calibration("noise", PLAIN, samples=0)


def test_noise_of_indices_and_masks() -> None:
    graph = embedding(13)
    ids = load_calibration("noise", graph, samples=400).feeds[0]["ids"]
    assert (ids.min(), ids.max()) == (0, 12)
    assert load_calibration("noise", graph, samples=4, dims={"t": 5}).feeds[0]["ids"].shape == (4, 5)
    masked = model(x=(["n", 6], FLOAT), attention_mask=(["n", 6], INT64))
    feeds = load_calibration("noise", masked, samples=5).feeds[0]
    assert feeds["attention_mask"].tolist() == [[1] * 6] * 5


def test_noise_of_a_fixed_batch_is_rounded_up() -> None:
    calibration = load_calibration("noise", model(x=([4, 3], FLOAT)), samples=6)
    assert (calibration.samples, calibration.fixed) == (8, 4)
    assert [len(batch["x"]) for batch in calibration.batches(1)] == [4, 4]


@pytest.mark.parametrize("name", ["residual_cnn", "vit_split", "decoder", "fused_bert", "lstm_tagger", "unet"])
def test_noise_runs(name: str) -> None:
    from spa.runtime import open_session, run

    built = BUILT[name].build()
    calibration = load_calibration("noise", ir.from_proto(built), samples=6)
    session = open_session(built.SerializeToString(), provider="cpu", threads=1)
    for batch in calibration.batches(4):
        run(session, batch)


def test_noise_for_what_has_no_samples() -> None:
    with pytest.raises(UsageError, match="no open axis"):
        load_calibration("noise", PLAIN, dims={"q": 3})
    broken = embedding()
    broken.graph.node(0).op_type = "Unheard"
    with pytest.raises(RuntimeFailure, match="cannot load"):
        load_calibration("noise", broken)
