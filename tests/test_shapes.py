"""Symbolic shapes against what the runtime and ONNX's own test cases really compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from spa.shapes import Shapes, infer
from spa.symbols import Size, Sym, bind, symbol

Arrays = Mapping[str, NDArray[Any]]


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {v.name: v for node in graph for v in node.outputs if v.name}


def _bindings(model: ir.Model, shapes: Shapes, feeds: Arrays) -> dict[str, int]:
    """The numbers behind the symbols of the inputs; names that two inputs give different sizes are left out."""
    found: dict[str, set[int]] = {}
    for value in model.graph.inputs:
        shape = shapes.shape(value)
        if value.name in feeds and shape is not None:
            for size, n in zip(shape, feeds[value.name].shape, strict=True):
                if isinstance(size, Sym) and len(size.free) == 1 and (size.coefficient, len(size.names)) == (1, 1):
                    found.setdefault(next(iter(size.free)), set()).add(n)
    return {name: numbers.pop() for name, numbers in found.items() if len(numbers) == 1}


def _contradictions(name: str, shapes: Shapes, value: ir.Value, real: NDArray[Any], at: dict[str, int]) -> list[str]:
    """Every claim about a value that its real content refutes."""
    wrong = []
    shape = shapes.shape(value)
    if shape is not None:
        bound = [bind(size, at) for size in shape]
        if len(bound) != real.ndim or any(b not in (None, n) for b, n in zip(bound, real.shape, strict=False)):
            return [f"{name}: shape {shape} = {bound}, really {real.shape}"]
    dtype = shapes.dtype(value)
    if dtype is not None and dtype.numpy() != real.dtype:
        wrong.append(f"{name}: type {dtype}, really {real.dtype}")
    const = shapes.const(value)
    if const is not None:
        if const.shape != real.shape:
            wrong.append(f"{name}: value of shape {const.shape}, really {real.shape}")
        elif const.dtype == object:
            pairs = zip(const.reshape(-1).tolist(), real.reshape(-1).tolist(), strict=True)
            bad = [(c, r) for c, r in pairs if c is not None and bind(c, at) not in (None, r)]
            wrong += [f"{name}: value {bad[0]}"] if bad else []
        elif not np.allclose(const.astype(np.float64), real.astype(np.float64), rtol=1e-6, atol=0, equal_nan=True):
            wrong.append(f"{name}: value {const}, really {real}")
    return wrong


# --- real models -----------------------------------------------------------------------------------------------------


def _run_everything(path: Path, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The real value of every node output of the main graph."""
    proto = onnx.load(path)
    names = [name for node in proto.graph.node for name in node.output if name]
    outputs = {info.name for info in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _feeds(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path.with_suffix(".npz")) as arrays:
        return {key[3:]: arrays[key] for key in arrays.files if key.startswith("in:")}


@pytest.mark.parametrize("stored", [False, True], ids=["bare", "annotated"])
def test_recorded_models(data_root: Path, stored: bool, record_property: pytest.RecordProperty) -> None:
    """No claim about any value of any recorded model is refuted by running it."""
    wrong: list[str] = []
    total = ranked = full = 0
    entries = json.loads((data_root / "zoo" / "manifest.json").read_text(encoding="utf-8"))["models"]
    for path in sorted((data_root / "zoo").glob("*.onnx")):
        if not path.with_suffix(".npz").is_file():
            continue
        proto = onnx.load(path)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True) if stored else proto)
        model.graph.sort()
        shapes, feeds = infer(model), _feeds(path)
        real, values = _run_everything(path, feeds), _values(model.graph)
        at = _bindings(model, shapes, feeds)
        fine = any(entry["file"] == path.name and entry.get("status") == "ok" for entry in entries)
        for name, array in real.items():
            if isinstance(array, np.ndarray):
                wrong += _contradictions(f"{path.stem}:{name}", shapes, values[name], array, at)
            shape = shapes.shape(values[name])
            total += fine
            ranked += fine and shape is not None
            full += fine and shape is not None and all(bind(size, at) is not None for size in shape)
    assert not wrong, "\n".join(wrong[:20])
    assert total
    record_property("values", total)
    record_property("rank known", ranked / total)
    record_property("shape known", full / total)
    print(f"{total} values: rank known {ranked / total:.2%}, every size known {full / total:.2%}")
    assert ranked / total >= 0.99


# --- ONNX's own node tests -------------------------------------------------------------------------------------------

_RANDOM = frozenset(("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike", "Dropout"))
_VARIANTS = ("static", "symbolic", "integers-known", "all-known")


