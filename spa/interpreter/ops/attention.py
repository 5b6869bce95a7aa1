"""Attention and rotary embeddings, spelled out so that they can be differentiated twice."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator
from spa.interpreter.types import FLOATS


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, s, h * d] to [b, h, s, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[b, h, s, d] to [b, s, h * d]."""
    return x.transpose(1, 2).flatten(2)


def softmax(scores: Tensor, guard: bool = False) -> Tensor:
    """Over keys; with `guard` a row in which everything is masked gives zeros."""
    weights = torch.softmax(scores, -1)
    return (
        torch.where(torch.isneginf(scores).all(-1, keepdim=True), torch.zeros_like(weights), weights)
        if guard
        else weights
    )


def causal(queries: int, keys: int, offset: int, device: torch.device) -> Tensor:
    """Which keys a query may see, [queries, keys]."""
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None] + offset


@operator("Attention", since=23)
def _attention(node: Node) -> Kernel:
    kv_heads, q_heads = node.attr("kv_num_heads"), node.attr("q_num_heads")
    given, softcap = node.attr("scale"), float(node.attr("softcap", 0.0))
    is_causal = bool(node.attr("is_causal", 0))
    mode = int(node.attr("qk_matmul_output_mode", 0))
    precision = node.attr("softmax_precision")
    if precision is not None and ir.DataType(precision) not in FLOATS:
        raise Unsupported(f"softmax in {ir.DataType(precision).name}")
    windows = [int(node.attr(name, -1)) for name in ("left_window_size", "right_window_size")]

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        past_k: Tensor | None = None,
        past_v: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        flat = q.dim() == 3
        if flat:
            q, k, v = split_heads(q, q_heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        present = (k, v)
        if k.shape[1] != q.shape[1]:
            each = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        root = math.sqrt(given if given is not None else 1 / math.sqrt(q.shape[-1]))
        scores = (q * root) @ (k * root).transpose(-1, -2)
        raw = scores
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        capped = scores
        offset = _offset(q, past_k, lengths)
        bias = _bias(q, k, mask, offset, is_causal, windows, lengths)
        if bias is not None:
            scores = scores + bias
        wide = scores if precision is None else scores.to(node.state.held(ir.DataType(precision)))
        weights = softmax(wide, bias is not None)
        if bias is not None:
            weights = torch.where(torch.isneginf(bias).all(-1, keepdim=True), torch.zeros_like(weights), weights)
        weights = weights.to(q.dtype)
        y = weights @ v
        y = join_heads(y) if flat else y
        if node.outputs < 4:
            return (y, *present)
        return (y, *present, (raw, capped, scores, weights)[mode])

    return run


def _offset(q: Tensor, past: Tensor | None, lengths: Tensor | None) -> Tensor | int:
    """How many keys precede the first query, [b, 1, 1, 1] if it differs between rows."""
    if past is not None:
        return past.shape[2]
    return (lengths.reshape(-1, 1, 1, 1) - q.shape[2]) if lengths is not None else 0


def _bias(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    offset: Tensor | int,
    is_causal: bool,
    windows: list[int],
    lengths: Tensor | None,
) -> Tensor | None:
    """What is added to the scores: minus infinity where a key may not be seen."""
    queries, keys = q.shape[2], k.shape[2]
    low = float("-inf")
    bias: Tensor | None = None
    if mask is not None:
        if mask.shape[-1] < keys:
            mask = F.pad(mask, [0, keys - mask.shape[-1]], value=False if mask.dtype == torch.bool else low)
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, low) if mask.dtype == torch.bool else mask
    allowed: Tensor | None = None
    if is_causal or max(windows) >= 0:
        line = torch.arange(keys, device=q.device)
        gap = torch.arange(queries, device=q.device)[:, None] + offset - line
        allowed = torch.ones_like(gap, dtype=torch.bool)
        if is_causal:
            allowed = allowed & (gap >= 0)
        if windows[0] >= 0:
            allowed = allowed & (gap <= windows[0])
        if windows[1] >= 0:
            allowed = allowed & (-gap <= windows[1])
    if lengths is not None:
        known = torch.arange(keys, device=q.device) < lengths.reshape(-1, 1, 1, 1)
        allowed = known if allowed is None else allowed & known
    if allowed is not None:
        more = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, low)
        bias = more if bias is None else bias + more
    return bias


# -- rotary ----------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Pairs of the last axis of [b, s, h, d] rotated; tables are [b, s, d / 2], or less wide than the axis."""
    pairs = cosine.shape[-1]
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    cosine, sine = cosine.unsqueeze(2).to(x.dtype), sine.unsqueeze(2).to(x.dtype)
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    real, imaginary = cosine * a - sine * b, sine * a + cosine * b
    y = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


def rotary(x: Tensor, cosine: Tensor, sine: Tensor, heads: int, width: int, interleaved: bool) -> Tensor:
    """Rotary embedding of [b, h, s, d] or [b, s, h * d]; tables [b, s, d / 2] or [s, d / 2]."""
    if cosine.dim() == 2:
        cosine, sine = cosine.unsqueeze(0), sine.unsqueeze(0)
    if width:
        cosine, sine = cosine[..., : width // 2], sine[..., : width // 2]
    if x.dim() == 4:
        return rotated(x.transpose(1, 2), cosine, sine, interleaved).transpose(1, 2)
    count = heads or x.shape[-1] // (2 * cosine.shape[-1])
    return rotated(x.reshape(*x.shape[:2], count, -1), cosine, sine, interleaved).flatten(2)


@operator("RotaryEmbedding", since=23)
def _rotary(node: Node) -> Kernel:
    interleaved, width = bool(node.attr("interleaved", 0)), int(node.attr("rotary_embedding_dim", 0))
    heads = int(node.attr("num_heads", 0))

    def run(x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is not None:
            cosine, sine = F.embedding(positions, cosine), F.embedding(positions, sine)
        return rotary(x, cosine, sine, heads, width, interleaved)

    return run
