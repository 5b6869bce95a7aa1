"""Activations, softmax and dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, axis_of, operator, plain

plain("Relu", torch.relu)
plain("Sigmoid", torch.sigmoid)
plain("Tanh", torch.tanh)
plain("Softplus", lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device)))
plain("Softsign", F.softsign)
plain("Mish", F.mish)
plain("HardSwish", lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1))
plain("PRelu", lambda x, slope: torch.where(x > 0, x, x * slope))

_WITH: dict[str, tuple[dict[str, float], Callable[..., Tensor]]] = {
    "LeakyRelu": ({"alpha": 0.01}, lambda x, alpha: F.leaky_relu(x, alpha)),
    "Elu": ({"alpha": 1.0}, lambda x, alpha: F.elu(x, alpha)),
    "Celu": ({"alpha": 1.0}, lambda x, alpha: F.celu(x, alpha)),
    "Selu": (
        {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
        lambda x, alpha, gamma: gamma * F.elu(x, alpha),
    ),
    "HardSigmoid": ({"alpha": 0.2, "beta": 0.5}, lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1)),
    "ThresholdedRelu": ({"alpha": 1.0}, lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x))),
    "Swish": ({"alpha": 1.0}, lambda x, alpha: F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)),
    "Shrink": (
        {"bias": 0.0, "lambd": 0.5},
        lambda x, bias, lambd: torch.where(
            x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x))
        ).to(x.dtype),
    ),
}
"""Attributes with their defaults, and the function."""


def with_attributes(node: Node, defaults: dict[str, float], function: Callable[..., Tensor]) -> Kernel:
    """A kernel that passes attributes on."""
    values = [float(node.attr(name, default)) for name, default in defaults.items()]
    return lambda x: function(x, *values)


def _register(name: str, defaults: dict[str, float], function: Callable[..., Tensor]) -> None:
    operator(name)(lambda node: with_attributes(node, defaults, function))


for _name, _with in _WITH.items():
    _register(_name, *_with)


@operator("Gelu")
def _gelu(node: Node) -> Kernel:
    how = str(node.attr("approximate", "none"))
    return lambda x: F.gelu(x, approximate=how)


@operator("SwiGLU")
def _swiglu(node: Node) -> Kernel:
    alpha = float(node.attr("alpha", 1.0))
    return lambda gate, x: gate * torch.sigmoid(alpha * gate) * x


# -- over an axis ----------------------------------------------------------------------------------------------------


def _hardmax(x: Tensor, axis: int) -> Tensor:
    # the first of equal maxima: torch's argmax promises none of them
    size = x.shape[axis]
    shape = [1] * x.dim()
    shape[axis] = size
    index = torch.arange(size, device=x.device).reshape(shape)
    first = torch.where(x == x.amax(axis, keepdim=True), index, size).amin(axis, keepdim=True)
    return (index == first).to(x.dtype)


def _over(names: str, function: Callable[[Tensor, int], Tensor]) -> None:
    """Register a function over an axis; before opset 13 over all axes from one on."""

    def modern(node: Node) -> Kernel:
        axis = node.attr("axis", -1)
        return lambda x: function(x, axis)

    def flat(node: Node) -> Kernel:
        axis = node.attr("axis", 1)

        def run(x: Tensor) -> Tensor:
            at = axis_of(axis, x.dim())
            if at == x.dim() - 1:
                return function(x, -1)
            return function(x.flatten(at), -1).reshape(x.shape)

        return run

    operator(names)(flat)
    operator(names, since=13)(modern)


_over("Softmax", lambda x, axis: torch.softmax(x, axis))
_over("LogSoftmax", lambda x, axis: torch.log_softmax(x, axis))
_over("Hardmax", _hardmax)


# -- dropout ---------------------------------------------------------------------------------------------------------


@operator("Dropout", host=(1, 2), pure=False)
def _dropout(node: Node) -> Kernel:
    """Drops in train mode, and where the model itself asks for it (`training_mode`)."""
    ratio = node.number(1, "ratio", 0.5)
    asked = node.number(2, "", 0)
    state = node.state
    masked = node.wants(1)

    def run(x: Tensor, r: Tensor | None = None, training: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        share = float(ratio(r))
        if not (state.training or asked(training)) or share == 0:
            return (x, torch.ones_like(x, dtype=torch.bool)) if masked else x
        kept = torch.rand_like(x) >= share
        out = x * kept / (1 - share)
        return (out, kept) if masked else out

    return run
