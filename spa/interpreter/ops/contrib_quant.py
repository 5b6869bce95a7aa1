"""Quantised operators of com.microsoft: packed weights become floats, then the float operator runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator
from spa.interpreter.ops.contrib import packed_attention
from spa.interpreter.ops.quant import along, dequantised, dynamic
from spa.interpreter.ops.recurrent import lstm
from spa.interpreter.types import narrow

MS = "com.microsoft"
FP4 = (0.0, 5.208333333e-03, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
"""Magnitudes of the 4-bit floats of MatMulBnb4; the fourth bit is the sign."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of 4-bit normal floats."""


def unpacked(x: Tensor, bits: int) -> Tensor:
    """Numbers of `bits` bits along the last axis, the lowest bits first."""
    if bits == 8:
        return x.to(torch.int64)
    shifts = torch.arange(0, 8, bits, device=x.device)
    wide = torch.bitwise_right_shift(x.to(torch.int64)[..., None], shifts)
    return torch.bitwise_and(wide, 2**bits - 1).flatten(-2)


@operator("MatMulNBits", domain=MS)
def _matmul_nbits(node: Node) -> Kernel:
    inner, rows, block, bits = (int(node.attr(n, d)) for n, d in (("K", 0), ("N", 0), ("block_size", 0), ("bits", 4)))
    blocks = -(-inner // block)
    if bits not in (2, 4, 8):
        raise Unsupported(f"{bits} bits")

    def weights(b: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None) -> Tensor:
        """[N, K] floats."""
        numbers = unpacked(b, bits).reshape(rows, -1)[:, : blocks * block].to(scales.dtype)
        scale = scales.reshape(rows, blocks)
        if zeros is None:
            point = torch.full_like(scale, 2 ** (bits - 1))
        elif zeros.is_floating_point():
            point = zeros.reshape(rows, blocks)
        else:
            point = unpacked(zeros.reshape(rows, -1), bits)[:, :blocks].to(scale.dtype)
        index = torch.arange(blocks * block, device=b.device) // block
        if groups is not None:
            index[: groups.numel()] = groups.to(torch.int64)
        return ((numbers - point[:, index]) * scale[:, index])[:, :inner]

    def run(
        a: Tensor, b: Tensor, scales: Tensor, zeros: Tensor | None = None, groups: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return F.linear(a, weights(b, scales, zeros, groups).to(a.dtype), bias)

    return run


@operator("MatMulBnb4", domain=MS)
def _matmul_bnb4(node: Node) -> Kernel:
    inner, rows, block = (int(node.attr(n)) for n in ("K", "N", "block_size"))
    table = [*FP4, *(-v for v in FP4)] if node.attr("quant_type") == 0 else NF4

    def run(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        values = torch.tensor(table, dtype=scales.dtype, device=b.device)
        pairs = b.reshape(-1).to(torch.int64)
        numbers = torch.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[: rows * inner]  # the high half comes first
        wide = values[numbers] * scales.reshape(-1).repeat_interleave(block)[: rows * inner]
        return F.linear(a, wide.reshape(rows, inner).to(a.dtype))

    return run


@operator("GatherBlockQuantized", domain=MS)
def _gather_blocks(node: Node) -> Kernel:
    block, bits = int(node.attr("block_size", 128)), int(node.attr("bits", 4))
    axis, quantised_axis = int(node.attr("gather_axis", 0)), int(node.attr("quantize_axis", 1))
    kind = node.dtype(0)
    packed = kind is not None and not narrow(kind)
    if packed and bits not in (2, 4, 8):
        raise Unsupported(f"{bits} bits")

    def run(table: Tensor, index: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        numbers = unpacked(table, bits) if packed else table
        points: Tensor | float = float(2 ** (bits - 1)) if packed else 0.0
        if zeros is not None:
            points = along(
                (unpacked(zeros, bits) if packed else zeros)[..., : scales.shape[-1]], numbers, quantised_axis, block
            )
        values = (numbers.to(scales.dtype) - points) * along(scales, numbers, quantised_axis, block)
        y = values.index_select(axis, index.reshape(-1).to(torch.int64))
        return y.reshape(*values.shape[:axis], *index.shape, *values.shape[axis + 1 :])

    return run


def _rows(zero: Tensor | None, x: Tensor) -> Tensor:
    return x.double() if zero is None else x.double() - zero.double()


@operator("MatMulIntegerToFloat", domain=MS)
def _matmul_to_float(_: Node) -> Kernel:
    def run(
        a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, za: Tensor | None = None, zb: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = ((_rows(za, a) @ _rows(zb, b)) * sa.double() * sb.double()).to(sa.dtype)
        return y if bias is None else y + bias

    return run


@operator("DynamicQuantizeMatMul", domain=MS)
def _dynamic_matmul(_: Node) -> Kernel:
    def run(a: Tensor, b: Tensor, sb: Tensor, zb: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        numbers, scale, zero = dynamic(a)
        y = (((numbers - zero) * scale).double() @ (_rows(zb, b) * sb.double())).to(a.dtype)
        return y if bias is None else y + bias

    return run


@operator("QAttention", domain=MS)
def _q_attention(node: Node) -> Kernel:
    inner = packed_attention(node)

    def run(
        x: Tensor, w: Tensor, bias: Tensor, sx: Tensor, sw: Tensor, mask: Tensor | None = None,
        zx: Tensor | None = None, zw: Tensor | None = None, past: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv = ((_rows(zx, x) @ _rows(zw, w)) * sx.double() * sw.double()).to(bias.dtype) + bias
        return inner(qkv, mask, past, None)

    return run


@operator("QEmbedLayerNormalization", domain=MS)
def _q_embed(node: Node) -> Kernel:
    eps = float(node.attr("epsilon", 1e-12))

    def run(
        ids: Tensor, segments: Tensor | None, words: Tensor, places: Tensor, kinds: Tensor | None, gamma: Tensor,
        beta: Tensor, mask: Tensor | None, *quant: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scales, zeros = quant[:5], [*quant[5:], *[None] * 5][:5]

        def real(x: Tensor, k: int) -> Tensor:
            scale = scales[k]
            assert scale is not None
            return dequantised(x, scale, zeros[k])

        where = torch.arange(ids.shape[1], device=ids.device)
        total = real(F.embedding(ids, words.int()), 0) + real(F.embedding(where, places.int()), 1)
        if kinds is not None and segments is not None:
            total = total + real(F.embedding(segments, kinds.int()), 2)
        y = F.layer_norm(total, total.shape[-1:], real(gamma, 3), real(beta, 4), eps)
        count = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        return y, count if mask is None else mask.sum(1).to(torch.int32)

    return run


@operator("DynamicQuantizeLSTM", domain=MS)
def _dynamic_lstm(node: Node) -> Kernel:
    """Weights [d, i, 4 h]; input and state are quantised by their extremes in each product."""
    inner = lstm(node, rounding=True)

    def weights(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        point, factor = zero.reshape(zero.shape[0], 1, -1).double(), scale.reshape(scale.shape[0], 1, -1).double()
        return ((x.double() - point) * factor).to(scale.dtype).transpose(1, 2)

    def run(x: Tensor, w: Tensor, r: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        b, lengths, h, c, p, *quant = rest
        sw, zw, sr, zr = (q for q in quant if q is not None)
        result: tuple[Tensor, ...] = inner(x, weights(w, sw, zw), weights(r, sr, zr), b, lengths, h, c, p)
        return result

    return run
