"""Operators with an activation inside are refit like those whose activation is a node of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

import spa
from tests.net import Net
from tests.test_collect import samples
from tests.test_compensate import compensated, error, group_of, outputs


def _fusable(fused: bool) -> onnx.ModelProto:
    """A residual block and a classifier, with activations that are nodes or inside their operators."""
    net = Net()
    x = net.input("x", "n", 3, 8, 8)

    def conv(x: str, name: str, i: int, o: int, act: str, branch: str = "", **params: Any) -> str:
        given = [x, net.weight(f"{name}.weight", o, i, 3, 3), net.weight(f"{name}.bias", o)]
        if fused:
            given += [branch] if branch else []
            params |= {"activation": act, "domain": "com.microsoft"}
            if act == "Clip":
                params["activation_params"] = [0.0, 1.0]
            return net("FusedConv", *given, name=name, pads=[1, 1, 1, 1], **params)
        y = net("Conv", *given, name=f"{name}.conv", pads=[1, 1, 1, 1])
        y = net("Add", y, branch) if branch else y
        bounds = [net.value(f"{name}.{k}", np.float32(k)) for k in (0, 1)] if act == "Clip" else []
        return net(act, y, *bounds, name=name)  # the values that are measured have the same names

    x = conv(x, "a", 3, 8, "Relu")
    y = conv(x, "b", 8, 24, "Clip")
    x = conv(y, "c", 24, 8, "Relu", x)
    x = net("Flatten", net("GlobalAveragePool", conv(x, "d", 8, 16, "Tanh")))
    w, b = net.weight("e.weight", 16, 20), net.weight("e.bias", 20)
    if fused:
        x = net("FusedGemm", x, w, b, domain="com.microsoft", activation="Relu", name="e")
    else:
        x = net("Relu", net("Gemm", x, w, b, name="e"))
    net.named(net.gemm(x, "f", 20, 5), "y")
    return net.model(y=("n", 5))


def test_activations_inside_operators() -> None:
    """The same weights as where activations are nodes of their own: targets are what operators give before them."""
    found: dict[str, list[np.ndarray]] = {"obs": [], "norm": []}
    for fused in (False, True):
        model = _fusable(fused)
        analysis, data = spa.analyze(model), samples(model, 40)
        gone = [("a.weight", 0, [1, 2]), ("b.weight", 0, list(range(0, 24, 3))), ("d.weight", 0, [0, 5, 6, 9])]
        removed = [(group_of(analysis, name, axis), units) for name, axis, units in gone]
        small = compensated(analysis, data, removed, "obs")
        assert error(model, small, data) < error(model, compensated(analysis, data, removed, "none"), data) / 4
        found["obs"].append(outputs(small, data)[0])
        found["norm"].append(outputs(compensated(analysis, data, removed, "norm"), data)[0])
    for one, two in found.values():
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-3 * np.abs(one).max())
