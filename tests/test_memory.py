"""Big models: their weights are mapped, never held; what that takes, and that damaged files are still refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from spa import blocks, errors, external, graph, pipeline, store, wire
from spa.graph import load, save

MIB = 1 << 20
RNG = np.random.default_rng(0)


def network(width: int, layers: int, constants: bool = False, dtype: Any = np.float32) -> onnx.ModelProto:
    """`layers` products of `width` x `width`, their weights as initializers or as `Constant` nodes."""
    nodes, tensors, value = [], [], "x"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for k in range(layers):
        array = RNG.standard_normal((width, width), dtype=np.float32) * np.float32((2 / width) ** 0.5)
        tensor = numpy_helper.from_array(array.astype(dtype), f"w{k}")
        if constants:
            nodes.append(helper.make_node("Constant", [], [f"w{k}"], f"constant{k}", value=tensor))
        else:
            tensors.append(tensor)
        nodes.append(helper.make_node("MatMul", [value, f"w{k}"], [f"h{k}"], f"product{k}"))
        nodes.append(helper.make_node("Relu", [f"h{k}"], [f"r{k}" if k + 1 < layers else "y"], f"relu{k}"))
        value = f"r{k}"
    x, y = (helper.make_tensor_value_info(name, kind, ["n", width]) for name in ("x", "y"))
    return helper.make_model(
        helper.make_graph(nodes, "net", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


# --- how much memory it takes ----------------------------------------------------------------------------------------

CHILD = """
import json, sys, threading, time
import spa

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

spa.prune(sys.argv[1], target="params=0.7", output=sys.argv[3])  # imports what pruning needs
base, anonymous, done = status("VmRSS"), [0], threading.Event()

def sample():
    while not done.wait(0.002):
        anonymous[0] = max(anonymous[0], status("RssAnon"))

thread = threading.Thread(target=sample)
before = status("RssAnon")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
thread.start()
result = spa.prune(sys.argv[2], target="params=0.7", output=sys.argv[3])
done.set()
thread.join()
print(json.dumps({
    "peak": status("VmHWM") - base, "anonymous": anonymous[0] - before,
    "error": result.report.verify.max_rel_error, "seconds": sum(result.report.seconds.values()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["single", "constants", "external"])
def test_pruning_and_verifying_holds_few_weights(tmp_path: Path, kind: str) -> None:
    small, source = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(network(64, 3), small)
    proto = network(1792, 12, kind == "constants")  # 147 MiB
    onnx.save(proto, source, save_as_external_data=kind == "external", location="big.onnx.data")
    size = sum(file.stat().st_size for file in tmp_path.glob("big*"))
    assert size > 146 * MIB
    command = [sys.executable, "-c", CHILD, str(small), str(source), str(tmp_path / "out.onnx")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = json.loads(done.stdout)
    print(kind, {key: round(value / MIB) for key, value in used.items()})
    assert used["error"] < 1e-4
    # a block and its copies, one tensor, some pages that are mapped: the file's size does not matter
    assert used["anonymous"] < 80 * MIB
    assert used["peak"] < 1.0 * size
    assert (tmp_path / "out.onnx.data").exists() == (kind == "external")


# --- files taken apart without protobuf ------------------------------------------------------------------------------


def both(path: Path) -> tuple[Any, Any]:
    """The model as read piece by piece (None: protobuf shall decide), and as protobuf reads it."""
    file = external.File(path)
    return described(lambda: external.map_model(file, "m")), described(lambda: graph._parsed(file, "m", True))


def described(read: Any) -> Any:
    try:
        found = read()
    except Exception as error:  # `load` makes one ModelError of whatever the libraries raise
        return type(error), str(error)
    if found is None:
        return None
    proto, weights, size = found
    return proto.SerializeToString(deterministic=True), [(w.name, w.dtype, w.shape, w.tobytes()) for w in weights], size


def everything() -> onnx.ModelProto:
    """Weights at every place of a model."""
    inner = network(40, 2, constants=True)
    branch = helper.make_graph(
        inner.graph.node,
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40])],
        network(40, 1).graph.initializer,
    )
    proto = network(40, 2)
    proto.graph.initializer[0].doc_string = "weight"
    proto.graph.initializer[0].metadata_props.add(key="k", value="v")
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    imports = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("d", "F", ["x"], ["y"], inner.graph.node, imports))
    return proto


def test_weights_at_every_place_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(everything().SerializeToString())
    light, ordinary = both(path)
    assert light == ordinary
    assert len(light[1]) == 2 + 2 * (1 + 2) + 2
    assert len(light[0]) < 4000


def field(number: int, content: bytes) -> bytes:
    return wire._varint(number << 3 | 2) + wire._varint(len(content)) + content


