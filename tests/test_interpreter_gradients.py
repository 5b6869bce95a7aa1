"""Gradients of every operator against finite differences, once and twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from spa.graph import load  # noqa: E402
from spa.interpreter import Interpreter  # noqa: E402
from spa.interpreter.types import to_tensor  # noqa: E402
from tests.models import BUILT  # noqa: E402
from tests.net import Net, feeds  # noqa: E402
from tests.subject import Case  # noqa: E402
from tests.test_law import CASES  # noqa: E402

CONSTANT = frozenset(
    [
        "IsNaN",
        "IsInf",
        "BitCast",
        "Hardmax",
        "ArgMax",
        "ArgMin",
        "Shape",
        "Size",
        "EyeLike",
        "QuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
    ]
)
"""No gradient passes: their results are whole numbers, or bits."""
ROUNDED = "the derivative that passes straight through rounding is not that of the steps"
AMBIGUOUS = "positions that are written twice: which value stays is not defined"


def reason_against(spec: Case) -> str:
    """Why the gradient of a case is not checked, empty if it is."""
    arrays = spec.subject.feeds(spec.subject.arrays)
    if not any(a.dtype.kind == "f" and a.size for a in arrays.values()):
        return "no operand is a float"
    if spec.operator in CONSTANT:
        return "no gradient passes"
    if spec.operator.startswith("DynamicQuantize"):
        return ROUNDED
    if spec.operator == "Dropout":
        return "random"
    if "use_sparse_mixer" in spec.attributes:
        return "no sparse mixer here"
    if spec.operator.startswith("Scatter") and "reduction" not in spec.attributes:
        index = next((a for a in arrays.values() if a.dtype.kind == "i"), None)
        if index is not None and len(np.unique(index)) < index.size:
            return AMBIGUOUS
    if str(spec).startswith("Pow 2x3x4 p:"):
        return "powers of negative numbers"
    return ""


def function_of(spec: Case) -> tuple[Any, list[Any]]:
    """The case as a function of its float operands, which are initializers and inputs."""
    subject = spec.subject
    network = Interpreter(ir.from_proto(subject.with_arrays(subject.arrays))).eval().double()
    given = {k: to_tensor(v) for k, v in subject.feeds(subject.arrays).items()}
    names = [k for k, v in given.items() if v.is_floating_point() and v.numel()]
    weights = list(network.weights.values())

    def function(*tensors: Any) -> tuple[Any, ...]:
        out = network({**given, **dict(zip(names, tensors, strict=False))})
        return tuple(v for v in out.values() if isinstance(v, torch.Tensor) and v.requires_grad)

    return function, [*(given[k].double().requires_grad_() for k in names), *weights]


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_gradients(spec: Case) -> None:
    reason = reason_against(spec)
    if reason:
        pytest.skip(reason)
    function, inputs = function_of(spec)
    assert function(*inputs)
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)


ONCE = {"GridSample": "torch does not differentiate it twice"}
TWICE = list({(c.domain, c.operator, len(c.attributes)): c for c in CASES if not reason_against(c)}.values())
"""One case per operator and number of attributes."""


@pytest.mark.parametrize("spec", TWICE, ids=str)
def test_second_derivatives(spec: Case) -> None:
    if spec.operator in ONCE:
        pytest.skip(ONCE[spec.operator])
    function, inputs = function_of(spec)
    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)


def test_most_cases_are_checked() -> None:
    assert sum(not reason_against(spec) for spec in CASES) >= 440
    assert len(TWICE) >= 200


@pytest.mark.parametrize(
    "name", ["residual_cnn", "unet", "vit_split", "decoder", "fused_bert", "lstm_tagger", "loop", "scan", "branches"]
)
def test_gradients_of_models(name: str) -> None:
    """Derivative along a random direction in all weights, against a difference in float64."""
    proto = BUILT[name].build()
    network = Interpreter(load(proto)).eval().double()
    inputs = feeds(proto)
    weights = list(network.weights.values())
    torch.manual_seed(0)
    direction = [torch.randn_like(w) for w in weights]

    def loss() -> Any:
        return sum(v.square().sum() for v in network(inputs).values() if v.is_floating_point())

    gradient = torch.autograd.grad(loss(), weights, allow_unused=True)
    want = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.add_(d, alpha=sign * 1e-7)
            values.append(float(loss()))
            for w, d in zip(weights, direction, strict=True):
                w.add_(d, alpha=-sign * 1e-7)
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_gradients_pass_straight_through_quantisation() -> None:
    """QuantizeLinear and DequantizeLinear: the gradient is 1 inside of the range and 0 outside."""
    net = Net(opset=17)
    scale, zero = net.value("scale", 0.5), net.value("zero", 10, np.uint8)
    x = net("QuantizeLinear", net.input("x", 5), scale, zero)
    net.named(net("DequantizeLinear", x, scale, zero), "y")
    network = Interpreter(load(net.model(y=(5,))))
    x = torch.tensor([-9.0, -1.3, 0.2, 7.1, 500.0], requires_grad=True)
    y = network({"x": x})["y"]
    assert y.tolist() == [-5.0, -1.5, 0.0, 7.0, 122.5]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
