"""Loading models: what `load` gives, and what it refuses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from spa import errors, graph
from spa.graph import load, restore, save, to_proto
from tests.loading import BIAS, KERNEL, RNG, X, constant, info, model, node, run, same

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
        load(3)  # type: ignore[arg-type]  # that is the test


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
            assert "\n" not in str(error)  # noqa: PT017  # it need not raise


def test_broken_text_attributes_are_model_errors() -> None:
    bad = node("Concat", ["x", "x"], ["y"], axis=0)
    bad.attribute.append(helper.make_attribute("words", [b"\xff\xfe", b"a"]))
    with pytest.raises(errors.ModelError):
        load(model([bad], {}))


def test_public_names() -> None:
    assert graph.__all__ == ["Graph", "Source", "load", "restore", "save", "to_proto"]
