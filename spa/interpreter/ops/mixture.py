"""Mixtures of experts in one operator (com.microsoft)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, Unsupported, operator

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def _activation(node: Node) -> Callable[[Tensor], Tensor]:
    name = str(node.attr("activation_type", "relu"))
    if name in _PLAIN:
        return _PLAIN[name]
    if name != "swiglu" or int(node.attr("swiglu_fusion", 0)) != 1:
        raise Unsupported(f"activation {name} of this form")
    alpha, beta = float(node.attr("activation_alpha", 1.0)), float(node.attr("activation_beta", 0.0))
    limit = float(node.attr("swiglu_limit", float("inf")))

    def gated(x: Tensor) -> Tensor:
        gate, linear = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (linear + beta)

    return gated


@operator("MoE", domain="com.microsoft")
def _moe(node: Node) -> Kernel:
    if int(node.attr("use_sparse_mixer", 0)):
        raise Unsupported("a sparse mixer")
    act, chosen = _activation(node), int(node.attr("k", 1))
    normalised = bool(int(node.attr("normalize_routing_weights", 0)))

    def run(
        x: Tensor, router: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        """Tokens [..., c], logits [tokens, e], [e, f, c], [e, f], [e, c, f], [e, c]."""
        tokens = x.reshape(-1, x.shape[-1])
        shares, which = torch.softmax(router, -1).topk(chosen, -1)
        if normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        hidden = torch.einsum("tc,tkfc->tkf", tokens, up[which])
        hidden = act(hidden if bias is None else hidden + bias[which])
        parts = torch.einsum("tkf,tkcf->tkc", hidden, down[which])
        parts = parts if shift is None else parts + shift[which]
        return (shares[..., None] * parts).sum(1).reshape(x.shape)

    return run
