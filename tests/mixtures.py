"""Small mixtures of experts, built by hand in the forms in which exporters write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tests.net import Net

EXPERTS, CHOSEN, WIDTH, HIDDEN = 6, 2, 8, 12
LOGITS = "logits"
"""Name of the router's logits, [n, EXPERTS]: an expert whose logit is minus infinity does not exist."""
BIASED = "biased"
"""Name of what sigmoid routers choose from, where that is said after the sigmoid and the bias."""

Shares = Callable[[Net, str], tuple[str, str]]
"""(net, logits) -> shares and numbers of the chosen experts, [n, CHOSEN] each."""
Mixture = Callable[[Net, str, str, str], str]
"""(net, x, shares, numbers) -> what the experts make of x, [n, WIDTH]."""


def _ends(net: Net) -> str:
    return net.value("last", [-1])


def _top(net: Net, scores: str, k: int = CHOSEN) -> tuple[str, str]:
    best, which = net("TopK", scores, net.value("k", [k]), outputs=2, axis=-1)
    return best, which


def of_softmax(net: Net, logits: str) -> tuple[str, str]:
    """Mixtral: the best of all shares, which then sum to one again."""
    best, which = _top(net, net("Softmax", logits, axis=-1))
    return net("Div", best, net("ReduceSum", best, _ends(net), keepdims=1)), which


def of_logits(net: Net, logits: str) -> tuple[str, str]:
    """GPT-OSS: shares of the chosen ones only."""
    best, which = _top(net, logits)
    return net("Softmax", best, axis=-1), which


def of_log_softmax(net: Net, logits: str) -> tuple[str, str]:
    best, which = _top(net, net("LogSoftmax", logits, axis=-1))
    return net("Exp", best), which


def of_sigmoid(net: Net, logits: str) -> tuple[str, str]:
    """DeepSeek: a bias helps to choose and is no part of the shares."""
    scores = net("Sigmoid", logits)
    correction = net.value("correction", np.linspace(-0.02, 0.02, EXPERTS))
    _, which = _top(net, net.named(net("Add", scores, correction), BIASED))
    return net("GatherElements", scores, which, axis=-1), which


def of_best(net: Net, logits: str) -> tuple[str, str]:
    """Switch: one expert, by ArgMax."""
    shares = net("Softmax", logits, axis=-1)
    which = net("ArgMax", shares, axis=-1, keepdims=1)
    return net("ReduceMax", shares, axes=[-1], keepdims=1), which


def of_threshold(net: Net, logits: str) -> tuple[str, str]:
    """Shares of all experts, from logits that are at least the last of the best; no number is used."""
    best, _ = _top(net, logits)
    least = net("Gather", best, net.value("second", [CHOSEN - 1]), axis=-1)
    left = net("Where", net("Less", logits, least), net.value("never", -np.inf), logits)
    return net("Softmax", left, axis=-1), ""


def of_operator(net: Net, logits: str) -> tuple[str, str]:
    """Left to the operator `MoE`."""
    return logits, ""


def _stacks(net: Net) -> tuple[str, str]:
    return net.weight("up", EXPERTS, HIDDEN, WIDTH), net.weight("down", EXPERTS, WIDTH, HIDDEN)


def _summed(net: Net, parts: str, shares: str) -> str:
    """[n, k, width] by [n, k] -> [n, width]."""
    product = net("Mul", parts, net("Unsqueeze", shares, _ends(net)))
    return str(net("ReduceSum", product, net.value("one", [1]), keepdims=0))


def gathered(net: Net, x: str, shares: str, numbers: str) -> str:
    """The matrices of the chosen experts of each token, and their biases."""
    up, down = _stacks(net)
    x = net("Unsqueeze", net("Unsqueeze", x, net.value("one", [1])), _ends(net))
    hidden = net("Squeeze", net("MatMul", net("Gather", up, numbers), x), _ends(net))
    hidden = net("Relu", net("Add", hidden, net("Gather", net.weight("bias", EXPERTS, HIDDEN), numbers)))
    parts = net("MatMul", net("Gather", down, numbers), net("Unsqueeze", hidden, _ends(net)))
    return _summed(net, net("Squeeze", parts, _ends(net)), shares)


def flat(net: Net, x: str, shares: str, numbers: str) -> str:
    """All choices of all tokens in one axis, coordinates instead of numbers."""
    up, down = _stacks(net)
    which = net("Unsqueeze", net("Reshape", net("Cast", numbers, to=6), _ends(net)), _ends(net))
    which = net("Cast", which, to=7)
    many = net("Expand", net("Unsqueeze", x, net.value("one", [1])), net.value("times", [1, CHOSEN, 1]))
    column = net("Reshape", many, net.value("columns", [-1, WIDTH, 1]))
    hidden = net("Relu", net("MatMul", net("GatherND", up, which), column))
    parts = net("MatMul", net("GatherND", down, which), hidden)
    return _summed(net, net("Reshape", parts, net.value("parts", [-1, CHOSEN, WIDTH])), shares)


def _integers(net: Net) -> tuple[str, str]:
    """The first stack as 8-bit integers, with a scale for each expert."""
    rng = np.random.default_rng(1)
    up = net.value("up", rng.integers(-90, 90, (EXPERTS, HIDDEN, WIDTH)), np.int8)
    return up, net.value("scale", rng.uniform(0.003, 0.006, EXPERTS))


def _narrow(net: Net, up: str, x: str, shares: str) -> str:
    """Matrices of the chosen experts, [n, k, HIDDEN, WIDTH], by x, and back by one matrix for all of them."""
    column = net("Unsqueeze", net("Unsqueeze", x, net.value("one", [1])), _ends(net))
    hidden = net("Relu", net("Squeeze", net("MatMul", up, column), _ends(net)))
    return _summed(net, net("MatMul", hidden, net.weight("back", HIDDEN, WIDTH)), shares)


