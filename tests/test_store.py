"""External data, saving and restoring models."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from spa import errors, store
from spa.graph import load, save, to_proto
from tests.loading import BIAS, KERNEL, RNG, X, constant, info, model, node, run, same, with_external

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
