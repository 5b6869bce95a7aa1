"""Gather, Scatter and whatever else follows indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spa.interpreter.base import Kernel, Node, axis_of, operator


def _positive(index: Tensor, size: int) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@operator("Gather")
def _gather(node: Node) -> Kernel:
    axis = int(node.attr("axis", 0))
    known = node.const(1)
    if known is not None and known.dim() == 0:
        position = int(known)

        def pick(x: Tensor, _: Tensor) -> Tensor:
            return x.select(axis, position)

        return pick
    signed = known is None or bool((known < 0).any())

    def run(x: Tensor, index: Tensor) -> Tensor:
        d = axis_of(axis, x.dim())
        where = _positive(index, x.shape[d]) if signed else index
        if d == 0 and x.dim() == 2 and x.is_floating_point():
            return torch.nn.functional.embedding(where, x)
        y = x.index_select(d, where.reshape(-1))
        return y.reshape(*x.shape[:d], *index.shape, *x.shape[d + 1 :])

    return run


@operator("GatherElements")
def _gather_elements(node: Node) -> Kernel:
    axis = int(node.attr("axis", 0))
    return lambda x, index: torch.gather(x, axis, _positive(index, x.shape[axis]))


def _tuples(index: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(_positive(part, size) for part, size in zip(index.unbind(-1), shape, strict=False))


@operator("GatherND")
def _gather_nd(node: Node) -> Kernel:
    batch = int(node.attr("batch_dims", 0))

    def run(x: Tensor, index: Tensor) -> Tensor:
        if not batch:
            return x[_tuples(index, x.shape)]
        flat = x.flatten(0, batch - 1) if batch > 1 else x
        where = index.flatten(0, batch - 1) if batch > 1 else index
        lead = torch.arange(flat.shape[0], device=x.device)
        lead = lead.reshape(-1, *[1] * (where.dim() - 2))
        y = flat[(lead.expand(where.shape[:-1]), *_tuples(where, flat.shape[1:]))]
        return y.reshape(*x.shape[:batch], *y.shape[1:])

    return run


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements Scatter")
def _scatter_elements(node: Node) -> Kernel:
    axis, reduction = int(node.attr("axis", 0)), str(node.attr("reduction", "none"))

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        where = _positive(index, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, where, updates.to(x.dtype))
        if reduction == "add":
            return x.scatter_add(axis, where, updates.to(x.dtype))
        return x.scatter_reduce(axis, where, updates.to(x.dtype), _REDUCE[reduction], include_self=True)

    return run


@operator("ScatterND")
def _scatter_nd(node: Node) -> Kernel:
    reduction = str(node.attr("reduction", "none"))

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        updates = updates.to(x.dtype)
        where = _tuples(index, x.shape)
        if reduction in ("none", "add"):
            return x.index_put(where, updates, accumulate=reduction == "add")
        depth = index.shape[-1]
        sizes = x.shape[:depth]
        flat = torch.zeros_like(where[0])
        for part, size in zip(where, sizes, strict=True):
            flat = flat * size + part
        rows = x.reshape(math.prod(sizes), -1)
        parts = updates.reshape(flat.numel(), -1)
        y = rows.scatter_reduce(0, flat.reshape(-1, 1).expand_as(parts), parts, _REDUCE[reduction], include_self=True)
        return y.reshape(x.shape)

    return run


@operator("TensorScatter")
def _tensor_scatter(node: Node) -> Kernel:
    """Writes rows at a position per batch entry (key-value caches)."""
    axis, circular = int(node.attr("axis", -2)), node.attr("mode", "linear") == "circular"

    def run(past: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
        d = axis_of(axis, past.dim())
        count, size = update.shape[d], past.shape[d]
        first = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device) if starts is None else starts
        where = first.reshape(-1, 1) + torch.arange(count, device=past.device)
        where = where % size if circular else where
        shape = [1] * past.dim()
        shape[0], shape[d] = where.shape
        return past.scatter(d, where.reshape(shape).expand(update.shape), update)

    return run


@operator("OneHot", host=(1,))
def _one_hot(node: Node) -> Kernel:
    axis, depth = int(node.attr("axis", -1)), node.number(1)

    def run(index: Tensor, size: Tensor, values: Tensor) -> Tensor:
        count = int(depth(size))
        where = index.to(torch.int64)
        d = axis_of(axis, index.dim() + 1)
        shape = [1] * (index.dim() + 1)
        shape[d] = count
        line = torch.arange(count, device=index.device).reshape(shape)
        inside = (where >= -count) & (where < count)
        hit = (torch.remainder(where, count).unsqueeze(d) == line) & inside.unsqueeze(d)
        return torch.where(hit, values[1], values[0])

    return run


@operator("Compress")
def _compress(node: Node) -> Kernel:
    axis = node.attr("axis")

    def run(x: Tensor, keep: Tensor) -> Tensor:
        where = torch.nonzero(keep).reshape(-1)
        return x.reshape(-1)[where] if axis is None else x.index_select(axis, where)

    return run


@operator("NonZero")
def _non_zero(_: Node) -> Kernel:
    return lambda x: torch.nonzero(x).t().reshape(x.dim(), -1) if x.dim() else torch.nonzero(x.reshape(1)).t()


@operator("ReverseSequence")
def _reverse_sequence(node: Node) -> Kernel:
    batch, time = int(node.attr("batch_axis", 1)), int(node.attr("time_axis", 0))

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        line = torch.arange(x.shape[time], device=x.device)
        ends = lengths.to(torch.int64)[:, None]
        where = torch.where(line < ends, ends - 1 - line, line)
        where = where if batch < time else where.t()
        return torch.gather(x, time, where.reshape(*where.shape, *[1] * (x.dim() - 2)).expand(x.shape))

    return run


@operator("Unique")
def _unique(node: Node) -> Kernel:
    axis, ordered = node.attr("axis"), bool(node.attr("sorted", 1))

    def run(x: Tensor) -> tuple[Any, ...]:
        flat = x.reshape(-1) if axis is None else x
        d = 0 if axis is None else axis_of(axis, x.dim())
        values, inverse, counts = torch.unique(flat, sorted=True, return_inverse=True, return_counts=True, dim=d)
        line = torch.arange(flat.shape[d], device=x.device)
        first = torch.full_like(counts, flat.shape[d]).scatter_reduce(0, inverse, line, "amin")
        if not ordered:
            order = torch.argsort(first)
            values, first, counts = values.index_select(d, order), first[order], counts[order]
            inverse = torch.argsort(order)[inverse]
        return values, first, inverse, counts

    return run


Sequence = list[Any]
"""ONNX sequences are Python lists of tensors."""


def _at(read: Callable[[Tensor | None], Any]) -> Kernel:
    return lambda items, k: items[int(read(k))]


operator("SequenceConstruct")(lambda _: lambda *items: list(items))
operator("SequenceEmpty")(lambda _: list)
operator("SequenceAt", host=(1,))(lambda node: _at(node.number(1)))
operator("SequenceLength", place="host")(lambda _: lambda items: torch.tensor(len(items)))


@operator("SequenceInsert", host=(2,))
def _sequence_insert(node: Node) -> Kernel:
    read = node.number(2)

    def run(items: Sequence, x: Any, k: Tensor | None = None) -> Sequence:
        at = len(items) if k is None else int(read(k))
        at = at + len(items) if at < 0 else at
        return [*items[:at], x, *items[at:]]

    return run


@operator("SequenceErase", host=(1,))
def _sequence_erase(node: Node) -> Kernel:
    read = node.number(1)

    def run(items: Sequence, k: Tensor | None = None) -> Sequence:
        at = len(items) - 1 if k is None else int(read(k)) % len(items)
        return [*items[:at], *items[at + 1 :]]

    return run


@operator("ConcatFromSequence")
def _concat_from_sequence(node: Node) -> Kernel:
    axis, new = int(node.attr("axis")), bool(node.attr("new_axis", 0))
    return lambda items: torch.stack(items, axis) if new else torch.cat(items, axis)


@operator("SplitToSequence", host=(1,))
def _split_to_sequence(node: Node) -> Kernel:
    axis, keep = int(node.attr("axis", 0)), bool(node.attr("keepdims", 1))

    def run(x: Tensor, sizes: Tensor | None = None) -> Sequence:
        if sizes is None:
            parts = list(torch.split(x, 1, axis))
            return parts if keep else [p.squeeze(axis) for p in parts]
        return list(torch.split(x, int(sizes) if sizes.dim() == 0 else sizes.tolist(), axis))

    return run
