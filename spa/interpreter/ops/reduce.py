"""Reductions, cumulative sums and what is found along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spa.interpreter.base import Kernel, Node, axis_of, operator

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _extreme(function: Callable[..., Tensor], empty: Callable[[torch.dtype], Any]) -> Reduction:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.numel():
            if x.dtype == torch.bool:
                return function(x.to(torch.uint8), axes, keep).to(torch.bool)
            return function(x, axes, keep)
        shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
        y = torch.full(shape, empty(x.dtype), dtype=x.dtype, device=x.device)
        return y if keep else y.reshape([n for d, n in enumerate(shape) if d not in axes])

    return run


def _limit(dtype: torch.dtype, high: bool) -> Any:
    if dtype.is_floating_point:
        return float("inf") if high else float("-inf")
    if dtype == torch.bool:
        return high
    info = torch.iinfo(dtype)
    return info.max if high else info.min


def _typed(function: Reduction) -> Reduction:
    """Sums and products of integers keep their type."""
    return lambda x, axes, keep: function(x, axes, keep).to(x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    return torch.div(x.sum(axes, keep), max(1, x.numel() // max(1, x.sum(axes, keep).numel())), rounding_mode="trunc")


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep) if x.is_floating_point() else torch.logsumexp(x.double(), axes, keep)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": _typed(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMean": _typed(_mean),
    "ReduceProd": _typed(_prod),
    "ReduceMax": _extreme(torch.amax, lambda t: _limit(t, False)),
    "ReduceMin": _extreme(torch.amin, lambda t: _limit(t, True)),
    "ReduceL1": _typed(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _typed(
        lambda x, axes, keep: torch.linalg.vector_norm(x if x.is_floating_point() else x.double(), 2, axes, keep)
    ),
    "ReduceSumSquare": _typed(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSum": _typed(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ReduceLogSumExp": _typed(_log_sum_exp),
}


def _reduce(node: Node, function: Reduction) -> Kernel:
    axes, keep = node.numbers(1, "axes"), bool(node.attr("keepdims", 1))
    nothing = bool(node.attr("noop_with_empty_axes", 0))

    # every axis has one element then, so that the function still acts on each of them
    pointwise = {
        "ReduceL1": torch.abs,
        "ReduceL2": torch.abs,
        "ReduceSumSquare": torch.square,
        "ReduceLogSum": torch.log,
    }
    single: Callable[[Tensor], Tensor] = pointwise.get(node.ir.op_type, lambda x: x)

    def run(x: Tensor, a: Tensor | None = None) -> Tensor:
        given = axes(a)
        if not given:
            if nothing:
                return single(x)
            given = list(range(x.dim()))
        if not x.dim():
            return single(x)
        return function(x, [axis_of(int(k), x.dim()) for k in given], keep)

    return run


def _register(name: str, function: Reduction) -> None:
    operator(name, host=(1,))(lambda node: _reduce(node, function))


for _name, _function in _REDUCTIONS.items():
    _register(_name, _function)


# -- positions -------------------------------------------------------------------------------------------------------


def _arg(node: Node, largest: bool) -> Kernel:
    axis, keep = int(node.attr("axis", 0)), bool(node.attr("keepdims", 1))
    last = bool(node.attr("select_last_index", 0))

    def run(x: Tensor) -> Tensor:
        size = x.shape[axis]
        best = (x.amax if largest else x.amin)(axis, keepdim=True)
        shape = [1] * x.dim()
        shape[axis] = size
        index = torch.arange(size, device=x.device).reshape(shape)
        hit = x == best
        found = (
            torch.where(hit, index, -1).amax(axis, keepdim=True)
            if last
            else torch.where(hit, index, size).amin(axis, keepdim=True)
        )
        return found if keep else found.squeeze(axis)

    return run


operator("ArgMax")(lambda node: _arg(node, True))
operator("ArgMin")(lambda node: _arg(node, False))


@operator("TopK", host=(1,))
def _top_k(node: Node) -> Kernel:
    count = node.number(1, "k")
    axis, largest = int(node.attr("axis", -1)), bool(node.attr("largest", 1))

    def run(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # stable: of equal values the one with the lower index comes first
        wide = x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
        values, where = torch.sort(wide, dim=axis, descending=largest, stable=True)
        n = int(count(k))
        return values.narrow(axis, 0, n).to(x.dtype), where.narrow(axis, 0, n)

    return run


def _cumulative(node: Node, function: Callable[[Tensor, int], Tensor], neutral: int) -> Kernel:
    axis = node.number(1)
    exclusive, reverse = bool(node.attr("exclusive", 0)), bool(node.attr("reverse", 0))

    def run(x: Tensor, a: Tensor) -> Tensor:
        d = axis_of(int(axis(a)), x.dim())
        y = x.flip(d) if reverse else x
        if exclusive:
            first = torch.full_like(y.narrow(d, 0, 1), neutral)
            y = torch.cat([first, y.narrow(d, 0, y.shape[d] - 1)], d)
        y = function(y, d).to(x.dtype)
        return y.flip(d) if reverse else y

    return run


operator("CumSum", host=(1,))(lambda node: _cumulative(node, torch.cumsum, 0))
operator("CumProd", host=(1,))(lambda node: _cumulative(node, torch.cumprod, 1))
