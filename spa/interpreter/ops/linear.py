"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator, plain

plain("MatMul", torch.matmul)

CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@operator("Einsum")
def _einsum(node: Node) -> Kernel:
    equation = node.attr("equation").replace(" ", "")
    return lambda *inputs: torch.einsum(equation, *inputs)


def gemm(node: Node) -> Kernel:
    """alpha * A @ B + beta * C."""
    alpha, beta = float(node.attr("alpha", 1.0)), float(node.attr("beta", 1.0))
    trans_a, trans_b = bool(node.attr("transA", 0)), bool(node.attr("transB", 0))
    simple = alpha == 1 and beta == 1 and not trans_a

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if simple and (c is None or c.dim() == 1) and a.is_floating_point():
            return F.linear(
                a,
                b if trans_b else b.t(),
                c if c is None or c.numel() == b.shape[not trans_b] else c.expand(b.shape[not trans_b]),
            )
        y = torch.mm(a.t() if trans_a else a, b.t() if trans_b else b)
        if alpha != 1:
            y = (alpha * y).to(y.dtype)
        if c is not None:
            y = y + (c if beta == 1 else beta * c).to(y.dtype)
        return y

    return run


operator("Gemm")(gemm)


# -- windows ---------------------------------------------------------------------------------------------------------


def pads_of(node: Node, rank: int) -> tuple[list[int], list[int]] | None:
    """Padding before and after each spatial axis, None if it depends on the input's size (SAME)."""
    auto = str(node.attr("auto_pad", "NOTSET"))
    if auto.startswith("SAME"):
        return None
    pads = list(node.attr("pads") or [0] * (2 * rank)) if auto == "NOTSET" else [0] * (2 * rank)
    return pads[:rank], pads[rank:]


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool
) -> tuple[list[int], list[int]]:
    """Padding that keeps ceil(size / stride)."""
    begins, ends = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(((size + s - 1) // s - 1) * s + d * (k - 1) + 1 - size, 0)
        small = total // 2
        begins.append(small if upper else total - small)
        ends.append(total - small if upper else small)
    return begins, ends


def padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with constants around its last axes."""
    flat: list[int] = []
    for b, e in zip(reversed(begins), reversed(ends), strict=True):
        flat += [b, e]
    return F.pad(x, flat, value=value)


def convolution(node: Node) -> Kernel:
    """Conv in one, two or three dimensions. Raises: Unsupported."""
    rank = (node.rank(1) or node.rank(0) or 4) - 2
    if not 1 <= rank <= 3:
        raise Unsupported(f"a convolution over {rank} axes")
    function = CONV[rank - 1]
    strides = list(node.attr("strides") or [1] * rank)
    dilations = list(node.attr("dilations") or [1] * rank)
    group = int(node.attr("group", 1))
    pads = pads_of(node, rank)
    if pads is None:
        upper = node.attr("auto_pad") == "SAME_UPPER"

        def same(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            begins, ends = same_pads(x.shape[2:], w.shape[2:], strides, dilations, upper)
            return function(padded(x, begins, ends), w, b, strides, 0, dilations, group)

        return same
    begins, ends = pads
    if begins == ends:
        return lambda x, w, b=None: function(x, w, b, strides, begins, dilations, group)
    return lambda x, w, b=None: function(padded(x, begins, ends), w, b, strides, 0, dilations, group)


operator("Conv")(convolution)


@operator("ConvTranspose")
def _conv_transpose(node: Node) -> Kernel:
    rank = (node.rank(1) or node.rank(0) or 4) - 2
    if not 1 <= rank <= 3:
        raise Unsupported(f"a convolution over {rank} axes")
    function = _TRANSPOSED[rank - 1]
    strides = list(node.attr("strides") or [1] * rank)
    dilations = list(node.attr("dilations") or [1] * rank)
    extra = list(node.attr("output_padding") or [0] * rank)
    group = int(node.attr("group", 1))
    wanted = node.attr("output_shape")
    auto = str(node.attr("auto_pad", "NOTSET"))
    pads = pads_of(node, rank)
    if (
        wanted is None
        and pads is not None
        and pads[0] == pads[1]
        and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    ):
        begins = pads[0]
        return lambda x, w, b=None: function(x, w, b, strides, begins, extra, group, dilations)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = function(x, w, None, strides, 0, 0, group, dilations)
        sizes = [n + e for n, e in zip(y.shape[2:], extra, strict=True)]
        if wanted is not None or pads is None:
            goal = wanted[-rank:] if wanted is not None else [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
            totals = [n - g for n, g in zip(sizes, goal, strict=True)]
            halves = [t // 2 for t in totals]
            rest = [t - h for t, h in zip(totals, halves, strict=True)]
            cut = (halves, rest) if auto == "SAME_UPPER" else (rest, halves)
        else:
            cut = pads
        y = padded(y, [-c for c in cut[0]], [e - c for e, c in zip(extra, cut[1], strict=True)])
        return y if b is None else y + b.reshape(-1, *[1] * rank)

    return run
