"""Fused operators of com.microsoft, as ONNX Runtime's optimisers write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator, plain
from spa.interpreter.ops.attention import causal, join_heads, rotary, split_heads
from spa.interpreter.ops.linear import convolution, gemm
from spa.interpreter.ops.norm import rms_norm

MS = "com.microsoft"

plain("Gelu", F.gelu, domain=MS)
plain("BiasGelu", lambda x, b: F.gelu(x + b), domain=MS)
plain("FastGelu", lambda x, b=None: F.gelu(x if b is None else x + b, approximate="tanh"), domain=MS)
plain("BiasAdd", lambda x, b, skip: x + b + skip, domain=MS)
plain(
    "GemmFastGelu",
    lambda x, w, b=None: F.gelu(x @ w if b is None else x @ w + b, approximate="tanh"),
    domain=MS,
)


@operator("QuickGelu", domain=MS)
def _quick_gelu(node: Node) -> Kernel:
    alpha = float(node.attr("alpha", 1.702))
    return lambda x: x * torch.sigmoid(alpha * x)


def _activation(node: Node) -> Callable[[Tensor], Tensor]:
    """The function that is fused into a product."""
    name = str(node.attr("activation", ""))
    params = [float(p) for p in node.attr("activation_params", ())]
    alpha = float(node.attr("activation_alpha", params[0] if params else 0.0))
    beta = float(node.attr("activation_beta", params[1] if len(params) > 1 else 0.0))
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "LeakyRelu": lambda x: F.leaky_relu(x, alpha),
        "Elu": lambda x: F.elu(x, alpha),
        "ThresholdedRelu": lambda x: torch.where(x > alpha, x, torch.zeros_like(x)),
        "HardSigmoid": lambda x: torch.clamp(alpha * x + beta, 0, 1),
        "Clip": lambda x: torch.clamp(x, alpha, beta),
    }
    if name not in known:
        raise Unsupported(f"fused activation {name}")
    return known[name]


@operator("FusedConv", domain=MS)
def _fused_conv(node: Node) -> Kernel:
    conv, act = convolution(node), _activation(node)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        y = conv(x, w, b)
        return act(y if z is None else y + z)

    return run


@operator("FusedGemm", domain=MS)
def _fused_gemm(node: Node) -> Kernel:
    product, act = gemm(node), _activation(node)
    return lambda *inputs: act(product(*inputs))


@operator("FusedMatMul TransposeMatMul", domain=MS)
def _fused_matmul(node: Node) -> Kernel:
    alpha = float(node.attr("alpha", 1.0))
    flags = [[bool(node.attr(f"{name}{side}", 0)) for name in ("trans", "transBatch")] for side in "AB"]

    def turned(x: Tensor, last: bool, batch: bool) -> Tensor:
        if batch and x.dim() > 2:  # the first axis belongs before the last one
            x = x.movedim(0, -2)
        return x.transpose(-1, -2) if last and x.dim() > 1 else x

    def run(a: Tensor, b: Tensor) -> Tensor:
        y = turned(a, *flags[0]) @ turned(b, *flags[1])
        return y if alpha == 1 else alpha * y

    return run


# -- norms -----------------------------------------------------------------------------------------------------------


def _skip_norm(node: Node, simple: bool) -> Kernel:
    eps = float(node.attr("epsilon", 1e-5 if simple else 1e-12))

    def run(x: Tensor, skip: Tensor, gamma: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        beta, bias = (None, rest[0] if rest else None) if simple else ([*rest, None, None][0], [*rest, None, None][1])
        total = x + skip
        total = total if bias is None else total + bias
        wide = total.shape[-1:]
        y = rms_norm(total, -1, eps) * gamma if simple else F.layer_norm(total, wide, gamma, beta, eps)
        if node.outputs == 1:
            return (y,)
        mean = total.mean(-1, keepdim=True)
        spread = (total if simple else total - mean).square().mean(-1, keepdim=True)
        return y, mean, torch.rsqrt(spread + eps), total

    return run


operator("SkipLayerNormalization", domain=MS)(lambda node: _skip_norm(node, False))
operator("SkipSimplifiedLayerNormalization", domain=MS)(lambda node: _skip_norm(node, True))


@operator("EmbedLayerNormalization", domain=MS)
def _embed_norm(node: Node) -> Kernel:
    eps = float(node.attr("epsilon", 1e-12))

    def run(
        ids: Tensor, segments: Tensor | None, words: Tensor, places: Tensor, kinds: Tensor | None, gamma: Tensor,
        beta: Tensor, mask: Tensor | None = None, positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        where = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        total = F.embedding(ids, words) + F.embedding(where, places)
        if kinds is not None and segments is not None:
            total = total + F.embedding(segments, kinds)
        y = F.layer_norm(total, total.shape[-1:], gamma, beta, eps)
        count = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        return y, count if mask is None else mask.sum(1).to(torch.int32), total

    return run


# -- attention -------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    bias: Tensor | None,
    allowed: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """[b, h, s, d] queries over [b, h, t, d] keys; `bias` is added to the scores, what is not allowed is not seen."""
    scores = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1) @ v


def _masked(mask: Tensor | None, keys: int, low: float, like: Tensor) -> Tensor | None:
    """What a mask of com.microsoft adds to [b, h, s, t] scores: lengths [b], or ones where a key is seen."""
    if mask is None:
        return None
    if mask.dim() == 1:
        if mask.shape[0] != like.shape[0]:
            raise ValueError("a mask of starts and ends")
        seen = torch.arange(keys, device=like.device)[None] < mask[:, None]
    else:
        seen = mask != 0
    seen = seen[:, None, None] if seen.dim() == 2 else seen[:, None] if seen.dim() == 3 else seen
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, low)


def _sum(*parts: Tensor | None) -> Tensor | None:
    found = [p for p in parts if p is not None]
    return None if not found else sum(found[1:], found[0])


def packed_attention(node: Node) -> Callable[..., tuple[Tensor, ...]]:
    """Of x already projected to [b, s, q + k + v], a mask, a cache and a bias."""
    heads, sizes = int(node.attr("num_heads")), node.attr("qkv_hidden_sizes")
    scale, low = node.attr("scale"), float(node.attr("mask_filter_value", -10000.0))
    forward = bool(node.attr("unidirectional", 0))
    if node.attr("do_rotary", 0):
        raise Unsupported("do_rotary")

    def run(qkv: Tensor, mask: Tensor | None, past: Tensor | None, extra: Tensor | None) -> tuple[Tensor, ...]:
        parts = torch.split(qkv, list(sizes), -1) if sizes else qkv.chunk(3, -1)
        q, k, v = (split_heads(p, heads) for p in parts)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device) if forward else None
        y = join_heads(attend(q, k, v, scale, _sum(_masked(mask, k.shape[2], low, q), extra), seen))
        return (y, torch.stack([k, v])) if node.outputs > 1 else (y,)

    return run


@operator("Attention", domain=MS)
def _attention(node: Node) -> Kernel:
    inner = packed_attention(node)

    def run(
        x: Tensor, w: Tensor, b: Tensor | None = None, mask: Tensor | None = None, past: Tensor | None = None,
        extra: Tensor | None = None, _: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv = x @ w
        return inner(qkv if b is None else qkv + b, mask, past, extra)

    return run


@operator("MultiHeadAttention", domain=MS)
def _multi_head(node: Node) -> Kernel:
    heads, scale = int(node.attr("num_heads")), node.attr("scale")
    low, forward = float(node.attr("mask_filter_value", -10000.0)), bool(node.attr("unidirectional", 0))

    def run(
        q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None,
        mask: Tensor | None = None, extra: Tensor | None = None, past_k: Tensor | None = None,
        past_v: Tensor | None = None, *_: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if k is None:  # [b, s, h, 3, d]
            q, k, v = (q[:, :, :, n].flatten(2) for n in range(3))
        elif v is None:  # [b, t, h, 2, d]
            k, v = k[:, :, :, 0].flatten(2), k[:, :, :, 1].flatten(2)
        if bias is not None:
            wide = q.shape[-1]
            q = q + bias[:wide]
            if k.dim() == 3:
                k, v = k + bias[wide : 2 * wide], v + bias[2 * wide :]
        q = split_heads(q, heads)
        k, v = (x if x.dim() == 4 else split_heads(x, heads) for x in (k, v))
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        seen = causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device) if forward else None
        y = join_heads(attend(q, k, v, scale, _sum(_masked(mask, k.shape[2], low, q), extra), seen))
        return (y, k, v)

    return run


def _cached(past: Tensor | None, new: Tensor, where: Tensor, total: int) -> Tensor:
    """A cache [b, h, t, d] with new rows written at positions [b, s]; it grows to `total` if it is shorter."""
    if past is None and new.shape[2] == total:
        return new
    base = new.new_zeros(*new.shape[:2], 0, new.shape[3]) if past is None else past
    base = F.pad(base, [0, 0, 0, max(0, total - base.shape[2])])
    return base.scatter(2, where[:, None, :, None].expand(new.shape), new)


@operator("GroupQueryAttention", domain=MS, host=(6,))
def _group_query(node: Node) -> Kernel:
    heads, groups = int(node.attr("num_heads")), int(node.attr("kv_num_heads"))
    scale, softcap = node.attr("scale"), float(node.attr("softcap", 0.0))
    turn, interleaved = bool(node.attr("do_rotary", 0)), bool(node.attr("rotary_interleaved", 0))
    window = int(node.attr("local_window_size", -1))
    for name in ("smooth_softmax", "qk_output", "k_quant_type", "v_quant_type"):
        if node.attr(name, 0) not in (0, "NONE"):
            raise Unsupported(name)
    if node.has(11):
        raise Unsupported("a head sink")

    def run(
        q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, last: Tensor,
        whole: Tensor, cosine: Tensor | None = None, sine: Tensor | None = None, positions: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if k is None or v is None:
            size = q.shape[-1] // (heads + 2 * groups)
            q, k, v = torch.split(q, [heads * size, groups * size, groups * size], -1)
        length = q.shape[1]
        total = int(whole)
        ends = last.reshape(-1).to(torch.int64) + 1
        starts = torch.zeros_like(ends) if length == total else ends - length
        where = starts[:, None] + torch.arange(length, device=q.device)
        if turn and cosine is not None and sine is not None:
            places = where if positions is None else positions
            tables = F.embedding(places, cosine), F.embedding(places, sine)
            q, k = rotary(q, *tables, heads, 0, interleaved), rotary(k, *tables, groups, 0, interleaved)
        q, k, v = split_heads(q, heads), split_heads(k, groups), split_heads(v, groups)
        present = (_cached(past_k, k, where, total), _cached(past_v, v, where, total))
        k, v = (x.repeat_interleave(heads // groups, 1) for x in present)
        line = torch.arange(k.shape[2], device=q.device)
        gap = where[:, None, :, None] - line
        seen = (gap >= 0) & (line < ends.reshape(-1, 1, 1, 1))
        if window > 0:
            seen = seen & (gap < window)
        y = attend(q, k, v, scale, extra, seen, softcap)
        return (join_heads(y), *present)

    return run


@operator("RotaryEmbedding", domain=MS)
def _rotary(node: Node) -> Kernel:
    interleaved, width = bool(node.attr("interleaved", 0)), int(node.attr("rotary_embedding_dim", 0))
    heads = int(node.attr("num_heads", 0))

    def run(x: Tensor, positions: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        if positions.numel() == 1:
            length = x.shape[2] if x.dim() == 4 else x.shape[1]
            positions = (positions.reshape(()) + torch.arange(length, device=x.device)).expand(x.shape[0], length)
        return rotary(x, F.embedding(positions, cosine), F.embedding(positions, sine), heads, width, interleaved)

    return run