def _variant(proto: onnx.ModelProto, feeds: Arrays, kind: str) -> onnx.ModelProto:
    """The same model with its inputs declared in another way."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    for info in out.graph.input:
        array = feeds.get(info.name)
        if array is None:
            continue
        integer = array.dtype.kind in "iub" and array.dtype.itemsize <= 8
        if (kind == "integers-known" and integer) or (kind == "all-known" and array.dtype.kind in "iubf"):
            out.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
        elif kind != "static":
            for k, dim in enumerate(info.type.tensor_type.shape.dim):
                dim.dim_param = f"{info.name}_{k}"
    for info in out.graph.output:
        info.type.tensor_type.ClearField("shape")
    return out


@pytest.fixture(scope="module")
def node_cases() -> list[tuple[str, onnx.ModelProto, Arrays, Arrays]]:
    """Name, model, inputs and expected outputs of each case with tensors only."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases compute infinities on purpose
        cases = onnx.backend.test.loader.load_model_tests(kind="node")
    for case in cases:
        given, wanted = case.data_sets[0]
        proto = case.model
        if all(isinstance(array, np.ndarray) for array in (*given, *wanted)):
            feeds = {info.name: array for info, array in zip(proto.graph.input, given, strict=False)}
            found.append(
                (case.name, proto, feeds, {i.name: a for i, a in zip(proto.graph.output, wanted, strict=True)})
            )
    return found


@pytest.mark.parametrize("kind", _VARIANTS)
def test_node_cases(kind: str, node_cases: list[Any], record_property: pytest.RecordProperty) -> None:
    """No claim about ONNX's operator test cases is refuted by their expected outputs."""
    wrong: list[str] = []
    total, unranked = 0, []
    for name, proto, feeds, expected in node_cases:
        if any(0 in array.shape for array in feeds.values()) and kind != "static":
            continue  # a named size is at least 1
        model = ir.from_proto(_variant(proto, feeds, kind))
        shapes = infer(model)
        at = _bindings(model, shapes, feeds)
        random = any(node.op_type in _RANDOM for node in proto.graph.node)
        for value in model.graph.outputs:
            total += 1
            unranked += [f"{name}:{value.name}"] if shapes.shape(value) is None else []
            if not random:
                wrong += _contradictions(f"{name}:{value.name}", shapes, value, expected[value.name], at)
    assert not wrong, "\n".join(wrong[:40])
    assert total > 500
    record_property("rank known", 1 - len(unranked) / total)
    print(f"{kind}: {total} outputs, rank known {1 - len(unranked) / total:.2%}", *unranked)
    # a list whose length is a symbol leaves the rank open
    assert len(unranked) / total < (0.05 if kind == "symbolic" else 0.01)


# --- by hand ---------------------------------------------------------------------------------------------------------

N, S, P = (symbol(name) for name in "NSP")


def _infer(text: str) -> dict[str, tuple[tuple[Size, ...] | None, Any]]:
    """Shape and value of every node output of a model in ONNX text form."""
    model = ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>{text}')
    )
    shapes = infer(model)
    return {
        name: (shapes.shape(v), None if (c := shapes.const(v)) is None else c.tolist())
        for name, v in _values(model.graph).items()
    }


def test_shape_subgraph_of_an_exporter() -> None:
    found = _infer("""
        g (float[N, S, 768] x) => (y) <int64 zero = {0}, int64 one = {1}, int64[1] heads = {12}, int64[1] axes = {0},
                                       int64[1] rest = {-1}> {
            s = Shape(x)  n = Gather(s, zero)  t = Gather(s, one)
            n1 = Unsqueeze(n, axes)  t1 = Unsqueeze(t, axes)
            target = Concat<axis = 0>(n1, t1, heads, rest)
            r = Reshape(x, target)
            y = Transpose<perm = [0, 2, 1, 3]>(r)
        }""")
    assert found["target"] == ((4,), [N, S, 12, -1])
    assert found["y"][0] == (N, 12, S, 64)


def test_cache_grows_and_is_cut_again() -> None:
    found = _infer("""
        g (float[N, 4, P, 8] past, float[N, 4, S, 8] new) => (y) <int64[1] two = {2}, int64[1] zero = {0}> {
            both = Concat<axis = 2>(past, new)
            length = Shape<start = 2, end = 3>(both)
            have = Shape<start = 2, end = 3>(past)
            y = Slice(both, have, length, two)
        }""")
    assert found["both"][0] == (N, 4, P + S, 8)
    assert found["y"][0] == (N, 4, S, 8)


def test_table_cut_to_the_sequence() -> None:
    found = _infer("""
        g (float[N, S, 8] x, float[1, 512, 8] table) => (y) <int64[1] one = {1}, int64[1] zero = {0}> {
            t = Shape<start = 1, end = 2>(x)
            cut = Slice(table, zero, t, one)
            y = Add(x, cut)
        }""")
    assert found["y"][0] == (N, S, 8)


