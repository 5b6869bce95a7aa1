"""Operators that change shapes and make tensors, and move values without computing anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, axis_of, operator
from spa.interpreter.types import from_onnx

# -- shapes ----------------------------------------------------------------------------------------------------------


@operator("Shape", place="host")
def _shape(node: Node) -> Kernel:
    start, end = node.attr("start", 0), node.attr("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size", place="host")
def _size(_: Node) -> Kernel:
    return lambda x: torch.tensor(x.numel())


@operator("Reshape", host=(1,))
def _reshape(node: Node) -> Kernel:
    read = node.numbers(1, "shape")
    literal = bool(node.attr("allowzero", 0))
    fixed = read(None)
    if fixed is not None and (literal or 0 not in fixed):
        return lambda x, _=None: x.reshape(fixed)

    def run(x: Tensor, shape: Tensor | None = None) -> Tensor:
        wanted = read(shape)
        assert wanted is not None
        if not literal and 0 in wanted:
            wanted = [x.shape[d] if n == 0 else n for d, n in enumerate(wanted)]
        if -1 in wanted and x.numel() == 0:
            rest = math.prod(n for n in wanted if n != -1)
            wanted = [(0 if not rest else x.numel() // rest) if n == -1 else n for n in wanted]
        return x.reshape(wanted)

    return run


@operator("Flatten")
def _flatten(node: Node) -> Kernel:
    axis = int(node.attr("axis", 1))

    def run(x: Tensor) -> Tensor:
        at = axis_of(axis, x.dim())
        return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))

    return run


@operator("Squeeze", host=(1,))
def _squeeze(node: Node) -> Kernel:
    axes = node.numbers(1, "axes")

    def run(x: Tensor, a: Tensor | None = None) -> Tensor:
        given = axes(a)
        return x.squeeze() if given is None else x.squeeze(tuple(given))

    return run


@operator("Unsqueeze", host=(1,))
def _unsqueeze(node: Node) -> Kernel:
    axes = node.numbers(1, "axes")

    def run(x: Tensor, a: Tensor | None = None) -> Tensor:
        given = axes(a) or []
        rank = x.dim() + len(given)
        for axis in sorted(axis_of(k, rank) for k in given):
            x = x.unsqueeze(axis)
        return x

    return run


@operator("Expand", host=(1,))
def _expand(node: Node) -> Kernel:
    read = node.numbers(1)

    def run(x: Tensor, shape: Tensor) -> Tensor:
        wanted = read(shape) or []
        return x.expand(np.broadcast_shapes(x.shape, tuple(wanted)))

    return run


@operator("Transpose")
def _transpose(node: Node) -> Kernel:
    perm = node.attr("perm")
    if perm is None:
        return lambda x: x.permute(*range(x.dim() - 1, -1, -1))
    order = list(perm)
    return lambda x: x.permute(order)


@operator("Tile", host=(1,))
def _tile(node: Node) -> Kernel:
    read = node.numbers(1)
    return lambda x, repeats: x.repeat(read(repeats))


# -- cutting and joining ---------------------------------------------------------------------------------------------


@operator("Concat")
def _concat(node: Node) -> Kernel:
    axis = int(node.attr("axis", 1))
    return lambda *inputs: torch.cat(inputs, axis)


@operator("Split", host=(1,))
def _split(node: Node) -> Kernel:
    axis, parts = int(node.attr("axis", 0)), int(node.attr("num_outputs", len(node.ir.outputs)))
    sizes = node.numbers(1, "split")

    def run(x: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...]:
        given = sizes(s)
        if given is None:
            each = -(-x.shape[axis] // parts)
            given = [max(0, min(each, x.shape[axis] - k * each)) for k in range(parts)]
        return torch.split(x, given, axis)

    return run


def sliced(x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """ONNX's Slice: limits are clamped, negative steps walk backwards."""
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        d = axis_of(int(axis), x.dim())
        size = x.shape[d]
        first, last, _ = slice(int(start), int(end), int(step)).indices(size)
        if step < 0 and end < -size:
            last = -1
        count = max(0, -(-(last - first) // step)) if step > 0 else max(0, -(-(first - last) // -step))
        if not count:
            x = x.narrow(d, 0, 0)
        elif step == 1:
            x = x.narrow(d, first, count)
        elif step > 0:
            x = x[(slice(None),) * d + (slice(first, last, step),)]
        else:
            x = x.index_select(d, torch.arange(first, first + step * count, step, device=x.device))
    return x


@operator("Slice", host=(1, 2, 3, 4))
def _slice(node: Node) -> Kernel:
    starts, ends = node.numbers(1, "starts"), node.numbers(2, "ends")
    axes, steps = node.numbers(3, "axes"), node.numbers(4)

    def run(x: Tensor, s: Any = None, e: Any = None, a: Any = None, t: Any = None) -> Tensor:
        first, last = starts(s) or [], ends(e) or []
        return sliced(x, first, last, axes(a) or range(len(first)), steps(t) or [1] * len(first))

    return run


@operator("CenterCropPad", host=(1,))
def _center_crop_pad(node: Node) -> Kernel:
    read, axes = node.numbers(1), node.attr("axes")

    def run(x: Tensor, shape: Tensor) -> Tensor:
        for axis, size in zip(axes or range(x.dim()), read(shape) or [], strict=True):
            d = axis_of(axis, x.dim())
            extra = size - x.shape[d]
            if extra < 0:
                x = x.narrow(d, -extra // 2, size)
            elif extra:
                x = F.pad(x, [0, 0] * (x.dim() - d - 1) + [extra // 2, extra - extra // 2])
        return x

    return run


# -- padding ---------------------------------------------------------------------------------------------------------


@operator("Pad", host=(1, 2, 3))
def _pad(node: Node) -> Kernel:
    pads, axes = node.numbers(1, "pads"), node.numbers(3)
    fill = node.number(2, "value", 0.0)
    mode = str(node.attr("mode", "constant"))

    def run(x: Tensor, p: Any = None, v: Any = None, a: Any = None) -> Tensor:
        given = pads(p) or []
        chosen = [axis_of(int(k), x.dim()) for k in axes(a) or range(x.dim())]
        half = len(chosen)
        around = {d: (given[k], given[k + half]) for k, d in enumerate(chosen)}
        if mode == "constant":
            flat = [n for d in range(x.dim() - 1, -1, -1) for n in around.get(d, (0, 0))]
            value = fill(v) if v is not None or not node.has(2) else 0
            return F.pad(x, flat, value=value)
        for d, (before, after) in around.items():
            if before or after:
                x = x.index_select(d, _reflected(x.shape[d], before, after, mode).to(x.device))
        return x

    return run


def _reflected(size: int, before: int, after: int, mode: str) -> Tensor:
    """Indices of a padded axis; negative padding cuts."""
    index = torch.arange(-before, size + after)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    if mode != "reflect":
        raise ValueError(f"unknown padding {mode}")
    if size == 1:
        return torch.zeros_like(index)
    index = index % (2 * size - 2)
    return torch.where(index < size, index, 2 * size - 2 - index)


# -- blocks ----------------------------------------------------------------------------------------------------------


@operator("DepthToSpace")
def _depth_to_space(node: Node) -> Kernel:
    b, mode = int(node.attr("blocksize")), str(node.attr("mode", "DCR"))

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "DCR":
            y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        return y.reshape(n, c // (b * b), h * b, w * b)

    return run


@operator("SpaceToDepth")
def _space_to_depth(node: Node) -> Kernel:
    b, mode = int(node.attr("blocksize")), str(node.attr("mode", "DCR"))

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // b, b, w // b, b)
        y = y.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else y.permute(0, 1, 3, 5, 2, 4)
        return y.reshape(n, c * b * b, h // b, w // b)

    return run


# -- making ----------------------------------------------------------------------------------------------------------


@operator("Constant")
def _constant(node: Node) -> Kernel:
    for name, kind in (
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        if node.attr(name) is not None:
            made = torch.tensor(node.attr(name), dtype=kind)
            return lambda: made
    tensor = node.attr("value")
    if tensor is None:
        raise Unsupported("a constant that is no dense tensor of numbers")
    try:
        fixed = from_onnx(tensor)
    except (TypeError, KeyError) as error:
        raise Unsupported(f"{tensor.dtype.name} tensors") from error
    return lambda: fixed


@operator("ConstantOfShape", host=(0,))
def _constant_of_shape(node: Node) -> Kernel:
    read, tensor = node.numbers(0), node.attr("value")
    fill = torch.zeros(1) if tensor is None else from_onnx(tensor)
    return lambda shape: fill.reshape(()).expand(read(shape) or [])


@operator("Range", host=(0, 1, 2))
def _range(_: Node) -> Kernel:
    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, last, step = start.item(), limit.item(), delta.item()
        count = max(0, math.ceil((last - first) / step))
        return (first + torch.arange(count, dtype=start.dtype) * step).to(start.dtype)

    return run


@operator("EyeLike", place="host")
def _eye_like(node: Node) -> Kernel:
    dtype, k = node.attr("dtype"), int(node.attr("k", 0))
    held = node.held(dtype) if dtype else None

    def run(x: Tensor) -> Tensor:
        rows, columns = x.shape
        eye = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] == k
        return eye.to(held() if held else x.dtype)

    return run


@operator("Trilu", host=(1,))
def _trilu(node: Node) -> Kernel:
    upper, read = bool(node.attr("upper", 1)), node.number(1, "", 0)
    kernel = torch.triu if upper else torch.tril
    return lambda x, k=None: kernel(x, int(read(k)))


# -- random ----------------------------------------------------------------------------------------------------------


def _sampler(node: Node, normal: bool, like: bool) -> Kernel:
    a = float(node.attr("mean" if normal else "low", 0.0))
    b = float(node.attr("scale" if normal else "high", 1.0))
    dtype = node.attr("dtype")
    held = node.held(dtype) if dtype else (None if like else node.held(ir.DataType.FLOAT))
    shape = None if like else list(node.attr("shape"))

    def run(x: Tensor | None = None) -> Tensor:
        sizes = list(x.shape) if shape is None and x is not None else shape or []
        kind = held() if held else x.dtype if x is not None else torch.float32
        device = node.state.device
        if normal:
            return a + b * torch.randn(sizes, dtype=kind, device=device)
        return a + (b - a) * torch.rand(sizes, dtype=kind, device=device)

    return run


operator("RandomNormal", pure=False)(lambda node: _sampler(node, True, False))
operator("RandomUniform", pure=False)(lambda node: _sampler(node, False, False))
operator("RandomNormalLike", pure=False)(lambda node: _sampler(node, True, True))
operator("RandomUniformLike", pure=False)(lambda node: _sampler(node, False, True))


@operator("Bernoulli", pure=False)
def _bernoulli(node: Node) -> Kernel:
    dtype = node.attr("dtype")
    held = node.held(dtype) if dtype else None
    return lambda x: torch.bernoulli(x.detach()).to(held() if held else x.dtype)
