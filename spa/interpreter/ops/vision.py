"""Sampling at computed positions, regions of interest, columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator
from spa.interpreter.ops.linear import padded

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@operator("GridSample")
def _grid_sample(node: Node) -> Kernel:
    mode = str(node.attr("mode", "linear"))
    mode = _MODES.get(mode, mode)
    padding, corners = str(node.attr("padding_mode", "zeros")), bool(node.attr("align_corners", 0))
    if mode == "bicubic" and node.rank() not in (None, 4):
        raise Unsupported("cubic interpolation in more than two dimensions")
    return lambda x, grid: F.grid_sample(x, grid.to(x.dtype), mode, padding, corners)


@operator("AffineGrid", host=(1,))
def _affine_grid(node: Node) -> Kernel:
    corners, read = bool(node.attr("align_corners", 0)), node.numbers(1)
    return lambda theta, size: F.affine_grid(theta, read(size) or [], corners)


def _bilinear(x: Tensor, y: Tensor, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Flat positions and weights of the four neighbours of points (y, z) in the last two axes; outside is zero."""
    height, width = x.shape[-2:]
    places, weights = [], []
    top, left = torch.floor(y), torch.floor(z)
    for dy, dx in itertools.product((0, 1), (0, 1)):
        row, column = top + dy, left + dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = (1 - (y - row).abs()) * (1 - (z - column).abs())
        places.append((row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64))
        weights.append(weight * inside)
    return places, weights


