"""The interpreter on ONNX's own node tests: every one of them is run, or named with the reason why it is not."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx_ir as ir
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from spa.errors import UnsupportedModelError  # noqa: E402
from spa.interpreter import Interpreter  # noqa: E402
from spa.interpreter.types import to_numpy  # noqa: E402

Array = np.ndarray[Any, Any]
LEAST = 1258
"""Node tests that pass; a change that loses some is noticed."""
RANDOM = re.compile(r"bernoulli|training_dropout(?!_zero_ratio)")
"""What a random generator decides: the expected values are numpy's."""
HALF = 2e-2
"""bfloat16 keeps 8 bits, and sums are taken in another order."""


def _collect() -> list[Any]:
    node_cases.function_testcase_helper = lambda *_, **__: ([], 0)  # the bodies of functions are not needed
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(node_cases.collect_testcases())


COLLECTED = _collect()


def array(value: Any) -> Any:
    """An operand as numpy arrays; sequences are lists, an absent optional is None."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list):
        return [array(item) for item in value]
    return value if value is None else np.asarray(value)


def same(got: Any, want: Any, rtol: float, atol: float, kind: ir.DataType | None) -> bool:
    if isinstance(want, list):
        return (
            isinstance(got, list)
            and len(got) == len(want)
            and all(same(a, b, rtol, atol, None) for a, b in zip(got, want, strict=True))
        )
    have = to_numpy(got, kind)
    if have.shape != want.shape or have.dtype != want.dtype:
        return False
    if want.dtype.kind in "biu":
        return bool(np.array_equal(have, want))
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    if want.dtype.itemsize <= 2:
        rtol, atol = max(rtol, HALF if want.dtype.name == "bfloat16" else 2e-3), max(atol, 1e-3)
    return bool(np.allclose(have.astype(wide), want.astype(wide), rtol=rtol, atol=atol, equal_nan=True))


KNOWN: dict[str, str] = {}


def outcome(test: Any) -> str:
    """`passed`, `not applicable: why`, `unsupported: why` or `failed: why`."""
    if test.name not in KNOWN:
        KNOWN[test.name] = _outcome(test)
    return KNOWN[test.name]


def _outcome(test: Any) -> str:
    if test.model is None:
        return "not applicable: no model"
    if RANDOM.search(test.name):
        return "not applicable: the expected values come from numpy's random generator"
    model = ir.from_proto(test.model)
    try:
        network = Interpreter(model).eval()
    except UnsupportedModelError as error:
        return f"unsupported: {error}"
    kinds = {value.name: value.dtype for value in model.graph.outputs}
    for inputs, outputs in test.data_sets:
        names = [info.name for info in test.model.graph.input]
        with torch.no_grad():
            got = network(dict(zip(names, map(array, inputs), strict=True)))
        for info, want in zip(test.model.graph.output, map(array, outputs), strict=True):
            if not same(got[info.name], want, test.rtol, max(test.atol, 1e-7), kinds[info.name]):
                return f"failed: {info.name} differs"
    return "passed"


@pytest.mark.parametrize("test", COLLECTED, ids=lambda t: t.name)
def test_node(test: Any) -> None:
    result = outcome(test)
    kind, _, reason = result.partition(": ")
    assert kind != "failed", reason
    if kind != "passed":
        pytest.skip(f"{kind}: {reason.partition(' (')[2] or reason}")


UNSUPPORTED = {
    "strings": "Equal StringSplit StringNormalizer StringConcat RegexFullMatch TfIdfVectorizer",
    "no rule of spa either, and nothing to differentiate": "ImageDecoder MelWeightMatrix HannWindow "
    "HammingWindow BlackmanWindow",
    "signals": "DFT STFT",
    "optional values": "OptionalHasElement OptionalGetElement If Loop",
    "a function of sequences": "SequenceMap",
    "Scan over batches, before opset 9": "Scan",
    "newer than what ONNX Runtime loads": "LinearAttention CausalConvWithState FlexAttention",
    "training operators": "Adam Adagrad Momentum",
    "another domain": "LabelEncoder ArrayFeatureExtractor TreeEnsemble Binarizer",
}
"""Operators of node tests that are not run, by reason; for If, Loop, Equal and Scan single tests."""


def test_node_tests_that_are_not_run_are_known() -> None:
    named = {name for names in UNSUPPORTED.values() for name in names.split()}
    passed = 0
    for test in COLLECTED:
        kind, _, reason = outcome(test).partition(": ")
        passed += kind == "passed"
        if kind == "unsupported":
            assert {node.op_type for node in test.model.graph.node} & named, f"{test.name}: {reason}"
    assert passed >= LEAST
