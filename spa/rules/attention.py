"""Fused attention: heads, query/key dims and value dims are separate spaces; the token axes are never pruned."""

from __future__ import annotations

import math

from spa.axes import Axis
from spa.rules.base import Leaving, Op, Rule, Zero, register
from spa.rules.notation import Einsum

MS = "com.microsoft"
ROLES = {"h": "kv-head", "r": "head", "d": "qk-dim", "e": "v-dim"}


def _values(slots: tuple[int, ...]) -> Zero:
    """The output is zero where the values, past and present, and their bias are."""
    return Zero(all_of=slots, outputs=(0, 2))


def _tokens(op: Op, bound: dict[str, Axis]) -> None:
    for name in "stpum":
        if name in bound:
            op.freeze(bound[name], f"{op.node.op_type} runs a softmax over tokens")


def _scores(op: Op, axis: Axis, past: int) -> None:
    """Queries times keys are summed over `axis`: zero queries are enough, zero keys only if none come from a cache."""
    slots = (0, 1) if op.input(past) is None else (0,)
    carriers = [(slot, len(x.dims) - 1) for slot in slots if (x := op.input(slot)) is not None]
    op.flow(axis, carriers, leaving="sum", role="qk-dim")


def _bind(op: Op, text: str, sizes: dict[str, int], past: int, scale: str = "scale") -> None:
    """Bind a notation with names b s t p u (tokens), h r (heads), d e (dims); keep the softmax scale."""
    roles = dict(ROLES) if sizes.get("r", 1) > 1 else {**ROLES, "h": "head"}
    passing: dict[str, Leaving] = {"d": "pass", "w": "pass"}
    bound = Einsum(text, sizes, leaving=passing, macs="b h r s t d, b h r s t e", roles=roles).bind(op)
    if not bound:
        return
    _tokens(op, bound)
    if "w" not in bound:
        _scores(op, bound["d"], past)
    head_dim = op.axes.size(bound["d"])
    if not op.attr(scale) and isinstance(head_dim, int):
        op.pin(scale, 1.0 / math.sqrt(head_dim), bound["d"])
    for attribute, names in (("num_heads", "h r"), ("q_num_heads", "h r"), ("kv_num_heads", "h")):
        if attribute in op.node.attributes:
            op.edit(attribute, None, op.axes.product_of(bound[n] for n in names.split() if n in bound))


def _mask(op: Op, slot: int, heads: str = "(h r)") -> str:
    """The attention mask, right-aligned against [batch, heads, query tokens, key tokens]."""
    operand = op.input(slot)
    rank = len(operand.dims) if operand is not None else 4
    return " ".join(["b", heads, "s", "m"][4 - rank :])


