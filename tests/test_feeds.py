"""Inputs: what a model says about them, guesses that run, and the user's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from spa.errors import ModelError, RuntimeFailure, UsageError
from spa.feeds import ATTEMPTS, InputSpec, index_bounds, inputs_of, load_feeds, make_feeds, runnable_feeds
from spa.runtime import open_session, run

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def info(name: str, shape: Any, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, array: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def model_of(
    nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, initializers: Any = (), functions: Any = ()
) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=list(functions))


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def shapes(*specs: InputSpec, **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in make_feeds(specs, seed=0, **options).items()}


# ---- the signature


def embedding(rows: int = 50, first: int = INT64) -> onnx.ModelProto:
    """IR 3 style: the table is an initializer and an input too."""
    return model_of(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        [info("ids", ["n", "t"], first), info("table", [rows, 4])],
        [info("y", None)],
        [constant("table", np.ones((rows, 4), np.float32))],
    )


def test_inputs_are_the_same_whatever_the_model_is_given_as(tmp_path: Path) -> None:
    model = embedding()
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    expected = (InputSpec("ids", np.dtype(np.int64), ("n", "t")),)
    for form in (model, path, path.read_bytes(), ir.from_proto(model)):
        assert inputs_of(form) == expected


def test_unknown_axes_ranks_and_types() -> None:
    model = model_of(
        [helper.make_node("Identity", ["b"], ["y"])],
        [info("a", [None, 3], TensorProto.BFLOAT16), info("b", None), info("s", [2], TensorProto.STRING)],
        [info("y", None)],
    )
    expected = (
        InputSpec("a", np.dtype(ml_dtypes.bfloat16), (None, 3)),
        InputSpec("b", np.dtype(np.float32), None),
        InputSpec("s", np.dtype(object), (2,)),
    )
    assert inputs_of(model) == expected
    assert inputs_of(ir.from_proto(model)) == expected
    with pytest.raises(RuntimeFailure, match=r"rank of input 'b'.*--inputs"):
        make_feeds(expected, seed=0)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        inputs_of(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="not an ONNX model"):
        inputs_of(b"\xff\xff\xff")
    sequence = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    model = model_of([helper.make_node("SequenceLength", ["s"], ["y"])], [sequence], [info("y", [], INT64)])
    for form in (model, ir.from_proto(model)):
        with pytest.raises(ModelError, match="'s' is not a tensor"):
            inputs_of(form)


# ---- sizes


def test_sizes_follow_names_and_places() -> None:
    assert shapes(spec("x", "n", 3, "h", "w"), spec("z", "n", 7)) == {"x": (2, 3, 64, 64), "z": (2, 7)}
    assert shapes(spec("x", None, "h", "w", 3)) == {"x": (2, 64, 64, 3)}
    assert shapes(spec("x", "n", "c", "h", "w")) == {"x": (2, 3, 64, 64)}
    assert shapes(spec("x", "n", 1, "d", "h", "w")) == {"x": (2, 1, 32, 32, 32)}
    assert shapes(spec("x", "n", 3, 48, "w")) == {"x": (2, 3, 48, 64)}
    assert shapes(spec("ids", "n", "t", dtype=np.int64)) == {"ids": (2, 8)}
    assert shapes(spec("node", "v", 8), spec("adjacency", "v", "v")) == {"node": (8, 8), "adjacency": (8, 8)}
    assert shapes(spec("scalar"), spec("fixed", 5, 6)) == {"scalar": (), "fixed": (5, 6)}
    assert shapes(spec("x", "n", 3, "h", "w"), attempt=6) == {"x": (2, 3, 224, 224)}
    assert shapes(spec("x", "n", "t", 4), attempt=8) == {"x": (4, 4, 4)}


def test_expressions_of_symbols_are_computed() -> None:
    past = [spec("past_key", "batch", 2, "past_len", 4), spec("ids", "batch", "seq", dtype=np.int64)]
    mask = spec("mask", "batch", "past_len + seq", dtype=np.int64)
    assert shapes(*past, mask, dims={"past_len": 5, "seq": 3})["mask"] == (2, 8)
    assert shapes(*past, mask)["mask"] == (2, 16)
    assert shapes(*past, spec("mask", "batch", "total_len", dtype=np.int64))["mask"] == (2, 16)
    assert shapes(spec("x", "b-size", "2*(k//2)", "k"), dims={"k": 5}) == {"x": (2, 4, 5)}
    assert shapes(spec("x", "DynamicDimension.0", "DynamicDimension.1", 4)) == {"x": (2, 8, 4)}


def test_masks_may_cover_the_past() -> None:
    specs = [spec("past_k", "s1", 2, "s2", 4), spec("mask", "s1", "s3", dtype=np.int64)]
    assert shapes(*specs)["mask"] == (2, 8)
    assert shapes(*specs, attempt=1)["mask"] == (2, 16)
    assert shapes(*specs, attempt=1, dims={"s3": 9})["mask"] == (2, 9)


def test_dims_overrule_and_are_checked() -> None:
    x = spec("x", "n", 3, None)
    assert shapes(x, dims={"n": 7, "x:2": 11}) == {"x": (7, 3, 11)}
    with pytest.raises(UsageError, match="'m', which is no open axis here: it may name n, x:0, x:2"):
        shapes(x, dims={"m": 7})
    with pytest.raises(UsageError, match="1 or more"):
        shapes(x, dims={"n": 0})
    with pytest.raises(UsageError, match="attempt"):
        shapes(x, attempt=ATTEMPTS)


# ---- values


def test_values_are_reproducible_and_independent_of_other_inputs() -> None:
    one = make_feeds([spec("x", 4, 5)], seed=3)["x"]
    np.testing.assert_array_equal(one, make_feeds([spec("w", 2), spec("x", 4, 5)], seed=3)["x"])
    assert not np.array_equal(one, make_feeds([spec("x", 4, 5)], seed=4)["x"])
    assert not np.array_equal(one, make_feeds([spec("w", 4, 5)], seed=3)["w"])
    make_feeds([spec("x", 4)], seed=-1)


@pytest.mark.parametrize(
    "dtype",
    [
        np.float16,
        np.float64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e5m2,
        np.complex64,
        np.bool_,
        np.uint8,
        np.int32,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        object,
    ],
)
def test_every_type_can_be_made(dtype: Any) -> None:
    for attempt in range(ATTEMPTS):
        array = make_feeds([spec("x", "n", 3, 4, dtype=dtype)], seed=0, attempt=attempt)["x"]
        assert array.dtype == np.dtype(dtype)


def test_floats_are_standard_normal() -> None:
    x = make_feeds([spec("x", 100, 100)], seed=0)["x"]
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05


def test_integers_stay_below_their_bound() -> None:
    ids = spec("ids", "n", 500, dtype=np.int64)
    values = make_feeds([ids], seed=0, bounds={"ids": 7})["ids"]
    assert set(np.unique(values)) == set(range(7))
    for attempt in range(ATTEMPTS):
        only = make_feeds([ids, spec("k", dtype=np.int64)], seed=0, bounds={"ids": 1, "k": 1}, attempt=attempt)
        assert only["ids"].max() == only["k"] == 0
    assert make_feeds([spec("image", 1, 99, 99, dtype=np.uint8)], seed=0)["image"].max() > 250
    assert 1 <= make_feeds([spec("steps", dtype=np.int64)], seed=0)["steps"] < 4
    positions = make_feeds([spec("position_ids", "n", 5, dtype=np.int64)], seed=0, bounds={"position_ids": 4})
    np.testing.assert_array_equal(positions["position_ids"], [[0, 1, 2, 3, 3]] * 2)
    assert (make_feeds([spec("x_lens", "n", dtype=np.int64)], seed=0)["x_lens"] == 8).all()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32, ml_dtypes.bfloat16])
def test_masks_keep_everything(dtype: Any) -> None:
    specs = [spec("attention_mask", "n", "t", dtype=dtype), spec("key_padding_mask", "n", "t", dtype=dtype)]
    feeds = make_feeds(specs, seed=0)
    assert (feeds["attention_mask"].astype(int) == 1).all()
    assert (feeds["key_padding_mask"].astype(int) == 0).all()
    assert (make_feeds(specs, seed=0, attempt=5)["attention_mask"].astype(int) == 0).all()


# ---- bounds of indices


def bounds_of(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto, **options: Any) -> dict[str, int]:
    """For one input `ids`; every chain of nodes ends in `y`."""
    model = model_of(nodes, [info("ids", ["n", "t"], INT64)], [info("y", None)], initializers, **options)
    return index_bounds(ir.from_proto(model))


TABLE = constant("table", np.zeros((50, 6), np.float32))
LOOKUP = helper.make_node("Gather", ["table", "i"], ["y"])


def test_bound_is_the_table_size() -> None:
    assert index_bounds(ir.from_proto(embedding(37))) == {"ids": 37}
    along_columns = helper.make_node("Gather", ["table", "ids"], ["y"], axis=-1)
    assert bounds_of([along_columns], TABLE) == {"ids": 6}


def test_smallest_table_counts() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("Gather", ["other", "ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    assert bounds_of(nodes, TABLE, constant("other", np.zeros((9, 6), np.float32))) == {"ids": 9}


def test_bound_is_found_through_moves_and_constant_offsets() -> None:
    chain = [
        helper.make_node("Cast", ["ids"], ["c"], to=TensorProto.INT32),
        helper.make_node("Reshape", ["c", "flat"], ["r"]),
        helper.make_node("Identity", ["r"], ["i"]),
    ]
    flat = constant("flat", np.array([-1], np.int64))
    assert bounds_of([*chain, LOOKUP], TABLE, flat) == {"ids": 50}
    offset = constant("offset", np.array([0, 30], np.int64))
    assert bounds_of([helper.make_node("Add", ["offset", "ids"], ["i"]), LOOKUP], TABLE, offset) == {"ids": 20}
    assert bounds_of([helper.make_node("Sub", ["ids", "offset"], ["i"]), LOOKUP], TABLE, offset) == {"ids": 50}
    other_numbers = [helper.make_node("Mod", ["ids", "offset"], ["i"]), LOOKUP]
    assert bounds_of(other_numbers, TABLE, offset) == {}


def test_bound_is_found_behind_a_computed_table() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("Gather", ["d", "ids"], ["y"]),
    ]
    q, scale = constant("q", np.zeros((21, 6), np.int8)), constant("scale", np.float32(1))
    assert bounds_of(nodes, q, scale) == {"ids": 21}


def test_bound_of_one_hot() -> None:
    nodes = [helper.make_node("OneHot", ["ids", "depth", "values"], ["y"])]
    values = constant("values", np.array([0, 1], np.float32))
    assert bounds_of(nodes, constant("depth", np.array([13], np.int64)), values) == {"ids": 13}


def test_bound_is_found_in_functions_and_subgraphs() -> None:
    opsets = [helper.make_opsetid("", 17)]
    look_up = [helper.make_node("Gather", ["t", "i"], ["o"])]
    function = helper.make_function("local", "Embed", ["t", "i"], ["o"], look_up, opsets)
    call = helper.make_node("Embed", ["table", "ids"], ["y"], domain="local")
    assert bounds_of([call], TABLE, functions=[function]) == {"ids": 50}
    branch = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["o"])], "b", [], [info("o", None)])
    either = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    assert bounds_of([either], TABLE, constant("yes", np.array(True))) == {"ids": 50}


# ---- feeds that run


def feeds_that_run(model: onnx.ModelProto, **options: Any) -> dict[str, Any]:
    session = open_session(model.SerializeToString(), provider="cpu", threads=1)
    feeds = runnable_feeds(model, session, 0, **options)
    run(session, feeds)
    return feeds


def test_a_table_with_one_row_runs() -> None:
    assert feeds_that_run(embedding(1))["ids"].max() == 0
    assert feeds_that_run(embedding(9, TensorProto.INT32), dims={"t": 3})["ids"].shape == (2, 3)


def test_later_guesses_are_tried() -> None:
    """Fixed reshapes: only images of 224, only a single sample."""
    large = model_of(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [info("x", ["n", 3, "h", "w"])],
        [info("y", None)],
        [constant("s", np.array([-1, 3 * 224 * 224], np.int64))],
    )
    assert feeds_that_run(large)["x"].shape[2:] == (224, 224)
    single = model_of(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [info("x", ["n", 6])],
        [info("y", None)],
        [constant("s", np.array([6], np.int64))],
    )
    assert feeds_that_run(single)["x"].shape == (1, 6)


def test_finite_outputs_are_preferred() -> None:
    """0/0 where the mask is 1, so the guess with masks of 0 is the good one."""
    model = model_of(
        [helper.make_node("Sub", ["one", "mask"], ["a"]), helper.make_node("Div", ["a", "a"], ["y"])],
        [info("mask", ["n", "t"])],
        [info("y", None)],
        [constant("one", np.float32(1))],
    )
    assert feeds_that_run(model)["mask"].max() == 0


def test_nothing_runs() -> None:
    model = model_of(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [info("x", ["n", 6])],
        [info("y", None)],
        [constant("s", np.array([7], np.int64))],
    )
    session = open_session(model.SerializeToString(), provider="cpu")
    with pytest.raises(RuntimeFailure, match=r"--inputs FILE\.npz"):
        runnable_feeds(model, session, 0)


# ---- the user's own


SPECS = (spec("x", "n", 3), spec("ids", "n", "t", dtype=np.int64))
X, IDS = np.zeros((2, 3), np.float32), np.zeros((2, 5), np.int64)


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "in.npz", **arrays)
    return folder / "in.npz"


def test_load_accepts_plain_and_prefixed_names(tmp_path: Path) -> None:
    for arrays in ({"x": X, "ids": IDS}, {"in:x": X, "in:ids": IDS, "out:y": X}):
        feeds = load_feeds(saved(tmp_path, **arrays), SPECS)
        assert {name: array.shape for name, array in feeds.items()} == {"x": (2, 3), "ids": (2, 5)}


def test_load_restores_types_that_npz_cannot_hold(tmp_path: Path) -> None:
    x = np.array([1.5, 2]).astype(ml_dtypes.bfloat16)
    path = saved(tmp_path, x=x, s=np.array(["ab", "c"]))
    feeds = load_feeds(path, [spec("x", 2, dtype=ml_dtypes.bfloat16), spec("s", 2, dtype=object)])
    np.testing.assert_array_equal(feeds["x"], x)
    assert feeds["s"].tolist() == ["ab", "c"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "lacks input 'ids'"),
        ({"x": X, "ids": IDS, "z": X}, "'z', which is no input: the inputs are ids, x"),
        ({"x": X.astype(np.float64), "ids": IDS}, "'x' as float64, but the model takes float32"),
        ({"x": X[:, :2], "ids": IDS}, r"'x' of shape \[2, 2\], but the model takes \[n, 3\]"),
        ({"x": X[0], "ids": IDS}, r"'x' of shape \[3\]"),
    ],
)
def test_load_explains_what_is_wrong(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_feeds(saved(tmp_path, **arrays), SPECS)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_feeds(tmp_path / "missing.npz", SPECS)
    path = tmp_path / "text.npz"
    path.write_text("no arrays")
    with pytest.raises(UsageError, match=r"not an \.npz"):
        load_feeds(path, SPECS)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(UsageError, match="single array"):
        load_feeds(tmp_path / "one.npy", SPECS)
    path.write_bytes(saved(tmp_path, x=X).read_bytes()[:80])
    with pytest.raises(UsageError, match=r"not an \.npz"):
        load_feeds(path, SPECS)
    with pytest.raises(UsageError, match="plain arrays"):
        load_feeds(saved(tmp_path, x=np.array([{}], dtype=object)), SPECS)


# ---- real models


@pytest.mark.slow
def test_made_up_inputs_run_every_model_of_the_collection(data_root: Path) -> None:
    manifest = data_root / "zoo" / "manifest.json"
    if not manifest.is_file():
        pytest.skip(f"no model collection at {manifest.parent}")
    failed = []
    for entry in json.loads(manifest.read_text())["models"]:
        if not entry["status"].startswith("ok"):
            continue
        path = manifest.parent / entry["file"]
        session = open_session(path, provider="cpu")
        try:
            runnable_feeds(path, session, 0)
        except RuntimeFailure as error:
            failed.append(f"{path.name}: {error}")
        if entry["npz"]:
            run(session, load_feeds(manifest.parent / entry["npz"], inputs_of(path)))
    assert failed == []
