"""The law over ONNX's own node tests: cases that nobody here wrote, for every operator that has a rule.

Whatever is not tested is skipped with its reason, and pytest's summary counts the reasons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx.defs
import pytest
from onnx import numpy_helper

from spa import rules
from spa.errors import RuntimeFailure
from tests.law import Law
from tests.subject import FLOAT16, FLOAT32, IR_VERSION, QUANTISED, TYPES, Array, Subject, Tolerance

NEWEST = 26
"""ONNX Runtime 1.31 loads no newer opset."""
PARAMETERS = frozenset(
    [
        "shape",
        "axes",
        "axis",
        "starts",
        "ends",
        "steps",
        "pads",
        "repeats",
        "sizes",
        "scales",
        "roi",
        "k",
        "split",
        "indices",
        "depth",
        "target_shape",
        "max_output_boxes_per_class",
        "output_shape",
        "num_outputs",
        "sequence_lens",
    ]
)
"""Operands that real graphs hold as constants."""
_FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz)
_WHOLE = frozenset(np.dtype(t) for t in (*TYPES.values(), *_FLOAT8))


def _collect() -> list[Any]:
    """All node tests; the bodies of functions are not needed."""
    node_cases.function_testcase_helper = lambda *_, **__: ([], 0)
    return [c for c in node_cases.collect_testcases() if _rule(c.model) is not None]


def _rule(model: onnx.ModelProto | None) -> rules.Rule | None:
    if model is None:
        return None
    node = model.graph.node[0]
    version = next((o.version for o in model.opset_import if o.domain == node.domain), 1)
    return rules.lookup(node.domain, node.op_type, version) if len(model.graph.node) == 1 else None


COLLECTED = _collect()


def _skip(reason: str) -> Any:
    pytest.skip(reason)


def _subject(test: Any) -> Subject:
    """The test as a subject of the law."""
    proto = onnx.ModelProto()
    proto.CopyFrom(test.model)
    proto.ir_version = IR_VERSION
    node = proto.graph.node[0]
    _lower(proto, node)
    names = [v.name for v in proto.graph.input]
    arrays = dict(zip(names, map(_array, test.data_sets[0][0]), strict=True))
    outputs = [_array(a) for a in test.data_sets[0][1]]
    schema = onnx.defs.get_schema(node.op_type, proto.opset_import[0].version, node.domain)
    formal = dict(_formal(node, schema))
    fixed = frozenset(n for n in names if formal.get(n, "").lower() in PARAMETERS and arrays[n].dtype.kind in "iuf")
    plain = not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)
    if plain and sorted({n for n in node.input if n}) != sorted(n for n in node.input if n):
        _skip("an operand is used twice")
    zeros: dict[str, int | str] = {}
    by_formal = {f.lower(): n for n, f in formal.items()}
    for name, kind in formal.items():
        point = by_formal.get(f"{kind.lower()}_zero_point")
        if point is not None and len(set(arrays[point].reshape(-1).tolist())) == 1:
            zeros[name] = int(arrays[point].reshape(-1)[0])
    del proto.graph.input[:], proto.graph.value_info[:]
    for value in proto.graph.output:
        value.ClearField("type")
    return Subject(proto, arrays, fixed, plain, _tolerance([*arrays.values(), *outputs]), zeros)


def _lower(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Ask for an opset that ONNX Runtime loads, where the operator has the same attributes there."""
    for opset in proto.opset_import:
        if opset.version > NEWEST and opset.domain == "":
            try:
                older = onnx.defs.get_schema(node.op_type, NEWEST, node.domain)
            except onnx.defs.SchemaError:
                _skip(f"new after opset {NEWEST}, the last that ONNX Runtime loads")
            if any(a.name not in older.attributes for a in node.attribute):
                _skip(f"attributes that are new after opset {NEWEST}")
            opset.version = NEWEST


def _formal(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[tuple[str, str]]:
    for k, name in enumerate(node.input):
        if name:
            yield name, schema.inputs[min(k, len(schema.inputs) - 1)].name


def _array(value: Any) -> Array:
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    if not isinstance(value, np.ndarray | np.generic):
        _skip("operands are not tensors")
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        _skip("strings")
    if array.dtype not in _WHOLE:
        _skip(f"{array.dtype} operands")
    return array


def _tolerance(arrays: list[Array]) -> Tolerance:
    if any(a.dtype.itemsize == 2 and a.dtype.kind not in "iu" for a in arrays):
        return FLOAT16
    return QUANTISED if arrays[-1].dtype.itemsize == 1 and any(a.dtype.kind == "f" for a in arrays) else FLOAT32


@pytest.mark.parametrize("test", COLLECTED, ids=lambda t: t.name)
def test_node(test: Any) -> None:
    subject = _subject(test)
    if not subject.arrays:
        _skip("no operands")
    try:
        law = Law(subject)
    except RuntimeFailure as error:
        _skip("neither ONNX Runtime nor the reference evaluator runs it" + str(error)[:0])
    if not law.check(seeds=1):
        _skip("nothing may leave: every axis is frozen or has one position")


def test_node_tests_cover_what_they_should() -> None:
    """A change that silently loses node tests is noticed."""
    assert len(COLLECTED) > 1000
    assert dataclasses.is_dataclass(Subject)