@operator("DeformConv")
def _deform_conv(node: Node) -> Kernel:
    if node.rank(0) not in (None, 4):
        raise Unsupported("a deformable convolution over other than two axes")
    strides = list(node.attr("strides") or [1, 1])
    dilations = list(node.attr("dilations") or [1, 1])
    pads = list(node.attr("pads") or [0] * 4)
    group, parts = int(node.attr("group", 1)), int(node.attr("offset_group", 1))

    def run(x: Tensor, w: Tensor, offset: Tensor, b: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        n, c = x.shape[:2]
        m, _, kh, kw = w.shape
        oh, ow = offset.shape[-2:]
        moves = offset.reshape(n, parts, kh, kw, 2, oh, ow)

        def line(count: int) -> Tensor:
            return torch.arange(count, device=x.device, dtype=x.dtype)

        base_y = (line(oh) * strides[0] - pads[0])[:, None]
        base_x = (line(ow) * strides[1] - pads[1])[None, :]
        tap_y = (line(kh) * dilations[0]).reshape(kh, 1, 1, 1)
        tap_x = (line(kw) * dilations[1]).reshape(1, kw, 1, 1)
        places, weights = _bilinear(x, moves[:, :, :, :, 0] + base_y + tap_y, moves[:, :, :, :, 1] + base_x + tap_x)
        flat = x.reshape(n, parts, c // parts, -1)
        columns = x.new_zeros(())
        for place, weight in zip(places, weights, strict=True):
            index = place.reshape(n, parts, 1, -1).expand(-1, -1, c // parts, -1)
            columns = columns + torch.gather(flat, 3, index) * weight.reshape(n, parts, 1, -1)
        columns = columns.reshape(n, parts, c // parts, kh * kw, oh * ow)
        if mask is not None:
            columns = columns * mask.reshape(n, parts, 1, kh * kw, oh * ow)
        columns = columns.reshape(n, group, c // group * kh * kw, oh * ow)
        y = torch.einsum("gok,ngkp->ngop", w.reshape(group, m // group, -1), columns).reshape(n, m, oh, ow)
        return y if b is None else y + b.reshape(-1, 1, 1)

    return run


# -- regions ---------------------------------------------------------------------------------------------------------


@operator("RoiAlign", host=(2,))
def _roi_align(node: Node) -> Kernel:
    half = node.version >= 16 and node.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    height, width = int(node.attr("output_height", 1)), int(node.attr("output_width", 1))
    ratio, scale = int(node.attr("sampling_ratio", 0)), float(node.attr("spatial_scale", 1.0))
    largest = node.attr("mode", "avg") == "max"

    def one(x: Tensor, roi: Tensor) -> Tensor:
        box = roi * scale - (0.5 if half else 0.0)
        sizes = [box[3] - box[1], box[2] - box[0]]
        if not half:
            sizes = [s.clamp(min=1.0) for s in sizes]
        lines, counts = [], []
        for start, size, bins, limit in zip((box[1], box[0]), sizes, (height, width), x.shape[-2:], strict=True):
            count = ratio or math.ceil(float(size.detach()) / bins)
            if count <= 0:  # a region of negative size
                return x.new_zeros(x.shape[0], height, width)
            place = start + (torch.arange(bins * count, device=x.device, dtype=x.dtype) + 0.5) * size / bins / count
            lines.append((place.clamp(0, limit - 1), (place >= -1) & (place <= limit)))
            counts.append(count)
        grid_y = lines[0][0][:, None].expand(-1, len(lines[1][0]))
        grid_x = lines[1][0][None, :].expand(len(lines[0][0]), -1)
        inside = lines[0][1][:, None] & lines[1][1][None, :]
        places, weights = _bilinear(x, grid_y, grid_x)
        flat = x.flatten(-2)
        corners = [
            flat[:, p.reshape(-1)].reshape(-1, *p.shape) * (w * inside) for p, w in zip(places, weights, strict=True)
        ]
        # the largest of the weighted corners, as in ONNX Runtime
        y = torch.stack(corners).amax(0) if largest else torch.stack(corners).sum(0)
        y = y.reshape(-1, height, counts[0], width, counts[1])
        return y.amax((2, 4)) if largest else y.mean((2, 4))

    def run(x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
        if not len(rois):
            return x.new_zeros(0, x.shape[1], height, width)
        return torch.stack([one(x[k], roi) for k, roi in zip(batch.tolist(), rois, strict=True)])

    return run


@operator("MaxRoiPool", host=(1,))
def _max_roi_pool(node: Node) -> Kernel:
    height, width = node.attr("pooled_shape")
    scale = float(node.attr("spatial_scale", 1.0))

    def run(x: Tensor, rois: Tensor) -> Tensor:
        out = []
        for batch, *corners in rois.tolist():
            left, top, right, bottom = (math.floor(c * scale + 0.5) for c in corners)
            rows = _bins(top, bottom, height, x.shape[2])
            columns = _bins(left, right, width, x.shape[3])
            image = x[int(batch)]
            cells = [
                image[:, a:b, c:d].amax((1, 2)) if b > a and d > c else image.new_zeros(image.shape[0])
                for a, b in rows
                for c, d in columns
            ]
            out.append(torch.stack(cells, 1).reshape(-1, height, width))
        return torch.stack(out) if out else x.new_zeros(0, x.shape[1], height, width)

    return run


def _bins(start: int, end: int, count: int, limit: int) -> list[tuple[int, int]]:
    size = max(end - start + 1, 1) / count
    edges = [(math.floor(k * size) + start, math.ceil((k + 1) * size) + start) for k in range(count)]
    return [(min(max(a, 0), limit), min(max(b, 0), limit)) for a, b in edges]


@operator("NonMaxSuppression", host=(0, 1, 2, 3, 4))
def _suppress(node: Node) -> Kernel:
    """Boxes that no better box of their class covers; decided on the CPU, and not differentiable."""
    centre = bool(node.attr("center_point_box", 0))
    most, cover, least = node.number(2, "", 0), node.number(3, "", 0.0), node.number(4)

    def run(
        boxes: Tensor, scores: Tensor, count: Tensor | None = None, iou: Tensor | None = None, low: Tensor | None = None
    ) -> Tensor:
        corners = boxes.detach()
        if centre:
            middle, half = corners[..., :2], corners[..., 2:] / 2
            corners = torch.cat([middle - half, middle + half], -1)
        ends = torch.stack([corners[..., :2], corners[..., 2:]])
        first, last = ends.amin(0), ends.amax(0)
        area = (last - first).prod(-1)
        limit, threshold, minimum = int(most(count)), float(cover(iou)), least(low)
        rows = []
        for b, c in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
            kept: list[int] = []
            for k in torch.argsort(scores[b, c], descending=True, stable=True).tolist():
                if len(kept) == limit or (minimum is not None and float(scores[b, c, k]) <= minimum):
                    break
                shared = torch.minimum(last[b, k], last[b, kept]) - torch.maximum(first[b, k], first[b, kept])
                inside = shared.clamp(min=0).prod(-1)
                if not bool((inside / (area[b, k] + area[b, kept] - inside) > threshold).any()):
                    kept.append(k)
            rows += [[b, c, k] for k in kept]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    return run


@operator("Col2Im", host=(1, 2))
def _col2im(node: Node) -> Kernel:
    image, block = node.numbers(1), node.numbers(2)

    def run(x: Tensor, i: Tensor, k: Tensor) -> Tensor:
        sizes, kernel = image(i) or [], block(k) or []
        rank = len(kernel)
        strides = list(node.attr("strides") or [1] * rank)
        dilations = list(node.attr("dilations") or [1] * rank)
        pads = list(node.attr("pads") or [0] * 2 * rank)
        wide = [n + pads[d] + pads[d + rank] for d, n in enumerate(sizes)]
        counts = [
            (w - dil * (n - 1) - 1) // s + 1 for w, dil, n, s in zip(wide, dilations, kernel, strides, strict=True)
        ]
        columns = x.reshape(x.shape[0], -1, math.prod(kernel), *counts)
        y = x.new_zeros(x.shape[0], columns.shape[1], *wide)
        for t, tap in enumerate(itertools.product(*(range(n) for n in kernel))):
            y = y + _spread(columns[:, :, t], wide, [d * p for d, p in zip(dilations, tap, strict=True)], strides)
        return padded(y, [-p for p in pads[:rank]], [-p for p in pads[rank:]])

    return run


def _spread(x: Tensor, sizes: Sequence[int], starts: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Values at every `strides`-th position from `starts` on, zeros elsewhere."""
    y = x.new_zeros(*x.shape[:2], *sizes)
    where = tuple(slice(s, s + (n - 1) * t + 1, t) for s, n, t in zip(starts, x.shape[2:], strides, strict=True))
    y[(slice(None), slice(None), *where)] = x
    return y