def _attention(op: Op) -> None:
    q, k = op.input(0), op.input(1)
    if q is None or k is None or (op.output(3) is not None):
        op.freeze_all("Attention that also returns its scores")
        return
    if len(q.dims) == 3:
        heads, kv = int(op.attr("q_num_heads")), int(op.attr("kv_num_heads"))
        tensors, out = "b s (h r d), b t (h d), b t (h e)", "b s (h r e)"
    else:
        heads, kv = int(q.shape[1]), int(k.shape[1])  # type: ignore[arg-type]  # static heads
        tensors, out = "b (h r) s d, b h t d, b h t e", "b (h r) s e"
    if kv < 1 or heads % kv:
        op.freeze_all("Attention with unknown heads")
        return
    text = f"{tensors}, {_mask(op, 3)}, b h p d, b h p e, b -> {out}, b h u d, b h u e"
    _bind(op, text, {"h": kv, "r": heads // kv}, 4)


register(
    "Attention",
    Rule(_attention, "b s (h r d), b t (h d), b t (h e) -> b s (h r e), and 4-D", _values((2, 5))),
    since=23,
)


def _packed_attention(op: Op) -> None:
    """com.microsoft::Attention and QAttention: one weight matrix for q, k and v."""
    quantised = op.node.op_type == "QAttention"
    columns, mask_slot, refused = ((2, 4, 7), 5, (8,)) if quantised else ((2,), 3, (4, 5, 6))
    heads = int(op.attr("num_heads"))
    weight = op.input(1)
    sizes = op.attr("qkv_hidden_sizes")
    if weight is None or not isinstance(weight.shape[1], int):
        op.freeze_all("Attention with a weight of unknown shape")
        return
    total = weight.shape[1]
    q, v = (int(sizes[0]), int(sizes[2])) if sizes else (total // 3, total // 3)
    axes = op.axes
    h, d, e = axes.leaf(heads), axes.leaf(q // heads), axes.leaf(v // heads)
    if not sizes:
        axes.same(d, e)
    parts = [axes.product_of(p) for p in ((h, d), (h, d), (h, e))]
    for operand in (weight, *(op.input(k) for k in columns)):
        if operand is not None and operand.dims and operand.shape[-1] == total:
            axes.cat(operand.dims[-1], parts)
    x, y = op.input(0), op.output(0)
    if x is None or y is None or any(op.input(k) is not None for k in refused) or op.output(1) is not None:
        op.freeze_all("Attention with a past, a bias or a mask per head")
        return
    mask = op.input(mask_slot)
    for operand, dims in ((x, 2), (y, 2)):
        for dim in operand.dims[:dims]:
            op.freeze(dim, "Attention runs a softmax over tokens")
    for dim in mask.dims if mask is not None else ():
        op.freeze(dim, "Attention runs a softmax over tokens")
    axes.same(x.dims[2], weight.dims[0])
    axes.same(y.dims[2], parts[2])
    op.flow(x.dims[2], [(0, 2), (1, 0)], leaving="sum", role="hidden")
    for axis, role in ((h, "head"), (e, "v-dim")):
        op.flow(axis, [(1, 1)], [(0, 2)], role=role)
    op.flow(d, [(1, 1)], leaving="sum", role="qk-dim")
    op.edit("num_heads", None, h)
    if sizes:
        for k, part in enumerate(parts):
            op.edit("qkv_hidden_sizes", k, part)
    if not op.attr("scale"):
        op.pin("scale", 1.0 / math.sqrt(q // heads), d)
    op.cost(x.dims[0], x.dims[1], x.dims[2], weight.dims[1])
    op.cost(x.dims[0], x.dims[1], x.dims[1], parts[0])
    op.cost(x.dims[0], x.dims[1], x.dims[1], parts[2])


register(
    "Attention",
    Rule(_packed_attention, "b s c, c ((h d) (h d) (h e)) -> b s (h e)", Zero(any_of=(1,), all_of=(2,))),
    domain=MS,
)
register(
    "QAttention",
    Rule(
        _packed_attention,
        "b s c, c ((h d) (h d) (h d)), quantised -> b s (h d)",
        Zero(any_of=(1, 4), all_of=(2,)),
        points={0: 6, 1: 7},
    ),
    domain=MS,
)


def _multi_head(op: Op) -> None:
    q, k, v, bias = (op.input(n) for n in range(4))
    if q is None or k is None or v is None or len(q.dims) != 3 or len(k.dims) != 3 or len(v.dims) != 3:
        op.freeze_all("MultiHeadAttention with packed or cached tensors")
        return
    text = "b s (h d), b t (h d), b t (h e), w, ~, b h s m, b h p d, b h p e -> b s (h e), b h u d, b h u e"
    heads = int(op.attr("num_heads"))
    roles = {**ROLES, "h": "head"}
    bound = Einsum(text, {"h": heads}, leaving={"d": "pass"}, macs="b h s t d, b h s t e", roles=roles).bind(op)
    if not bound:
        return
    if op.input(7) is not None:
        op.axes.same(bound["d"], bound["e"])  # the kernel wants caches of one shape
    if bias is not None:
        width = op.axes.product_of((bound["h"], bound["d"]))
        op.axes.cat(bias.dims[0], [width, width, op.axes.product_of((bound["h"], bound["e"]))])
    _tokens(op, bound)
    _scores(op, bound["d"], 6)
    op.edit("num_heads", None, bound["h"])
    head_dim = op.axes.size(bound["d"])
    if not op.attr("scale") and isinstance(head_dim, int):
        op.pin("scale", 1.0 / math.sqrt(head_dim), bound["d"])


register(
    "MultiHeadAttention",
    Rule(_multi_head, "b s (h d), b t (h d), b t (h e) -> b s (h e)", _values((2, 3, 7))),
    domain=MS,
)


def _group_query(op: Op) -> None:
    q, k, v = (op.input(n) for n in range(3))
    if q is None or (k is None) != (v is None):
        op.freeze_all("GroupQueryAttention without queries or values")
        return
    heads, kv = int(op.attr("num_heads")), int(op.attr("kv_num_heads"))
    lengths = op.input(5)
    last = "b ~" if lengths is not None and len(lengths.dims) == 2 else "b"
    queries = "b s (h r d)" if k is not None else "b s w"
    text = (
        f"{queries}, b t (h d), b t (h d), b h p d, b h p d, {last}, ~, ~, ~, b s, b (h r) s m, (h r)"
        " -> b s (h r d), b h u d, b h u d"
    )
    _bind(op, text, {"h": kv, "r": heads // kv}, 3)
    # the kernel reads its rotary tables and caches by head size
    y = op.output()
    if y is None:
        return
    group, head_dim = op.axes.leaf(heads // kv), op.axes.leaf(y.shape[2] // heads)
    every = op.axes.leaf(kv)
    op.axes.prod(y.dims[2], [every, group, head_dim])
    op.freeze(head_dim, "GroupQueryAttention needs whole heads")
    if k is None:
        # queries, keys and values side by side
        one = op.axes.product_of([every, head_dim])
        op.axes.cat(q.dims[2], [op.axes.product_of([every, group, head_dim]), one, one])


register(
    "GroupQueryAttention",
    Rule(_group_query, "b s (h r d), b t (h d), b t (h d) -> b s (h r d)", _values((2, 4))),
    domain=MS,
)

_ROTARY_TEXT = {
    (4, 0): "b h s (2 k), {} -> b h s (2 k)",
    (4, 1): "b h s (k 2), {} -> b h s (k 2)",
    (3, 0): "b s (h 2 k), {} -> b s (h 2 k)",
    (3, 1): "b s (h k 2), {} -> b s (h k 2)",
}


def _rotary(op: Op) -> None:
    """Rotary embedding: the pairs (d, d + D/2), or (2d, 2d + 1) interleaved, leave together."""
    x = op.input(0)
    cosine = op.input(1 if op.node.domain != MS else 2)
    if x is None or cosine is None or op.attr("rotary_embedding_dim", 0) or len(x.dims) not in (3, 4):
        op.freeze_all("RotaryEmbedding over a part of the head")
        return
    pairs = cosine.shape[-1]
    width = x.shape[-1] if len(x.dims) == 4 else None
    heads = int(op.attr("num_heads", 0)) if len(x.dims) == 3 else 1
    if not isinstance(pairs, int) or (width is not None and width != 2 * pairs):
        op.freeze_all("RotaryEmbedding over a part of the head")
        return
    table = "b s k" if len(cosine.dims) == 3 else "x k"
    index = op.input(3 if op.node.domain != MS else 1)
    positions = "b s" if index is not None and len(index.dims) == 2 else "~"
    others = f"{table}, {table}, {positions}" if op.node.domain != MS else f"{positions}, {table}, {table}"
    text = _ROTARY_TEXT[len(x.dims), int(op.attr("interleaved", 0))].format(others)
    bound = Einsum(text, {"k": pairs}, roles={"h": "head", "k": "qk-dim"}).bind(op)
    for name in ("s", "x"):
        if name in bound:
            op.freeze(bound[name], "RotaryEmbedding reads positions")
    if heads and "h" in bound:
        op.edit("num_heads", None, bound["h"])


register("RotaryEmbedding", Rule(_rotary, "b h s (2 k), x k, x k -> b h s (2 k)", Zero(any_of=(0,))), since=23)
register("RotaryEmbedding", Rule(_rotary, "b h s (2 k), ~, x k, x k -> b h s (2 k)", Zero(any_of=(0,))), domain=MS)
