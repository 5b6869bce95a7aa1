"""Layer-wise relevance propagation as gradients: per operator a kernel with the same value and another derivative.

Relevance R of an activation x is written as x * c. A rule that says how R is shared among the inputs of an operator
then says how c goes back through it, which is what a backward pass does: the kernels here give what the operator gives,
and the derivatives that make `activation x derivative` the relevance. Where no rule is written down the true
derivative is one: for sums, reshapes, pooling, softmax and all else that is linear in what it is given (LRP-0), and as
the first-order (deep Taylor) rule of the rest.

Sources: Bach et al., "On pixel-wise explanations ..." (PLoS ONE 2015): epsilon, alpha-beta; Montavon et al. (Pattern
Recognition 65, 2017): z+; Montavon et al., "Layer-wise relevance propagation: an overview" (2019): gamma;
Achtibat et al., AttnLRP (arXiv 2402.05602): products, softmax, norms and activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Callable[..., Any]
Name = Literal["epsilon", "z+", "alpha-beta", "gamma"]
TINY = 1e-12
"""Below this a number is zero: nothing is divided by it."""


@dataclass(frozen=True)
class Rule:
    """How a linear operator shares relevance among its inputs."""

    name: Name = "epsilon"
    epsilon: float = 1e-6
    """Added to the magnitude of an output in the epsilon rule."""
    alpha: float = 2.0
    """Share of the positive contributions; the negative ones get 1 - alpha."""
    gamma: float = 0.25
    """How much positive contributions are favoured."""


@dataclass(frozen=True)
class Rules:
    """A composite: which rule which operators have.

    The default is "epsilon plus": z+ where weights are shared over positions, epsilon elsewhere.
    """

    convolution: Rule = Rule("z+")
    """Conv and ConvTranspose; a batch normalisation right behind is merged into them."""
    dense: Rule = Rule("epsilon")
    """Matrix products with a weight."""


def surrogate(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` with the derivative of `carrier`."""
    return carrier + (value - carrier).detach()


def carried(x: Tensor, value: Tensor) -> Tensor:
    """`value`, all of whose relevance goes to `x`, position by position: the derivative is value / x (0 where x is)."""
    zero = x.abs() <= TINY
    ratio = torch.where(zero, torch.zeros_like(value), value / torch.where(zero, torch.ones_like(x), x))
    return surrogate(value, x * ratio.detach())


def shared(x: Tensor, share: float | Tensor) -> Tensor:
    """`x`, through which the share `share` of a derivative passes."""
    return surrogate(x, x * share)


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    zero = total.abs() <= TINY
    return torch.where(zero, torch.zeros_like(value), value / torch.where(zero, torch.ones_like(total), total)).detach()


def linear(product: Kernel, x: Tensor, w: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """`value` = product(x, w) + bias with the derivative of a rule.

    Args:
        product: linear in both arguments.
        x: what is multiplied.
        w: weights; relevance does not go there.
        value: the operator's output, bias included.
        rule: epsilon: the bias keeps its share. z+ and alpha-beta: it gets none. gamma: it counts as the weights do.
    """
    if rule.name == "epsilon":
        size = value.abs().detach()
        return surrogate(value, product(x, w) * (size / (size + rule.epsilon)))
    high, low = w.clamp(min=0), w.clamp(max=0)
    up, down = x.clamp(min=0), x.clamp(max=0)
    signed = bool((x < 0).any())
    if rule.name == "gamma":
        return _gamma(product, (up, down if signed else None), w, (high, low), value, rule.gamma)
    positive = product(up, high) + product(down, low) if signed else product(up, high)
    out = positive * _ratio(value, positive) * (1.0 if rule.name == "z+" else rule.alpha)
    if rule.name == "alpha-beta" and rule.alpha != 1:
        negative = product(up, low) + product(down, high) if signed else product(up, low)
        out = out + negative * _ratio(value, negative) * (1 - rule.alpha)
    return surrogate(value, out)


def _gamma(
    product: Kernel,
    x: tuple[Tensor, Tensor | None],
    w: Tensor,
    signs: tuple[Tensor, Tensor],
    value: Tensor,
    gamma: float,
) -> Tensor:
    """Contributions of the output's own sign count 1 + gamma times; the bias counts as it is."""
    up, down = x
    high, low = signs
    plain = product(up, w) if down is None else product(up + down, w)
    favoured = [product(up, high), product(up, low)]
    if down is not None:
        favoured = [favoured[0] + product(down, low), favoured[1] + product(down, high)]
    own = torch.where(value.detach() > 0, favoured[0], favoured[1])
    out = plain + gamma * own
    total = (value + gamma * own).detach()
    return surrogate(value, out * _ratio(value, total))
