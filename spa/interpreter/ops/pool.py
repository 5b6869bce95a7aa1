"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator, plain
from spa.interpreter.ops.linear import CONV, padded, pads_of, same_pads

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


plain("GlobalAveragePool", lambda x: x.mean(_spatial(x), keepdim=True))
plain("GlobalMaxPool", lambda x: x.amax(_spatial(x), keepdim=True))


@operator("GlobalLpPool")
def _global_lp(node: Node) -> Kernel:
    p = int(node.attr("p", 2))
    return lambda x: x.abs().pow(p).sum(_spatial(x), keepdim=True).pow(1 / p)


class Window:
    """What the pooling operators share."""

    def __init__(self, node: Node) -> None:
        self.kernel: list[int] = list(node.attr("kernel_shape"))
        self.rank = len(self.kernel)
        if not 1 <= self.rank <= 3:
            raise Unsupported(f"pooling over {self.rank} axes")
        self.strides: list[int] = list(node.attr("strides") or [1] * self.rank)
        self.dilations: list[int] = list(node.attr("dilations") or [1] * self.rank)
        self.ceil = bool(node.attr("ceil_mode", 0))
        self._pads = pads_of(node, self.rank)
        self._upper = node.attr("auto_pad") == "SAME_UPPER"

    def pads(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Padding before and after each axis, as the attributes say."""
        if self._pads is not None:
            return self._pads
        return same_pads(sizes, self.kernel, self.strides, self.dilations, self._upper)

    @property
    def same(self) -> bool:
        """Whether the padding depends on the input's size."""
        return self._pads is None

    def overhang(self, sizes: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> list[int]:
        """How far beyond the padding the last window reaches where sizes are rounded up."""
        out = []
        for n, k, s, d, b, e in zip(sizes, self.kernel, self.strides, self.dilations, begins, ends, strict=True):
            span = d * (k - 1) + 1
            count = -(-(n + b + e - span) // s) if self.ceil else (n + b + e - span) // s
            if self.ceil and count * s >= n + b:  # a window that starts in the padding after the end is left out
                count -= 1
            out.append(max(0, count * s + span - n - b - e))
        return out

    def simple(self) -> bool:
        """Whether torch's own padding can be used: fixed, equal on both sides, at most half a window."""
        pads = self._pads
        return (
            pads is not None
            and pads[0] == pads[1]
            and not self.ceil
            and all(2 * p <= k for p, k in zip(pads[0], self.kernel, strict=True))
        )


@operator("MaxPool")
def _max_pool(node: Node) -> Kernel:
    window = Window(node)
    function = _MAX[window.rank - 1]
    if window.simple() and not node.wants(1):
        begins = window.pads([])[0]

        def fast(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return slow(x)
            return function(x, window.kernel, window.strides, begins, window.dilations)

    def slow(x: Tensor) -> Tensor:
        y = full(x.float())
        assert isinstance(y, Tensor)
        return y.to(x.dtype)

    column = bool(node.attr("storage_order", 0))
    indices = node.wants(1)

    def full(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            return slow(x)
        begins, ends = window.pads(x.shape[2:])
        over = window.overhang(x.shape[2:], begins, ends)
        wide = padded(x, begins, [e + o for e, o in zip(ends, over, strict=True)], -math.inf)
        if not indices:
            return function(wide, window.kernel, window.strides, 0, window.dilations)
        y, where = function(wide, window.kernel, window.strides, 0, window.dilations, return_indices=True)
        return y, _positions(where, x, wide, begins, column)

    return fast if window.simple() and not indices else full


def _positions(where: Tensor, x: Tensor, wide: Tensor, begins: Sequence[int], column: bool) -> Tensor:
    """Positions in the flat unpadded tensor from those in the padded spatial axes."""
    coordinates = []
    for size, begin in zip(reversed(wide.shape[2:]), reversed(begins), strict=True):
        coordinates.append(where % size - begin)
        where = where // size
    sizes = list(x.shape[2:])
    order = range(len(sizes)) if not column else range(len(sizes) - 1, -1, -1)
    coordinates.reverse()
    flat = torch.zeros_like(coordinates[0])
    for k in order:
        flat = flat * sizes[k] + coordinates[k]
    lead = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * len(sizes))
    return flat + lead * math.prod(sizes)


def _window_sums(x: Tensor, window: Window) -> Tensor:
    """Sums over the windows of a padded tensor, as a convolution with ones."""
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *window.kernel, dtype=x.dtype, device=x.device)
    y = CONV[window.rank - 1](flat, ones, None, window.strides, 0, window.dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


def average_pool(node: Node) -> Kernel:
    """Averages over windows; the padding counts if the node says so."""
    window = Window(node)
    include = bool(node.attr("count_include_pad", 0))
    plain_steps = all(d == 1 for d in window.dilations)
    function = _AVERAGE[window.rank - 1]
    if window.simple() and plain_steps:
        begins = window.pads([])[0]
        return lambda x: function(x, window.kernel, window.strides, begins, False, include)

    def run(x: Tensor) -> Tensor:
        begins, ends = window.pads(x.shape[2:])
        over = window.overhang(x.shape[2:], begins, ends)
        nothing = [0] * window.rank
        sums = _window_sums(padded(x, begins, [e + o for e, o in zip(ends, over, strict=True)]), window)
        ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        ones = padded(ones, begins, ends, 1.0 if include else 0.0)
        return sums / _window_sums(padded(ones, nothing, over), window)

    return run


operator("AveragePool")(average_pool)


@operator("LpPool")
def _lp_pool(node: Node) -> Kernel:
    window = Window(node)
    p = int(node.attr("p", 2))

    def run(x: Tensor) -> Tensor:
        begins, ends = window.pads(x.shape[2:])
        over = window.overhang(x.shape[2:], begins, ends)
        wide = padded(x.abs().pow(p), begins, [e + o for e, o in zip(ends, over, strict=True)])
        return _window_sums(wide, window).pow(1 / p)

    return run


@operator("MaxUnpool", host=(2,))
def _max_unpool(node: Node) -> Kernel:
    kernel = list(node.attr("kernel_shape"))
    strides = list(node.attr("strides") or [1] * len(kernel))
    pads = list(node.attr("pads") or [0] * 2 * len(kernel))
    shape = node.numbers(2)

    def run(x: Tensor, indices: Tensor, size: Tensor | None = None) -> Tensor:
        rank = len(kernel)
        inner = [
            (n - 1) * s + k - pads[d] - pads[d + rank]
            for d, (n, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
        ]
        out = x.new_zeros(math.prod((*x.shape[:2], *inner))).index_put((indices.reshape(-1),), x.reshape(-1))
        y = out.reshape(*x.shape[:2], *inner)
        wanted = shape(size)
        if wanted is None:
            return y
        return padded(y, [0] * rank, [w - n for w, n in zip(wanted[2:], inner, strict=True)])

    return run
