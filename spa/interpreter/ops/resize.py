"""Resize and Upsample: every mode is a matrix per axis, made once per size, so that gradients are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spa.interpreter.base import Kernel, Node, axis_of, operator

Array = NDArray[np.float64]
_CACHE = 64


@dataclass(frozen=True)
class How:
    """The attributes that decide how an axis is resampled."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude: bool = False
    antialias: bool = False
    outside: float = 0.0


def _origins(how: How, size: int, out: int, scale: float, roi: tuple[float, float]) -> Array:
    """Where each output position lies on the input axis."""
    x = np.arange(out, dtype=np.float64)
    width = scale * size
    match how.coordinates:
        case "align_corners":
            return x * 0 if width == 1 else x * (size - 1) / (width - 1)
        case "asymmetric":
            return x / scale
        case "tf_crop_and_resize":
            start, end = roi
            if width == 1:
                return x * 0 + (end - start) * (size - 1) / 2 + start * (size - 1)
            return x * (end - start) * (size - 1) / (width - 1) + start * (size - 1)
        case "pytorch_half_pixel":
            return x * 0 - 0.5 if width == 1 else (x + 0.5) / scale - 0.5
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / scale
        case "half_pixel_symmetric":
            return size / 2 * (1 - out / width) + (x + 0.5) / scale - 0.5
        case _:
            return (x + 0.5) / scale - 0.5


def _cubic(distance: Array, a: float) -> Array:
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _nearest(how: How, ratio: Array) -> Array:
    """Weight of the left neighbour is 1 where this is 0."""
    right: NDArray[np.bool_]
    match how.nearest:
        case "floor":
            right = ratio == 1
        case "ceil":
            right = ratio > 0
        case "round_prefer_ceil":
            right = ratio >= 0.5
        case _:
            right = ratio > 0.5
    return right.astype(np.float64)


def matrix(how: How, size: int, out: int, scale: float, roi: tuple[float, float]) -> tuple[Array, Array]:
    """[out, size] weights, and [out] constants for positions outside of the region."""
    origin = _origins(how, size, out, scale, roi)
    # a position that is on a pixel counts as the right end of the interval before it
    left = np.ceil(origin).astype(np.int64) - 1
    ratio = origin - left
    squeeze = min(scale, 1.0) if how.antialias else 1.0
    if how.mode == "nearest":
        right = _nearest(how, ratio)
        offsets, weights = np.array([0, 1]), np.stack([1 - right, right], 1)
    elif how.mode == "linear":
        start = math.floor(-1 / squeeze) + 1
        offsets = np.arange(start, 2 - start)
        weights = np.clip(1 - np.abs((offsets[None] - ratio[:, None]) * squeeze), 0, 1)
    else:
        start = math.floor(-2 / squeeze) + 1
        offsets = np.arange(start, 2 - start)
        weights = _cubic((offsets[None] - ratio[:, None]) * squeeze, how.cubic)
    index = left[:, None] + offsets[None]
    if how.exclude:
        weights = np.where((index < 0) | (index >= size), 0.0, weights)
    if how.exclude or how.antialias:
        weights = weights / weights.sum(1, keepdims=True)
    table = np.zeros((out, size))
    np.add.at(table, (np.arange(out)[:, None], np.clip(index, 0, size - 1)), weights)
    constant = np.zeros(out)
    if how.coordinates == "tf_crop_and_resize":
        beyond = (origin < 0) | (origin > size - 1)
        table[beyond] = 0
        constant[beyond] = how.outside
    return table, constant


