"""RNN, GRU and LSTM, one time step after the other: all variants of ONNX, and twice differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator
from spa.interpreter.ops.quant import dynamic

Function = Callable[[Tensor], Tensor]
Weights = tuple[Tensor, Tensor, Tensor | None]
"""W [g * h, i], R [g * h, h] and B [2 * g * h] of one direction."""


def _functions(node: Node, defaults: Sequence[str], directions: int) -> list[list[Function]]:
    """Activations per direction."""
    names = list(node.attr("activations") or list(defaults) * directions)
    alphas, betas = list(node.attr("activation_alpha") or []), list(node.attr("activation_beta") or [])

    def one(name: str) -> Function:
        lower = name.lower()
        plain: dict[str, Function] = {
            "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu,
            "softsign": F.softsign, "softplus": F.softplus,
        }  # fmt: skip
        if lower in plain:
            return plain[lower]
        given = {
            "affine": (1.0, 0.0), "leakyrelu": (0.01, 0.0), "thresholdedrelu": (1.0, 0.0), "scaledtanh": (1.0, 1.0),
            "hardsigmoid": (0.2, 0.5), "elu": (1.0, 0.0),
        }  # fmt: skip
        if lower not in given:
            raise Unsupported(f"activation {name}")
        a = float(alphas.pop(0)) if alphas else given[lower][0]
        two = lower in ("affine", "scaledtanh", "hardsigmoid")
        b = float(betas.pop(0)) if two and betas else given[lower][1]
        made: dict[str, Function] = {
            "affine": lambda x: a * x + b,
            "leakyrelu": lambda x: F.leaky_relu(x, a),
            "thresholdedrelu": lambda x: torch.where(x >= a, x, torch.zeros_like(x)),
            "scaledtanh": lambda x: a * torch.tanh(b * x),
            "hardsigmoid": lambda x: torch.clamp(a * x + b, 0, 1),
            "elu": lambda x: F.elu(x, a),
        }
        return made[lower]

    each = len(defaults)
    return [[one(n) for n in names[d * each : (d + 1) * each]] for d in range(directions)]


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _recurrent(
    node: Node,
    gates: int,
    defaults: Sequence[str],
    cell: Callable[..., tuple[Tensor, ...]],
    product: Product = F.linear,
) -> Kernel:
    """`cell` maps (projected input, states, R, recurrent bias, functions, peepholes) to new states, output first."""
    direction = str(node.attr("direction", "forward"))
    count = 2 if direction == "bidirectional" else 1
    functions = _functions(node, defaults, count)
    batch_first = bool(node.attr("layout", 0))
    clip = node.attr("clip")
    states = 2 if gates == 4 else 1

    def limited(x: Tensor) -> Tensor:
        return x if clip is None else x.clamp(-clip, clip)

    def one(
        d: int,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None,
        lengths: Tensor | None,
        start: list[Tensor],
        p: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        backward = direction == "reverse" or d == 1
        steps, batch = x.shape[:2]
        width = gates * r.shape[-1]
        projected = product(x, w, None if b is None else b[:width])
        bias = None if b is None else b[width:]
        order = range(steps - 1, -1, -1) if backward else range(steps)
        now = list(start)
        rows: list[Tensor] = [x.new_zeros(0)] * steps
        for t in order:
            fresh = list(cell(projected[t], now, r, bias, functions[d], p, limited))
            if lengths is not None:
                alive = (t < lengths).reshape(batch, 1)
                rows[t] = torch.where(alive, fresh[0], torch.zeros_like(fresh[0]))
                fresh = [torch.where(alive, new, old) for new, old in zip(fresh, now, strict=True)]
            else:
                rows[t] = fresh[0]
            now = fresh
        return torch.stack(rows), now

    def run(
        x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None, *rest: Tensor | None
    ) -> tuple[Tensor, ...]:
        given = [*rest, None, None, None]
        if batch_first:
            x = x.transpose(0, 1)
        batch, hidden = x.shape[1], r.shape[-1]
        outs, lasts = [], []
        for d in range(count):
            start = []
            for s in given[:states]:
                if s is None:
                    start.append(x.new_zeros(batch, hidden))
                else:
                    start.append(s[:, d] if batch_first else s[d])
            peep = given[2] if states == 2 else None
            y, last = one(
                d, x, w[d], r[d], None if b is None else b[d], lengths, start, None if peep is None else peep[d]
            )
            outs.append(y)
            lasts.append(last)
        y = torch.stack(outs, 1)
        ends = [torch.stack(parts) for parts in zip(*lasts, strict=True)]
        if batch_first:
            y, ends = y.permute(2, 0, 1, 3), [e.transpose(0, 1) for e in ends]
        return (y, *ends)

    return run


@operator("RNN")
def _rnn(node: Node) -> Kernel:
    def cell(
        x: Tensor, now: list[Tensor], r: Tensor, b: Tensor | None, f: list[Function], _: None, limit: Function
    ) -> tuple[Tensor, ...]:
        return (f[0](limit(x + F.linear(now[0], r, b))),)

    return _recurrent(node, 1, ("Tanh",), cell)


@operator("GRU")
def _gru(node: Node) -> Kernel:
    late = bool(node.attr("linear_before_reset", 0))

    def cell(
        x: Tensor, now: list[Tensor], r: Tensor, b: Tensor | None, f: list[Function], _: None, limit: Function
    ) -> tuple[Tensor, ...]:
        h, n = now[0], r.shape[-1]
        both = F.linear(h, r[: 2 * n], None if b is None else b[: 2 * n]) + x[:, : 2 * n]
        z, reset = f[0](limit(both[:, :n])), f[0](limit(both[:, n:]))
        last = None if b is None else b[2 * n :]
        inner = reset * F.linear(h, r[2 * n :], last) if late else F.linear(reset * h, r[2 * n :], last)
        candidate = f[1](limit(x[:, 2 * n :] + inner))
        return ((1 - z) * candidate + z * h,)

    return _recurrent(node, 3, ("Sigmoid", "Tanh"), cell)


def lstm(node: Node, rounding: bool = False) -> Kernel:
    """LSTM; with `rounding` the input and the state are quantised to 8 bits before each product."""
    product: Product = (lambda x, w, b: F.linear(_rounded(x), w, b)) if rounding else F.linear
    coupled = bool(node.attr("input_forget", 0))

    def cell(
        x: Tensor, now: list[Tensor], r: Tensor, b: Tensor | None, f: list[Function], p: Tensor | None, limit: Function
    ) -> tuple[Tensor, ...]:
        h, c = now
        i, o, forget, g = (x + product(h, r, b)).chunk(4, -1)
        pi, po, pf = (None, None, None) if p is None else p.chunk(3)
        i = f[0](limit(i if pi is None else i + pi * c))
        forget = 1 - i if coupled else f[0](limit(forget if pf is None else forget + pf * c))
        c = forget * c + i * f[1](limit(g))
        o = f[0](limit(o if po is None else o + po * c))
        return o * f[2](c), c

    return _recurrent(node, 4, ("Sigmoid", "Tanh", "Tanh"), cell, product)


def _rounded(x: Tensor) -> Tensor:
    numbers, scale, zero = dynamic(x)
    return (numbers - zero) * scale


operator("LSTM")(lstm)