def test_comparisons_of_symbols() -> None:
    found = _infer("""
        g (float[N, S] x) => (c, d, w) <int64[2] minus = {-1, -1}, int64[2] some = {4, 0}> {
            s = Shape(x)
            c = Equal(s, minus)  d = Equal(s, some)
            w = Where(c, some, s)
        }""")
    assert found["c"][1] == [False, False]
    assert found["d"][1] == [None, False]
    assert found["w"][1] == [N, S]


def test_unknown_elements_stay_unknown() -> None:
    found = _infer("""
        g (float[N, 6] x, int64[1] k) => (y, z, e) <int64[1] two = {2}> {
            target = Concat<axis = 0>(k, two)
            y = Reshape(x, target)
            one = Shape<start = 0, end = 1>(x)
            free = Concat<axis = 0>(k, k)
            z = Reshape(x, free)
            e = Expand(x, target)
        }""")
    assert found["target"][1] == [None, 2]
    assert found["y"][0] == (3 * N, 2)  # whatever k is, the number of elements decides
    assert found["z"][0] is not None
    assert len(set(found["z"][0])) == 2
    assert found["e"][0] is not None


def test_windows() -> None:
    found = _infer("""
        g (float[N, 3, H, 9] x, float[8, 3, 3, 3] w) => (a, b) {
            a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w)
            b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        }""")
    height = symbol("H")
    assert found["a"][0] == (N, 8, (height + 1) // 2, 5)
    assert found["b"][0] == (N, 8, (height + 1) // 4, 2)


def test_if_takes_the_known_branch_and_else_what_both_agree_on() -> None:
    text = """
        g (float[N, 4] x, bool c) => (y) <int64[1] one = {1}> {
            s = Shape(x)  n = Size(x)  bad = Sub(n, n)  never = Cast<to = 9>(bad)
            y = If(%s) <then_branch = t () => (a) {a = Concat<axis = 1>(x, x)},
                        else_branch = e () => (b) {b = Relu(x)}>
        }"""
    assert _infer(text % "never")["y"][0] == (N, 4)
    shape = _infer(text % "c")["y"][0]
    assert shape is not None
    assert shape[0] == N
    assert isinstance(shape[1], Sym)
    assert shape[1] != N


def test_loop_keeps_what_its_body_keeps() -> None:
    found = _infer("""
        g (float[N, 4] x, int64 m) => (f, all) <bool go = {1}> {
            f, h, all = Loop(m, go, x, x) <body = b (int64 i, bool c, float[N, 4] p, float[N, Q] q) => (k, r, t, u) {
                k = Identity(c)
                r = Relu(p)
                t = Concat<axis = 1>(q, p)
                u = Identity(p)
            }>
        }""")
    assert found["f"][0] == (N, 4)
    grown = found["h"][0]
    assert grown is not None
    assert grown[0] == N
    assert isinstance(grown[1], Sym)
    every = found["all"][0]
    assert every is not None
    assert every[1:] == (N, 4)


def test_declared_expressions_are_read() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        g (float[N, S] x, float[N, P] past, float[N, total] mask) => (y) { y = Concat<axis = 1>(past, x) }""")
    )
    model.graph.inputs[2].shape = ir.Shape([ir.SymbolicDim("N"), ir.SymbolicDim("P + S")])
    shapes = infer(model)
    assert shapes.shape(model.graph.inputs[2]) == shapes.shape(model.graph.outputs[0]) == (N, P + S)


def test_stored_dims_fill_gaps_only() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "other" : 1]>
        g (float[N, 4] x) => (y, z) { y = other.Strange(x)  z = Relu(x) }""")
    )
    strange, same = _values(model.graph).values()
    strange.shape, same.shape = ir.Shape([7, ir.SymbolicDim(None)]), ir.Shape([7, 5])
    shapes = infer(model)
    odd = shapes.shape(strange)
    assert odd is not None
    assert odd[0] == 7
    assert shapes.shape(same) == (N, 4)


@pytest.mark.parametrize(
    "body",
    [
        "y = Reshape(x, bad)",
        "y = Transpose<perm = [3, 1]>(x)",
        "y = Concat<axis = 9>(x, x)",
        "y = Gather<axis = -7>(x, bad)",
        "y = Slice(x, bad, bad, bad, bad)",
        "y = MatMul(x, x)",
        "y = Conv(x, x)",
        'y = Einsum<equation = "abc->a">(x)',
        "y = Split<axis = 1, num_outputs = 3>(x)",
        "y = Unsqueeze(x, bad)",
        "y = Nonsense(x)",
        "y = com.microsoft.FusedMatMul(x, bad)",
    ],
)
def test_broken_nodes_are_unknown_not_errors(body: str) -> None:
    assert "y" in _infer(f"g (float[N, 4] x) => (y) <int64[3] bad = {{7, -9, 0}}> {{ {body} }}")
