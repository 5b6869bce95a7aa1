"""Shapes of convolutions, poolings and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from spa.shapes.op import Op, Result, Shape, Table
from spa.symbols import Size, low, opaque

SHAPES = Table()


def _windows(op: Op, x: Shape, kernel: Sequence[int]) -> list[Size]:
    """How many windows fit into each spatial dimension."""
    n = len(x) - 2
    strides, dilations = (list(op.attr(name) or [1] * n) for name in ("strides", "dilations"))
    pads, mode = list(op.attr("pads") or [0] * 2 * n), op.attr("auto_pad", "NOTSET")
    ceil = bool(op.attr("ceil_mode", 0))
    if min(len(strides), len(dilations), len(kernel), len(pads) // 2) < n:
        return [op.fresh() for _ in range(n)]
    out: list[Size] = []
    for k in range(n):
        reach, stride, size = dilations[k] * (kernel[k] - 1) + 1, strides[k], x[2 + k]
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            out.append((size + stride - 1) // stride)
        elif mode == "VALID":
            out.append((size - reach) // stride + 1)
        else:
            out.append(_window(op, size, reach, stride, (pads[k], pads[k + n]), ceil))
    return out


def _window(op: Op, size: Size, reach: int, stride: int, pads: tuple[int, int], ceil: bool) -> Size:
    room = size + (pads[0] + pads[1] - reach)
    if not ceil:
        return room // stride + 1
    count = (room + stride - 1) // stride + 1
    # a last window that lies in the padding alone is dropped by some versions only
    if stride + pads[1] <= reach:
        return count
    if isinstance(count, int) and isinstance(size, int) and (count - 1) * stride < size + pads[0]:
        return count
    return op.fresh()


@SHAPES.rule("Conv ConvInteger QLinearConv DeformConv")
def _conv(op: Op) -> Result:
    x, w = op.shape(0), op.shape(3 if op.node.op_type == "QLinearConv" else 1)
    return convolved(op, x, w)


def convolved(op: Op, x: Shape | None, w: Shape | None) -> Shape | None:
    """The shape of a convolution's output."""
    rank = len(x) if x is not None else len(w) if w is not None else 0
    if rank < 3 or (w is not None and len(w) != rank):
        return None
    channels = w[0] if w is not None else op.fresh()
    kernel = op.attr("kernel_shape") or ([d for d in w[2:] if isinstance(d, int)] if w is not None else [])
    if x is None:
        return (op.fresh(), channels, *op.unknown(rank - 2))
    return (x[0], channels, *_windows(op, x, kernel))