def dequantised(net: Net, x: str, shares: str, numbers: str) -> str:
    up, scale = _integers(net)
    stack = net("DequantizeLinear", up, scale, axis=0)
    return _narrow(net, net("Gather", stack, numbers), x, shares)


def dequantised_late(net: Net, x: str, shares: str, numbers: str) -> str:
    """Integers and scales are looked up, and multiplied then."""
    up, scale = _integers(net)
    wide = net("Unsqueeze", net("Gather", scale, numbers), net.value("two_last", [2, 3]))
    return _narrow(net, net("Mul", net("Cast", net("Gather", up, numbers), to=1), wide), x, shares)


def _weighed(net: Net, x: str, gates: str) -> str:
    """All experts run; gates are [n, EXPERTS]."""
    up, down = _stacks(net)
    hidden = net("Relu", net("Einsum", x, up, equation="nd,ehd->neh"))
    return str(net("Einsum", hidden, down, gates, equation="neh,edh,ne->nd"))


def _like(net: Net, shares: str, fill: float) -> str:
    """[n, EXPERTS] of one number; n is read from the shares."""
    rows = net("Gather", net("Shape", shares), net.value("none", [0]))
    shape = net("Concat", rows, net.value("experts", [EXPERTS]), axis=0)
    return str(net("ConstantOfShape", shape, value=helper.make_tensor("value", 1, [1], [fill])))


def scattered(net: Net, x: str, shares: str, numbers: str) -> str:
    """Shares go to their places among zeros."""
    return _weighed(net, x, net("ScatterElements", _like(net, shares, 0.0), numbers, shares, axis=-1))


def weighed(net: Net, x: str, shares: str, numbers: str) -> str:
    return _weighed(net, x, shares)


def shared_late(net: Net, x: str, shares: str, numbers: str) -> str:
    """Noisy top-k gating: what is chosen goes to its place among minus infinities, before the softmax."""
    gates = net("ScatterElements", _like(net, shares, -np.inf), numbers, shares, axis=-1)
    return _weighed(net, x, net("Softmax", gates, axis=-1))


def one_hot(net: Net, x: str, shares: str, numbers: str) -> str:
    """A mask over all experts for every choice."""
    mask = net("OneHot", numbers, net.value("depth", EXPERTS, np.int64), net.value("off_on", [0.0, 1.0]), axis=1)
    gates = net("ReduceSum", net("Mul", mask, net("Unsqueeze", shares, net.value("one", [1]))), net.value("two", [2]),
                keepdims=0)  # fmt: skip
    return _weighed(net, x, gates)


def compared(net: Net, x: str, shares: str, numbers: str) -> str:
    """The same mask by comparison; every expert multiplies as one matrix of a batch."""
    up, down = _stacks(net)
    mask = net("Equal", net("Unsqueeze", numbers, _ends(net)), net.value("all", list(range(EXPERTS))))
    shared = net("Mul", net("Cast", mask, to=1), net("Unsqueeze", shares, _ends(net)))
    gates = net("ReduceSum", shared, net.value("one", [1]), keepdims=0)
    column = net("Unsqueeze", x, net.value("one_last", [1, 3]))
    parts = net("Squeeze", net("MatMul", down, net("Relu", net("MatMul", up, column))), _ends(net))
    return _summed(net, parts, gates)


def fused(net: Net, x: str, shares: str, numbers: str) -> str:
    """ONNX Runtime's operator: router, choice and experts in one; `shares` are logits."""
    up, down = _stacks(net)
    options = {"k": CHOSEN, "activation_type": "relu", "normalize_routing_weights": 1}
    return str(
        net("MoE", x, shares, up, net.weight("bias", EXPERTS, HIDDEN), down, "", domain="com.microsoft", **options)
    )


@dataclass(frozen=True)
class Form:
    """One way to write a mixture."""

    shares: Shares
    mixture: Mixture

    def build(self) -> onnx.ModelProto:
        net = Net(opset=17)
        x = net.linear(net.input("x", "n", 5), "embed", 5, WIDTH)
        logits = net.named(net.linear(x, "router", WIDTH, EXPERTS), LOGITS)
        y = net("Add", x, self.mixture(net, x, *self.shares(net, logits)))
        net.named(net.linear(y, "head", WIDTH, 3), "y")
        return net.model(y=("n", 3))

    @property
    def chosen(self) -> int:
        return 1 if self.shares is of_best else CHOSEN

    @property
    def masked(self) -> str:
        """The value in which minus infinity says that an expert does not exist."""
        return BIASED if self.shares is of_sigmoid else LOGITS


FORMS = {
    "gathered": Form(of_softmax, gathered),
    "gathered-logits": Form(of_logits, gathered),
    "gathered-sigmoid": Form(of_sigmoid, gathered),
    "gathered-best": Form(of_best, gathered),
    "gathered-log": Form(of_log_softmax, gathered),
    "flat": Form(of_softmax, flat),
    "dequantised": Form(of_softmax, dequantised),
    "dequantised-late": Form(of_logits, dequantised_late),
    "fused": Form(of_operator, fused),
    "scattered": Form(of_softmax, scattered),
    "scattered-sigmoid": Form(of_sigmoid, scattered),
    "threshold": Form(of_threshold, weighed),
    "shared-late": Form(of_logits, shared_late),
    "one-hot": Form(of_softmax, one_hot),
    "one-hot-best": Form(of_best, one_hot),
    "compared": Form(of_softmax, compared),
    "compared-logits": Form(of_logits, compared),
}
