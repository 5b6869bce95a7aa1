"""Loading, saving and restoring models."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa import errors, graph, store
from spa.graph import load, restore, save, to_proto

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((64, 32)).astype(np.float32)  # 8 KiB: above the limit of what stays in the proto
BIAS = RNG.standard_normal(32).astype(np.float32)


def info(name: str, *dims: int | str | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    opset: int | None = 17,
    **fields: Any,
) -> onnx.ModelProto:
    """A two-layer network, unless told otherwise."""
    if nodes is None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "mm"), helper.make_node("Add", ["h", "b"], ["y"], "add")]
    weights = {"w": KERNEL, "b": BIAS} if weights is None else weights
    proto = helper.make_graph(
        nodes,
        "net",
        inputs or [info("x", "n", 64)],
        outputs or [info("y", "n", 32)],
        [constant(name, array) for name, array in weights.items()],
    )
    imports = [] if opset is None else [helper.make_opsetid("", opset)]
    return helper.make_model(proto, **({"opset_imports": imports, "ir_version": 8} | fields))


def run(source: Path | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def same(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return len(got) == len(want) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") if isinstance(a, np.ndarray) else str(a) == str(b)
        for a, b in zip(got, want, strict=True)
    )


def with_external(folder: Path, proto: onnx.ModelProto | None = None, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(proto or model(), path, save_as_external_data=True, location=f"{name}.data", size_threshold=16)
    return path


X = RNG.standard_normal((3, 64)).astype(np.float32)

# --- what load gives -------------------------------------------------------------------------------------------------


def test_load_infers_types_and_shapes_and_ignores_what_the_file_claims(tmp_path: Path) -> None:
    proto = model()
    proto.graph.value_info.append(info("h", 7, 7, 7, kind=TensorProto.INT64))
    onnx.save(proto, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    hidden = next(iter(loaded.model.graph)).outputs[0]
    assert hidden.dtype == ir.DataType.FLOAT
    assert [str(dim) for dim in hidden.shape] == ["n", "32"]
    assert loaded.form == "path"
    assert loaded.path == tmp_path / "m.onnx"
    assert not loaded.external
    assert loaded.sha256 == hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert loaded.file_bytes == (tmp_path / "m.onnx").stat().st_size


def test_unknown_dims_are_none_and_wrong_output_shapes_are_corrected() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["z"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    loaded = load(model(nodes, {"w": KERNEL}, outputs=[info("z", None, None, kind=TensorProto.INT64), info("y", 5, 9)]))
    indices, product = loaded.model.graph.outputs
    assert [getattr(dim, "value", dim) for dim in indices.shape] == [2, None]
    assert list(product.shape)[1] == 32


def test_subgraph_values_get_shapes_too() -> None:
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [info(name)])
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    cond = info("c", kind=TensorProto.BOOL)
    proto = model([helper.make_node("If", ["c"], ["y"], **branches)], {}, [info("x", "n", 64), cond], [info("y")])
    loaded = load(proto)
    (node,) = loaded.model.graph
    inner = node.attributes["then_branch"].as_graph()
    assert [str(dim) for dim in inner.outputs[0].shape] == ["n", "64"]


def test_sources_of_every_kind_agree_and_are_not_changed(tmp_path: Path) -> None:
    proto = model()
    onnx.save(proto, tmp_path / "m.onnx")
    before = proto.SerializeToString(deterministic=True)
    ir_model = ir.from_proto(proto)
    weight = ir_model.graph.initializers["w"].const_value
    surgeon = gs.import_onnx(model())
    want = run(proto, {"x": X})
    for source, form in (
        (tmp_path / "m.onnx", "path"),
        (str(tmp_path / "m.onnx"), "path"),
        (proto, "proto"),
        (ir_model, "ir"),
        (surgeon, "gs"),
    ):
        loaded = load(source)
        assert loaded.form == form
        loaded.model.graph.initializers["w"].name = "renamed"
        next(iter(loaded.model.graph)).name = "other"
        back = restore(loaded, loaded.model)
        match form:
            case "path":
                assert back is loaded.model
            case "ir":
                assert isinstance(back, ir.Model)
            case "proto":
                assert isinstance(back, onnx.ModelProto)
                assert same(run(back, {"x": X}), want)
            case "gs":
                assert isinstance(back, gs.Graph)
                assert same(run(gs.export_onnx(back), {"x": X}), want)
    assert proto.SerializeToString(deterministic=True) == before
    assert ir_model.graph.initializers["w"].const_value is weight
    assert weight is not None
    assert weight.name == "w"
    assert [node.name for node in ir_model.graph] == ["mm", "add"]
    assert load(proto).sha256 == load(tmp_path / "m.onnx").sha256
    assert load(ir_model).sha256 == load(ir_model).sha256


def test_refuses_other_kinds_of_source() -> None:
    with pytest.raises(errors.UsageError, match="int"):
        load(3)  # type: ignore[arg-type]


def test_sorts_unsorted_graphs_even_when_only_a_subgraph_reads_ahead() -> None:
    branch = helper.make_graph([helper.make_node("Add", ["h", "b"], ["t"])], "t", [], [info("t")])
    other = helper.make_graph([helper.make_node("Identity", ["b"], ["e"])], "e", [], [info("e")])
    nodes = [
        helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=other),
        helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
    ]
    proto = model(nodes, inputs=[info("x", "n", 64), info("c", kind=TensorProto.BOOL)], outputs=[info("y")])
    loaded = load(proto)
    assert [node.name for node in loaded.model.graph] == ["mm", "if"]
    feeds = {"x": X, "c": np.array(True)}
    np.testing.assert_array_equal(run(to_proto(loaded.model), feeds)[0], X @ KERNEL + BIAS)


def test_inlines_local_functions_and_keeps_unknown_custom_nodes() -> None:
    inner = helper.make_function(
        "local", "Inner", ["a"], ["o"], [helper.make_node("Relu", ["a"], ["o"])], [helper.make_opsetid("", 17)]
    )
    outer = helper.make_function(
        "local",
        "Outer",
        ["a"],
        ["o"],
        [helper.make_node("Inner", ["a"], ["t"], domain="local"), helper.make_node("Neg", ["t"], ["o"])],
        [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
    )
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Outer", ["h"], ["y"], domain="local")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    proto = model(nodes, {"w": KERNEL}, functions=[inner, outer], opset_imports=imports)
    loaded = load(proto)
    assert [node.op_type for node in loaded.model.graph] == ["MatMul", "Relu", "Neg"]
    assert not loaded.model.functions
    assert same(run(to_proto(loaded.model), {"x": X}), run(proto, {"x": X}))
    foreign = model([helper.make_node("Magic", ["x"], ["y"], domain="local")], {}, opset_imports=imports)
    (node,) = load(foreign).model.graph
    assert (node.domain, node.op_type) == ("local", "Magic")


def test_sparse_weights_become_dense() -> None:
    dense = np.zeros((64, 32), np.float32)
    dense[3, 5], dense[60, 31] = 2, -1
    for index in (np.array([[3, 5], [60, 31]]), np.array([3 * 32 + 5, 60 * 32 + 31])):
        sparse = helper.make_sparse_tensor(
            constant("w", np.array([2, -1], np.float32)), constant("i", index.astype(np.int64)), [64, 32]
        )
        proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {})
        proto.graph.sparse_initializer.append(sparse)
        inside = model(
            [
                helper.make_node("Constant", [], ["w"], sparse_value=sparse),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ],
            {},
        )
        for case in (proto, inside):
            np.testing.assert_array_equal(run(to_proto(load(case).model), {"x": X})[0], X @ dense)
    huge = helper.make_sparse_tensor(
        constant("w", np.array([2], np.float32)), constant("i", np.array([0], np.int64)), [64, 1 << 20]
    )
    proto.graph.sparse_initializer[0].CopyFrom(huge)
    with pytest.raises(errors.UnsupportedModelError, match="'w'"):
        load(proto)


def test_initializers_that_are_inputs_stay_both() -> None:
    proto = model(inputs=[info("x", "n", 64), info("w", 64, 32)], ir_version=3)
    kept = load(proto).model.graph
    assert [value.name for value in kept.inputs] == ["x", "w"]
    assert kept.inputs[1] is kept.initializers["w"]
    assert [value.name for value in to_proto(load(proto).model).graph.input] == ["x", "w"]


@pytest.mark.parametrize(
    "dtype",
    [
        np.float64,
        np.float16,
        np.int8,
        np.uint16,
        np.int64,
        np.bool_,
        np.complex64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2fnuz,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.float4_e2m1fn,
    ],
)
@pytest.mark.parametrize("external", [False, True])
def test_every_dtype_survives(tmp_path: Path, dtype: Any, external: bool) -> None:
    array = (RNG.integers(0, 2, (37, 303)) if dtype == np.bool_ else RNG.integers(0, 6, (37, 303))).astype(dtype)
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    kind = int(ir.DataType.from_numpy(np.dtype(dtype)))
    proto = model(nodes, {}, outputs=[info("y", 37, 303, kind=kind)], opset=25, ir_version=12)
    proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name="w")))
    path = tmp_path / "m.onnx"
    save(load(proto).model, path, external=external)
    assert (tmp_path / "m.onnx.data").exists() == external
    got = load(path).model.graph.initializers["w"].const_value
    assert got is not None
    assert got.numpy().dtype == array.dtype
    assert got.tobytes() == ir.tensor(array).tobytes()


def test_strings_and_typed_fields_survive() -> None:
    proto = model(
        [helper.make_node("Identity", ["s"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["z"])],
        {},
        outputs=[info("y", 3, kind=TensorProto.STRING), info("z", "n", 32)],
    )
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [3], ["a", "b", "c"]))
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [64, 32], KERNEL.flatten().tolist()))
    strings, product = run(to_proto(load(proto).model), {"x": X})
    assert strings.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(product, X @ KERNEL)


def test_infinite_and_scalar_nan_weights_are_fine() -> None:
    mask = np.full((4, 32), -np.inf, np.float32)
    mask[0] = np.inf
    load(model(weights={"w": KERNEL, "b": mask}, outputs=[info("y")]))
    load(model(weights={"w": KERNEL, "b": np.array(np.nan, np.float32)}))


# --- what load refuses -----------------------------------------------------------------------------------------------


def damaged(**change: Any) -> onnx.ModelProto:
    proto = model()
    for name, value in change.items():
        setattr(proto.graph.initializer[0], name, value)
    return proto


def with_opset(version: int | None) -> onnx.ModelProto:
    return model(opset=version)


def nan(dtype: Any, where: str = "initializer") -> onnx.ModelProto:
    array = KERNEL.astype(dtype)
    array[63, 31] = np.nan
    kind = int(ir.DataType.from_numpy(array.dtype))
    product = helper.make_node("Identity", ["w"], ["y"])
    outputs = [info("y", 64, 32, kind=kind)]
    tensor = ir.to_proto(ir.tensor(array, name="w"))
    if where == "constant":
        return model([helper.make_node("Constant", [], ["w"], value=tensor), product], {}, outputs=outputs)
    proto = model([product], {}, outputs=outputs, opset=25, ir_version=12)
    proto.graph.initializer.append(tensor)
    return proto


def recursive() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    loop = helper.make_function("d", "F", ["a"], ["o"], [helper.make_node("F", ["a"], ["o"], domain="d")], imports)
    return model([helper.make_node("F", ["x"], ["y"], domain="d")], {}, functions=[loop], opset_imports=imports)


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, f"the_{op}", **attributes)


BAD_MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], type[errors.ModelError], str]] = {
    "no graph": (onnx.ModelProto, errors.ModelError, "no graph"),
    "no nodes": (lambda: model([], {}), errors.ModelError, "no nodes"),
    "old opset": (lambda: with_opset(6), errors.UnsupportedModelError, "opset 6"),
    "future opset": (lambda: with_opset(999), errors.UnsupportedModelError, "opset 999"),
    "no opset": (lambda: with_opset(None), errors.ModelError, "no ONNX opset"),
    "only a custom opset": (
        lambda: model(opset_imports=[helper.make_opsetid("d", 1)]),
        errors.ModelError,
        "no ONNX opset",
    ),
    "two opsets": (
        lambda: model(opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx", 18)]),
        errors.ModelError,
        "two versions",
    ),
    "undefined input": (lambda: model([node("Relu", ["ghost"], ["y"])]), errors.ModelError, "'the_Relu'.*'ghost'"),
    "undefined output": (lambda: model([node("Relu", ["x"], ["h"])]), errors.ModelError, "output 'y'"),
    "defined twice": (
        lambda: model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]),
        errors.ModelError,
        "'y' is defined",
    ),
    "weight computed": (
        lambda: model([node("Relu", ["x"], ["w"]), node("Neg", ["w"], ["y"])]),
        errors.ModelError,
        "'w' is defined",
    ),
    "cycle": (
        lambda: model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Neg", ["b"], ["y"])], {}),
        errors.ModelError,
        "cycle",
    ),
    "self loop": (lambda: model([node("Add", ["x", "y"], ["y"])], {}), errors.ModelError, "cycle"),
    "mixed types": (
        lambda: model([node("Add", ["x", "k"], ["y"])], {"k": np.ones(64, np.int64)}),
        errors.ModelError,
        "Add",
    ),
    "inner sizes": (
        lambda: model([node("MatMul", ["x", "w"], ["y"])], {"w": KERNEL[:63]}),
        errors.ModelError,
        "MatMul",
    ),
    "kernel rank": (
        lambda: model([node("Conv", ["x", "w"], ["y"])], {"w": KERNEL}, [info("x", 1, 3, 8, 8)], [info("y")]),
        errors.ModelError,
        "Conv",
    ),
    "missing operand": (lambda: model([node("MatMul", ["x"], ["y"])]), errors.ModelError, "MatMul"),
    "output type": (lambda: model(outputs=[info("y", kind=TensorProto.INT64)]), errors.ModelError, "'y' is FLOAT"),
    "declared input shape": (
        lambda: model(inputs=[info("x", "n", 64), info("w", 64, 31)]),
        errors.ModelError,
        "'w'.*declaration",
    ),
    "declared input type": (
        lambda: model(inputs=[info("x", "n", 64), info("w", 64, 32, kind=TensorProto.DOUBLE)]),
        errors.ModelError,
        "'w'.*declaration",
    ),
    "short weight": (lambda: damaged(raw_data=KERNEL.tobytes()[:-4]), errors.ModelError, "'w'.*truncated"),
    "long weight": (lambda: damaged(raw_data=KERNEL.tobytes() + b"1234"), errors.ModelError, "'w'.*8192 bytes"),
    "unknown dtype": (lambda: damaged(data_type=77), errors.ModelError, "'w'.*77"),
    "no dtype": (lambda: damaged(data_type=0), errors.ModelError, "'w'"),
    "no name": (lambda: damaged(name=""), errors.ModelError, "no name"),
    "recursive function": (recursive, errors.ModelError, "'F' calls itself"),
    "nan float": (lambda: nan(np.float32), errors.ModelError, "'w' contains NaN"),
    "nan double": (lambda: nan(np.float64), errors.ModelError, "'w' contains NaN"),
    "nan half": (lambda: nan(np.float16), errors.ModelError, "'w' contains NaN"),
    "nan bfloat16": (lambda: nan(ml_dtypes.bfloat16), errors.ModelError, "'w' contains NaN"),
    "nan float8": (lambda: nan(ml_dtypes.float8_e4m3fn), errors.ModelError, "'w' contains NaN"),
    "nan constant": (lambda: nan(np.float32, "constant"), errors.ModelError, "constant 'w' contains NaN"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
@pytest.mark.parametrize("as_file", [False, True])
def test_refuses_bad_models_in_one_sentence(tmp_path: Path, name: str, as_file: bool) -> None:
    make, kind, words = BAD_MODELS[name]
    source: Any = make()
    if as_file:
        (tmp_path / "m.onnx").write_bytes(source.SerializeToString() or b"\x08\x08")
        source = tmp_path / "m.onnx"
    with pytest.raises(kind, match=words) as caught:
        load(source)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    if as_file:
        assert str(source) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "undefined input",
        "mixed types",
        "inner sizes",
        "kernel rank",
        "output type",
        "declared input shape",
        "missing operand",
        "defined twice",
        "short weight",
        "declared input type",
        "cycle",
    ],
)
def test_onnx_runtime_refuses_those_too(name: str) -> None:
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(BAD_MODELS[name][0](), {"x": X})


BAD_BYTES = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is no model\n" * 50, "not an ONNX model"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "not an ONNX model"),
    "random": (np.random.default_rng(1).bytes(4096), "not an ONNX model"),
    "zeros": (bytes(1000), "not an ONNX model"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
    "ort": (b"\x20\0\0\0ORTM" + bytes(64), "own format"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_refuses_files_that_are_no_models(tmp_path: Path, name: str) -> None:
    data, words = BAD_BYTES[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(errors.ModelError, match=words):
        load(path)


def test_refuses_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="no such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(errors.ModelError, match="is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.ModelError, match="not a regular file"):
        load(tmp_path / "pipe")
    with pytest.raises(errors.ModelError, match="cannot be read"):
        load("a\0b")


def test_truncation_and_flipped_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    data = model().SerializeToString()
    path = tmp_path / "m.onnx"
    lengths = {*range(0, 300, 7), *range(300, len(data), 331), len(data) - 1}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(errors.ModelError):
            load(path)
    for position in range(0, len(data), 41):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x5A]) + data[position + 1 :])
        try:
            load(path)
        except errors.ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_broken_text_attributes_are_model_errors() -> None:
    bad = node("Concat", ["x", "x"], ["y"], axis=0)
    bad.attribute.append(helper.make_attribute("words", [b"\xff\xfe", b"a"]))
    with pytest.raises(errors.ModelError):
        load(model([bad], {}))


# --- external data ---------------------------------------------------------------------------------------------------


def test_external_data_is_mapped_and_its_file_may_be_replaced(tmp_path: Path) -> None:
    want = run(model(), {"x": X})
    path = with_external(tmp_path)
    loaded = load(path)
    assert loaded.external
    assert loaded.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    weight = loaded.model.graph.initializers["w"].const_value
    assert weight is not None
    view = weight.numpy()
    for _ in range(2):  # over its own source, twice
        save(loaded.model, path, external=True)
        assert same(run(path, {"x": X}), want)
    assert same(run(to_proto(loaded.model), {"x": X}), want)
    np.testing.assert_array_equal(view, KERNEL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_ir_models_with_external_data(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    source = ir.load(path)
    loaded = load(source)
    assert loaded.external
    assert isinstance(source.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert same(run(to_proto(loaded.model), {"x": X}), run(path, {"x": X}))
    (tmp_path / "m.onnx.data").write_bytes(b"short")
    with pytest.raises(errors.ExternalDataError):
        load(source)


def test_in_memory_models_cannot_name_external_data(tmp_path: Path) -> None:
    proto = onnx.load(with_external(tmp_path), load_external_data=False)
    with pytest.raises(errors.ExternalDataError, match="path"):
        load(proto)


def redirect(path: Path, key: str, value: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(proto.SerializeToString())


BAD_EXTERNAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path.parent / "m.onnx.data").unlink(), "cannot be opened"),
    "short": (lambda path: os.truncate(path.parent / "m.onnx.data", 8000), "has only 8000"),
    "offset": (lambda path: redirect(path, "offset", "999999"), "999999"),
    "negative": (lambda path: redirect(path, "offset", "-4"), "malformed"),
    "no number": (lambda path: redirect(path, "offset", "four"), "malformed"),
    "length": (lambda path: redirect(path, "length", "12"), "has 12"),
    "absolute": (lambda path: redirect(path, "location", str(path.parent / "m.onnx.data")), "attack"),
    "windows": (lambda path: redirect(path, "location", "C:\\m.onnx.data"), "attack"),
    "parent": (lambda path: redirect(path, "location", "../secret"), "attack"),
    "hidden parent": (lambda path: redirect(path, "location", "sub/../../secret"), "attack"),
    "nul": (lambda path: redirect(path, "location", "a\0b"), "attack"),
    "nothing": (lambda path: redirect(path, "location", ""), "attack"),
    "folder": (lambda path: redirect(path, "location", "sub"), "not a regular file"),
    "link": (lambda path: redirect(path, "location", "link"), "attack"),
    "linked folder": (lambda path: redirect(path, "location", "up/secret"), "attack"),
}


@pytest.mark.parametrize("name", BAD_EXTERNAL)
def test_refuses_bad_external_data(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    path = with_external(folder)
    change, words = BAD_EXTERNAL[name]
    change(path)
    with pytest.raises(errors.ExternalDataError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_links_inside_of_the_folder_are_fine(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    (tmp_path / "link").symlink_to("m.onnx.data")
    redirect(path, "location", "link")
    load(path)


# --- save ------------------------------------------------------------------------------------------------------------


def rich() -> onnx.ModelProto:
    """A model with everything that is easily lost."""
    proto = model(
        producer_name="me",
        producer_version="1.2",
        domain="org.me",
        model_version=7,
        doc_string="about",
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    helper.set_model_props(proto, {"k": "v", "a": "b"})
    proto.graph.doc_string = "graph doc"
    proto.graph.metadata_props.add(key="gk", value="gv")
    proto.graph.node[0].doc_string = "node doc"
    proto.graph.node[0].metadata_props.add(key="scope", value="a.b")
    proto.graph.initializer[0].doc_string = "weight doc"
    proto.graph.initializer[0].metadata_props.add(key="wk", value="wv")
    proto.graph.initializer[1].metadata_props.add(key="bk", value="bv")
    proto.graph.input[0].doc_string = "input doc"
    proto.graph.input[0].type.denotation = "TENSOR"
    proto.graph.quantization_annotation.add(tensor_name="h").quant_parameter_tensor_names.add(key="S", value="b")
    value = proto.graph.value_info.add(name="h", doc_string="value doc")
    value.metadata_props.add(key="vk", value="vv")
    return proto


@pytest.mark.parametrize("external", [False, True])
def test_metadata_survives(tmp_path: Path, external: bool) -> None:
    source, path = rich(), tmp_path / "m.onnx"
    save(load(source).model, path, external=external)
    saved = onnx.load(path)
    assert saved.graph.value_info[0].HasField("type")
    saved.graph.value_info[0].ClearField("type")
    for tensor in (*source.graph.initializer, *saved.graph.initializer):
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    del source.metadata_props[:]
    helper.set_model_props(source, {"a": "b", "k": "v"})  # stored sorted
    assert saved == source


@pytest.mark.parametrize("external", [False, True])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, external: bool) -> None:
    paths = [tmp_path / name for name in ("a/m.onnx", "b/m.onnx", "c/m.onnx")]
    for path in paths:
        path.parent.mkdir()
    first = load(rich())
    for path, source in zip(paths, (first, load(rich()), None), strict=True):
        size = save((source or load(paths[0])).model, path, external=external)
        assert size == sum(file.stat().st_size for file in path.parent.iterdir())
    contents = [{file.name: file.read_bytes() for file in path.parent.iterdir()} for path in paths]
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == ({"m.onnx", "m.onnx.data"} if external else {"m.onnx"})


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(rich().SerializeToString())
    code = "import sys; from spa.graph import load, save; save(load(sys.argv[1]).model, sys.argv[2], external=False)"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", code, str(tmp_path / "in.onnx"), str(tmp_path / f"{seed}.onnx")]
        subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_streamed_file_is_what_protobuf_would_write(tmp_path: Path) -> None:
    save(load(rich()).model, tmp_path / "m.onnx", external=False)
    data = (tmp_path / "m.onnx").read_bytes()
    assert onnx.load_from_string(data).SerializeToString(deterministic=True) == data
    assert to_proto(load(rich()).model).SerializeToString(deterministic=True) == data


def test_weights_of_subgraphs_and_constants_are_written(tmp_path: Path) -> None:
    inner = helper.make_graph([node("MatMul", ["x", "w"], ["t"])], "t", [], [info("t")], [constant("w", KERNEL)])
    other = helper.make_graph(
        [node("Constant", [], ["k"], value=constant("k", KERNEL * 2)), node("MatMul", ["x", "k"], ["e"])],
        "e",
        [],
        [info("e")],
    )
    nodes = [node("If", ["c"], ["y"], then_branch=inner, else_branch=other)]
    proto = model(nodes, {}, [info("x", "n", 64), info("c", kind=TensorProto.BOOL)], [info("y")])
    for external in (False, True):
        save(load(proto).model, tmp_path / "m.onnx", external=external)
        again = tmp_path / "n.onnx"
        save(load(tmp_path / "m.onnx").model, again, external=False)
        for case in (tmp_path / "m.onnx", again):
            for choice, want in ((True, X @ KERNEL), (False, X @ (KERNEL * 2))):
                np.testing.assert_array_equal(run(case, {"x": X, "c": np.array(choice)})[0], want)


def test_large_external_tensors_start_on_pages(tmp_path: Path) -> None:
    wide = RNG.standard_normal((64, 1000)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    proto = model(
        nodes,
        {"w": KERNEL[:, :17], "v": RNG.standard_normal((17, 1000)).astype(np.float32), "u": wide},
        outputs=[info("y")],
    )
    save(load(proto).model, tmp_path / "m.onnx", external=True)
    saved = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    offsets = {t.name: {e.key: e.value for e in t.external_data} for t in saved.graph.initializer}
    assert int(offsets["u"]["offset"]) % 4096 == 0
    assert offsets["u"]["location"] == "m.onnx.data"
    assert same(run(tmp_path / "m.onnx", {"x": X}), run(proto, {"x": X}))


def test_much_weight_goes_to_a_second_file_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SINGLE_FILE_LIMIT", 8000)
    save(load(model()).model, tmp_path / "m.onnx", external=False)
    assert (tmp_path / "m.onnx.data").stat().st_size == KERNEL.nbytes


@pytest.mark.parametrize("external", [False, True])
def test_lazy_weights_are_evaluated_one_at_a_time(tmp_path: Path, external: bool) -> None:
    alive: set[int] = set()

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def evaluate() -> ir.Tensor[Any]:
        array = np.array(KERNEL).view(Counted)
        alive.add(id(array))
        assert len(alive) == 1
        return ir.Tensor(array)

    nodes = [helper.make_node("Add", ["x", f"w{i}"], [f"y{i}"]) for i in range(5)]
    proto = model(nodes, {f"w{i}": KERNEL for i in range(5)}, [info("x", 64, 32)], [info(f"y{i}") for i in range(5)])
    loaded = load(proto).model
    for value in loaded.graph.initializers.values():
        value.const_value = ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape([64, 32]), name=value.name)
    save(loaded, tmp_path / "m.onnx", external=external)
    assert not alive
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", {"x": KERNEL})[4], KERNEL + KERNEL)


def test_shapes_are_written_as_the_weights_now_are(tmp_path: Path) -> None:
    loaded = load(model()).model
    loaded.graph.initializers["w"].const_value = ir.tensor(KERNEL[:, :16], name="w")
    loaded.graph.initializers["b"].const_value = ir.tensor(BIAS[:16], name="b")
    save(loaded, tmp_path / "m.onnx", external=False)
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    saved = onnx.load(tmp_path / "m.onnx").graph
    assert saved.value_info[0].type.tensor_type.shape.dim[1].dim_value == 16
    assert saved.output[0].type.tensor_type.shape.dim[1].dim_value == 16
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", {"x": X})[0], X @ KERNEL[:, :16] + BIAS[:16])


def test_files_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        save(load(model()).model, tmp_path / "m.onnx", external=True)
    finally:
        os.umask(previous)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_refuses_bad_targets(tmp_path: Path) -> None:
    loaded = load(model()).model
    with pytest.raises(errors.OutputError, match="is a directory"):
        save(loaded, tmp_path, external=False)
    with pytest.raises(errors.OutputError, match="does not exist"):
        save(loaded, tmp_path / "none" / "m.onnx", external=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError, match="does not exist"):
        save(loaded, tmp_path / "file" / "m.onnx", external=False)
    (tmp_path / "m.onnx.data").mkdir()
    with pytest.raises(errors.OutputError, match="cannot be written"):
        save(loaded, tmp_path / "m.onnx", external=True)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refuses_read_only_folders(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(errors.OutputError, match="cannot be written"):
        save(load(model()).model, tmp_path / "m.onnx", external=False)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("failing", ["write", "first rename", "second rename", "lazy"])
def test_a_failed_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, failing: str
) -> None:
    path = tmp_path / "m.onnx"
    save(load(model(weights={"w": KERNEL * 3, "b": BIAS})).model, path, external=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    loaded = load(model()).model
    calls = {"first rename": 1, "second rename": 2 if external else 1}.get(failing, 0)
    replace = os.replace

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def replace_or_fail(source: Path, target: Path) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            fail()
        replace(source, target)

    if failing == "write":
        monkeypatch.setattr(store, "_write", fail)
    elif failing == "lazy":
        wrong = ir.LazyTensor(lambda: ir.tensor(KERNEL[1:]), ir.DataType.FLOAT, ir.Shape([64, 32]), name="w")
        loaded.graph.initializers["w"].const_value = wrong
    else:
        monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(errors.OutputError, match="'w'" if failing == "lazy" else "free some space"):
        save(loaded, path, external=external)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_save_and_to_proto_leave_the_model_alone(tmp_path: Path) -> None:
    loaded = load(model()).model
    weights = [value.const_value for value in loaded.graph.initializers.values()]
    save(loaded, tmp_path / "m.onnx", external=True)
    to_proto(loaded)
    assert all(a is v.const_value for a, v in zip(weights, loaded.graph.initializers.values(), strict=True))


# --- real models -----------------------------------------------------------------------------------------------------


def test_the_whole_zoo_goes_round_unchanged(data_root: Path, tmp_path: Path) -> None:
    zoo = data_root / "zoo"
    for entry in json.loads((zoo / "manifest.json").read_text())["models"]:
        if not entry["status"].startswith("ok"):
            continue
        source = zoo / entry["file"]
        recorded = np.load(zoo / entry["npz"], allow_pickle=True)
        feeds = {key[3:]: recorded[key] for key in recorded.files if key.startswith("in:")}
        want = run(source, feeds)
        loaded = load(source)
        assert all(value.shape is not None for value in loaded.model.graph.inputs), entry["name"]
        for external in (False, True):
            path = tmp_path / f"{entry['name']}.onnx"
            save(loaded.model, path, external=external)
            assert same(run(path, feeds), want), entry["name"]
        original, saved = onnx.load(source, load_external_data=False), onnx.load(path, load_external_data=False)
        for side in ("input", "output"):
            names = [[value.name for value in getattr(proto.graph, side)] for proto in (original, saved)]
            assert names[0] == names[1], entry["name"]
        assert saved.ir_version == original.ir_version
        assert saved.producer_name == original.producer_name


def test_public_names() -> None:
    assert graph.__all__ == ["Graph", "Source", "load", "restore", "save", "to_proto"]