@SHAPES.rule("ConvTranspose")
def _conv_transpose(op: Op) -> Result:
    x, w = op.shape(0), op.shape(1)
    if x is None or w is None or len(x) != len(w) or len(x) < 3:
        return None
    n = len(x) - 2
    head: tuple[Size, Size] = (x[0], w[1] * op.attr("group", 1))
    if (wanted := op.attr("output_shape")) is not None:
        return (*head, *wanted[-n:])
    kernel = op.attr("kernel_shape") or w[2:]
    strides, dilations = (op.attr(name) or [1] * n for name in ("strides", "dilations"))
    pads, extra = op.attr("pads") or [0] * 2 * n, op.attr("output_padding") or [0] * n
    mode = op.attr("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return (*head, *[d * s for d, s in zip(x[2:], strides, strict=False)])
    if mode == "VALID":
        pads = [0] * 2 * n
    return (
        *head,
        *[
            (x[2 + k] - 1) * strides[k] + ((kernel[k] - 1) * dilations[k] + 1 + extra[k] - pads[k] - pads[k + n])
            for k in range(n)
        ],
    )


@SHAPES.rule("AveragePool LpPool MaxPool")
def _pool(op: Op) -> Result:
    x = op.shape()
    if x is None or len(x) < 3:
        return None
    out: Shape = (*x[:2], *_windows(op, x, op.attr("kernel_shape") or []))
    return [out] * len(op.node.outputs)


@SHAPES.rule("GlobalAveragePool GlobalLpPool GlobalMaxPool")
def _global_pool(op: Op) -> Result:
    x = op.shape()
    return None if x is None else (*x[:2], *[1] * (len(x) - 2))


@SHAPES.rule("MaxRoiPool")
def _roi_pool(op: Op) -> Result:
    x, rois = op.shape(0), op.shape(1)
    return None if x is None or not rois else (rois[0], x[1], *op.attr("pooled_shape", ()))


@SHAPES.rule("RoiAlign")
def _roi_align(op: Op) -> Result:
    x, rois = op.shape(0), op.shape(1)
    if x is None or not rois:
        return None
    return (rois[0], x[1], op.attr("output_height", 1), op.attr("output_width", 1))


@SHAPES.rule("STFT")
def _stft(op: Op) -> Result:
    # ONNX's own inference forgets that a one-sided spectrum is the default
    x, step = op.shape(), op.ints(1)
    window, length = op.shape(2), op.ints(3)
    if x is None:
        return op.unknown(4)
    frame: Size | None = length[0] if length else window[0] if window and not op.has(3) else None
    if frame is None:
        return (x[0], op.fresh(), op.fresh(), 2)
    bins = frame // 2 + 1 if op.attr("onesided", 1) else frame
    return (x[0], (x[1] - frame) // step[0] + 1 if step and step[0] > 0 else op.fresh(), bins, 2)


@SHAPES.rule("GridSample")
def _grid_sample(op: Op) -> Result:
    x, grid = op.shape(0), op.shape(1)
    return None if x is None or grid is None else (*x[:2], *grid[1:-1])


# --- resizing --------------------------------------------------------------------------------------------------------


@SHAPES.rule("Resize")
def _resize(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return None
    axes = [k + len(x) if k < 0 else k for k in op.attr("axes") or range(len(x))]
    if op.has(3):
        return _resized_to(op, x, axes)
    slot = 2 if op.version >= 11 else 1
    return _scaled(op, x, axes, slot)


def _resized_to(op: Op, x: Shape, axes: Sequence[int]) -> Shape:
    sizes = op.items(3)
    out = list(x)
    for n, axis in enumerate(axes):
        known = (
            sizes is not None
            and len(sizes) == len(axes)
            and op.attr("keep_aspect_ratio_policy", "stretch") == ("stretch")
        )
        out[axis] = op.size(sizes[n]) if known and sizes is not None else op.fresh()
    return tuple(out)


def _scaled(op: Op, x: Shape, axes: Sequence[int], slot: int) -> Shape:
    scales = op.items(slot, "scales")
    cropped = op.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if scales is None or len(scales) != len(axes) or cropped:
        return tuple(op.fresh() for _ in x)
    out = list(x)
    for axis, scale in zip(axes, scales, strict=True):
        out[axis] = _floor(op, x[axis], scale) if isinstance(scale, int | float) else op.fresh()
    return tuple(out)


def _floor(op: Op, size: Size, scale: float) -> Size:
    """floor(size x scale), only where single precision cannot change it."""
    exact = Fraction(scale)
    if exact.denominator == 1:
        return size * exact.numerator
    if exact.denominator & (exact.denominator - 1) == 0 and exact.denominator <= 1 << 10:
        return size * exact.numerator // exact.denominator
    if isinstance(size, int):
        single = int(np.floor(np.float32(scale) * np.float32(size)))
        return single if single == int(np.floor(float(scale) * size)) else op.fresh()
    bottom = low(size)
    return opaque(f"resize {scale!r}", size, bottom=0 if bottom is not None and bottom >= 0 else None)


@SHAPES.rule("Upsample")
def _upsample(op: Op) -> Result:
    x = op.shape()
    return None if x is None else _scaled(op, x, range(len(x)), 1)


@SHAPES.rule("CenterCropPad")
def _center_crop_pad(op: Op) -> Result:
    x, sizes = op.shape(), op.items(1)
    if x is None:
        return None
    axes = op.attr("axes") or range(len(x))
    out = list(x)
    for n, axis in enumerate(axes):
        out[axis] = op.size(sizes[n]) if sizes is not None and n < len(sizes) else op.fresh()
    return tuple(out)