class Resampler:
    """Applies matrices along axes and remembers them."""

    def __init__(self, how: How) -> None:
        self.how = how
        self._made: dict[Any, Any] = {}

    def __call__(self, x: Tensor, axis: int, out: int, scale: float, roi: tuple[float, float]) -> Tensor:
        """`x` resampled along one axis."""
        size = x.shape[axis]
        crop = self.how.coordinates == "tf_crop_and_resize"
        if out == size and scale == 1 and not crop:
            return x
        key = (size, out, scale, roi, x.dtype, x.device)
        if key not in self._made:
            if len(self._made) >= _CACHE:
                self._made.clear()
            self._made[key] = self._make(x, size, out, scale, roi)
        kind, weights, constant = self._made[key]
        if kind == "index":
            return x.index_select(axis, weights)
        y = torch.matmul(x.movedim(axis, -1), weights).movedim(-1, axis)
        if constant is None:
            return y
        shape = [1] * x.dim()
        shape[axis] = out
        inside = torch.isnan(constant).reshape(shape)
        return torch.where(inside, y, constant.reshape(shape))

    def _make(self, x: Tensor, size: int, out: int, scale: float, roi: tuple[float, float]) -> Any:
        table, constant = matrix(self.how, size, out, scale, roi)
        beyond = ~table.any(1)
        if self.how.mode == "nearest" and not beyond.any():
            return "index", torch.from_numpy(table.argmax(1)).to(x.device), None
        weights = torch.from_numpy(np.ascontiguousarray(table.T)).to(x.device, x.dtype)
        if self.how.coordinates != "tf_crop_and_resize" or not beyond.any():
            return "matrix", weights, None
        fixed = torch.from_numpy(np.where(beyond, constant, np.nan)).to(x.device, x.dtype)
        return "matrix", weights, fixed


def _round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _resize(node: Node, how: How, slots: tuple[int, int, int], legacy: Sequence[float] | None = None) -> Kernel:
    """The kernel, with the slots of regions, scales and sizes (-1: there is none)."""
    regions, factors, goals = (node.numbers(s) if s >= 0 else (lambda _: None) for s in slots)
    only, policy = node.attr("axes"), str(node.attr("keep_aspect_ratio_policy", "stretch"))
    resample = Resampler(how)

    def run(x: Tensor, *rest: Tensor | None) -> Tensor:
        given: list[Tensor | None] = [None, *rest, None, None, None]
        axes = [axis_of(a, x.dim()) for a in only] if only is not None else list(range(x.dim()))
        scales = list(legacy) if legacy is not None else factors(given[slots[1]])
        sizes = goals(given[slots[2]]) if slots[2] >= 0 else None
        roi = regions(given[slots[0]]) if slots[0] >= 0 else None
        if scales and not sizes:
            outs = [math.floor(x.shape[a] * s) for a, s in zip(axes, scales, strict=True)]
        else:
            outs = [int(n) for n in sizes or []]
            scales = [n / x.shape[a] for n, a in zip(outs, axes, strict=True)]
            if policy != "stretch":
                one = min(scales) if policy == "not_larger" else max(scales)
                scales = [one] * len(axes)
                outs = [_round_half_up(one * x.shape[a]) for a in axes]
        kind = x.dtype
        y = x if kind.is_floating_point or how.mode == "nearest" else x.float()
        for k, (axis, out, scale) in enumerate(zip(axes, outs, scales or [], strict=True)):
            region = (
                (float(roi[k]), float(roi[k + len(axes)]))
                if roi and how.coordinates.startswith("tf_crop")
                else (0.0, 1.0)
            )
            y = resample(y, axis, out, float(scale), region)
        return y if y.dtype == kind else y.round().to(kind)

    return run


@operator("Resize", since=10, host=(1,))
def _resize_10(node: Node) -> Kernel:
    how = How(node.attr("mode", "nearest"), "asymmetric", "floor")
    return _resize(node, how, (-1, 1, -1))


@operator("Resize", since=11, host=(1, 2, 3))
def _resize_11(node: Node) -> Kernel:
    how = How(
        node.attr("mode", "nearest"),
        node.attr("coordinate_transformation_mode", "half_pixel"),
        node.attr("nearest_mode", "round_prefer_floor"),
        float(node.attr("cubic_coeff_a", -0.75)),
        bool(node.attr("exclude_outside", 0)),
        bool(node.attr("antialias", 0)),
        float(node.attr("extrapolation_value", 0.0)),
    )
    return _resize(node, how, (1, 2, 3))


@operator("Upsample", host=(1,))
def _upsample(node: Node) -> Kernel:
    how = How(node.attr("mode", "nearest"), "asymmetric", "floor")
    return _resize(node, how, (-1, 1, -1), node.attr("scales"))