TENSOR = network(40, 1).graph.initializer[0].SerializeToString()
ODD: dict[str, tuple[bytes, bool]] = {  # appended to a model; whether it is still read piece by piece
    "a second graph": (field(7, field(5, TENSOR.replace(b"w0", b"v0"))), True),
    "an unknown field": (field(999, b"x" * 9000) + b"\xb8\x3e\x05" + b"\xb9\x3e12345678" + b"\xbd\x3e1234", True),
    "a group": (b"\x3b\x3c", False),
    "an end of nothing": (b"\x3c", False),
    "a long length": (b"\x3a\x80\x80\x80\x00", True),
    "a huge length": (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", False),
    "an endless number": (b"\x08" + b"\xff" * 12, False),
    "field zero": (b"\x00\x00", False),
    "a cut-off end": (field(7, field(5, TENSOR))[:-1], False),
    "raw data twice": (field(7, field(5, TENSOR + field(9, bytes(6400)))), False),
    "raw data of text": (field(7, field(5, field(8, b"s") + b"\x10\x08" + field(9, bytes(6400)))), False),
    "raw data of the wrong size": (field(7, field(5, TENSOR + field(9, bytes(6404)))), True),
    "weights where none belong": (field(20, field(1, field(5, TENSOR))), True),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_protobuf_reads_them(tmp_path: Path, name: str) -> None:
    extra, apart = ODD[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(network(40, 2).SerializeToString() + extra)
    light, ordinary = both(path)
    assert light == ordinary if apart else light in (None, ordinary)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_as_protobuf_reads_them(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(everything().SerializeToString())
    places = st.integers(0, len(whole) - 1)
    match data.draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
        case "flip":
            for place in data.draw(st.lists(places, min_size=1, max_size=4)):
                whole[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del whole[data.draw(places) + 1 :]
        case "insert":
            place = data.draw(places)
            whole[place:place] = data.draw(st.binary(min_size=1, max_size=12))
        case "remove":
            place = data.draw(places)
            del whole[place : place + data.draw(st.integers(1, 12))]
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(whole) or b"\0")
    light, ordinary = both(path)
    assert light in (None, ordinary)


def test_splice_undoes_cut_and_refuses_what_is_no_weight() -> None:
    data = everything().SerializeToString(deterministic=True)
    light, spans = wire.cut(data, 4096)
    size, pieces = wire.splice(light, {token: span.length for token, span in spans.items()})
    order = list(spans.values())
    parts = [p if isinstance(p, bytes) else data[order[p].offset : order[p].offset + order[p].length] for p in pieces]
    assert b"".join(parts) == data
    assert size == len(data)
    for token in (b"product0", b"absent"):
        with pytest.raises(wire.Irregular):
            wire.splice(light, {token: 5})


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are treated like big ones."""
    monkeypatch.setattr(graph, "READ_WHOLE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(importlib.import_module("spa.verify"), "LARGE", 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_tensors_in_blocks_are_the_tensors(dtype: Any) -> None:
    array = RNG.integers(-9, 9, (37, 5, 11)).astype(dtype)
    base, shape = ir.tensor(array, name="w"), ir.Shape(array.shape)
    rows = blocks.Blocked(lambda start, stop: array[start:stop], base.dtype, shape, "w")
    lazy = ir.LazyTensor(lambda: base, base.dtype, shape, name="w")
    first, last = np.array([0, 3, 4, 30, 36]), np.array([1, 10])
    want = np.zeros_like(array[first][:, :, last])
    want[:, [0, 2, 3]] = array[first][:, :, last][:, [0, 2, 3]]
    for source in (base, rows, lazy):
        cut = blocks.blanked(blocks.picked(source, [(0, first), (2, last)], "c"), 1, np.array([1, 4]))
        np.testing.assert_array_equal(cut.numpy(), want)
        np.testing.assert_array_equal(np.concatenate(list(blocks.blocks(cut))), want)
        blank = blocks.blanked(source, 0, first).numpy()
        np.testing.assert_array_equal(np.flatnonzero(blank.any((1, 2))), np.setdiff1d(np.arange(37), first))
        assert blocks.picked(source, [(0, first[:0])], "e").numpy().shape == (0, 5, 11)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_mapped_models_prune_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constants: bool, outside: bool
) -> None:
    folders = [tmp_path / name for name in ("source", "mapped", "whole")]
    for folder in folders:
        folder.mkdir()
    source, mapped, whole = (folder / "m.onnx" for folder in folders)
    save(load(network(40, 3, constants)).model, source, external=outside)
    result = pipeline.prune(source, target="params=0.7", output=mapped)
    assert result.report.verify is not None
    assert result.report.verify.passed
    monkeypatch.undo()
    pipeline.prune(source, target="params=0.7", output=whole)
    written = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders[1:]]
    assert written[0] == written[1]
    assert set(written[0]) == ({"m.onnx", "m.onnx.data"} if outside and not constants else {"m.onnx"})


@pytest.mark.usefixtures("tiny")
def test_saving_over_the_source_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = network(40, 2)
    path.write_bytes(proto.SerializeToString())
    loaded = load(path)
    for _ in range(2):
        save(loaded.model, path, external=False)
        for tensor in proto.graph.initializer:
            weight = load(path).model.graph.initializers[tensor.name].const_value
            assert weight is not None
            assert weight.tobytes() == tensor.raw_data


@pytest.mark.usefixtures("tiny")
def test_a_file_that_is_overwritten_while_in_use_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(network(40, 2).SerializeToString())
    loaded = load(path)
    path.write_bytes(b"short")
    with pytest.raises(errors.ModelError, match="overwritten"):
        save(loaded.model, tmp_path / "out.onnx", external=False)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_models_are_unpacked_for_runtimes(tmp_path: Path) -> None:
    path, target = tmp_path / "m.onnx", tmp_path / "u.onnx"
    path.write_bytes(network(200, 2, constants=True).SerializeToString())
    assert store.unpack(path, target) == target
    unpacked = onnx.load(target, load_external_data=False)
    assert [node.op_type for node in unpacked.graph.node] == ["MatMul", "Relu"] * 2
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in unpacked.graph.initializer]
    assert [entry["offset"] for entry in entries] == ["0", "163840"]  # 160 000 bytes, up to the next page
    path.write_bytes(b"\x3b\x3c")
    assert store.unpack(path, target) == path
