"""Shapes of matrix products, recurrent networks, attention and the fused operators of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from spa.shapes.basic import SHAPES as BASIC
from spa.shapes.basic import joint
from spa.shapes.op import Op, Result, Shape, Table, merge
from spa.shapes.spatial import SHAPES as SPATIAL
from spa.shapes.spatial import convolved
from spa.symbols import Size, exact_div

SHAPES = Table()
MS = "com.microsoft"


def matmul(a: Shape | None, b: Shape | None) -> Shape | None:
    """The shape of numpy's matmul."""
    if not a or not b:
        return None
    if len(a) == 1:
        return (*b[:-2], b[-1]) if len(b) > 1 else ()
    if len(b) == 1:
        return a[:-1]
    batch = joint([a[:-2], b[:-2]])
    return None if batch is None else (*batch, a[-2], b[-1])


SHAPES.add("MatMul MatMulInteger", lambda op: matmul(op.shape(0), op.shape(1)))
SHAPES.add("QLinearMatMul", lambda op: matmul(op.shape(0), op.shape(3)))
SHAPES.add("MatMulIntegerToFloat DynamicQuantizeMatMul", lambda op: matmul(op.shape(0), op.shape(1)), MS)


@SHAPES.rule("Gemm")
def _gemm(op: Op) -> Result:
    a, b = op.shape(0), op.shape(1)
    rows = a[-1 if op.attr("transA", 0) else 0] if a else op.fresh()
    columns = b[0 if op.attr("transB", 0) else -1] if b else op.fresh()
    return (rows, columns)


@SHAPES.rule("Einsum")
def _einsum(op: Op) -> Result:
    equation = op.attr("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    sizes: dict[str, Size] = {}
    batch: Shape = ()
    if len(terms) != len(op.shapes):
        return None
    for term, shape in zip(terms, op.shapes, strict=True):
        head, dots, tail = term.partition("...")
        if shape is None:
            if dots:
                return None
            continue
        middle = len(shape) - len(head) - len(tail)
        if middle < 0 or (middle and not dots):
            return None
        batch = joint([batch, shape[len(head) : len(head) + middle]]) or ()
        for name, size in zip(head + tail, (*shape[: len(head)], *shape[len(head) + middle :]), strict=True):
            old = sizes.get(name, 1)
            sizes[name] = size if old == 1 else old if size == 1 else merge(old, size)
    if not arrow:
        once = sorted(name for name in sizes if left.count(name) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    head, dots, tail = right.partition("...")
    return (*_named(op, sizes, head), *(batch if dots else ()), *_named(op, sizes, tail))


def _named(op: Op, sizes: dict[str, Size], names: str) -> list[Size]:
    return [sizes[n] if n in sizes else op.fresh() for n in names]


# --- recurrent -------------------------------------------------------------------------------------------------------


@SHAPES.rule("LSTM GRU RNN")
def _recurrent(op: Op) -> Result:
    x, w, r = op.shape(0), op.shape(1), op.shape(2)
    hidden = op.attr("hidden_size") or (r[2] if r is not None and len(r) == 3 else op.fresh())
    ways: Size = 2 if op.attr("direction", "forward") == "bidirectional" else 1
    if x is None or len(x) != 3 or (w is not None and len(w) != 3):
        return [op.unknown(4), op.unknown(3), op.unknown(3)]
    if op.attr("layout", 0):
        batch, steps = x[0], x[1]
        every: Shape = (batch, steps, ways, hidden)
        last: Shape = (batch, ways, hidden)
    else:
        steps, batch = x[0], x[1]
        every, last = (steps, ways, batch, hidden), (ways, batch, hidden)
    return [every, last, last]


# --- attention -------------------------------------------------------------------------------------------------------


@SHAPES.rule("Attention")
def _attention(op: Op) -> Result:
    q, k, v = (op.shape(n) for n in range(3))
    if q is None or k is None or v is None:
        return None
    heads: Size | None = q[1] if len(q) == 4 else op.attr("q_num_heads")
    groups: Size | None = k[1] if len(k) == 4 else op.attr("kv_num_heads")
    if heads is None or groups is None:
        return None
    width_k, width_v = (s[3] if len(s) == 4 else exact_div(s[2], groups) for s in (k, v))
    width_k = op.fresh() if width_k is None else width_k
    width_v = op.fresh() if width_v is None else width_v
    rows, columns = q[-2], k[-2]
    past = op.shape(4)
    total = columns if past is None else past[2] + columns
    if op.has(4) and past is None:
        total = op.fresh()
    y: Shape = (q[0], heads, rows, width_v) if len(q) == 4 else (q[0], rows, heads * width_v)
    present = (q[0], groups, total)
    return [y, (*present, width_k), (*present, width_v), (q[0], heads, rows, total)]


@SHAPES.rule("Attention QAttention", MS)
def _ms_attention(op: Op) -> Result:
    x, w = op.shape(0), op.shape(1)
    if x is None or len(x) != 3:
        return None
    if (sizes := op.attr("qkv_hidden_sizes")) is not None:
        width: Size = sizes[2]
    else:
        third = exact_div(w[-1], 3) if w else None
        width = op.fresh() if third is None else third
    return [(x[0], x[1], width)]


@SHAPES.rule("MultiHeadAttention", MS)
def _multi_head(op: Op) -> Result:
    q, v = op.shape(0), op.shape(2)
    if q is None:
        return None
    if len(q) == 5:  # packed (batch, rows, heads, 3, width)
        return [(q[0], q[1], q[2] * q[4])]
    width: Size = q[2]
    if v is not None:
        width = v[2] if len(v) == 3 else v[1] * v[3]
    y: Shape = (q[0], q[1], width)
    heads = op.attr("num_heads", 1)
    widths = [exact_div(size, heads) for size in (q[2], width)]
    total = op.fresh()
    caches: list[Shape | None] = [(q[0], heads, total, op.fresh() if w is None else w) for w in widths]
    return [y, *caches][: len(op.node.outputs)]


@SHAPES.rule("GroupQueryAttention", MS)
def _group_query(op: Op) -> Result:
    q = op.shape(0)
    if q is None or len(q) != 3:
        return None
    heads, groups = op.attr("num_heads", 1), op.attr("kv_num_heads", 1)
    packed = not op.has(1)
    head = exact_div(q[2], heads + 2 * groups if packed else heads)
    if head is None:
        head = op.fresh()
    present: Shape = (q[0], groups, op.fresh(), head)
    shapes: list[Shape | None] = [(q[0], q[1], head * heads) if packed else q, present, present]
    return shapes[: len(op.node.outputs)]


# --- fused operators of ONNX Runtime: the first output ----------------------------------------------------------------


@SHAPES.rule("SkipLayerNormalization SkipSimplifiedLayerNormalization", MS)
def _skip_norm(op: Op) -> Result:
    x = op.shape()
    stat = None if x is None else (*x[:-1], 1)
    shapes: list[Shape | None] = [x, stat, stat, x]
    return shapes[: len(op.node.outputs)]


@SHAPES.rule("EmbedLayerNormalization", MS)
def _embed_norm(op: Op) -> Result:
    ids, table = op.shape(0), op.shape(2)
    if ids is None or not table:
        return None
    y: Shape = (*ids, table[-1])
    shapes: list[Shape | None] = [y, (ids[0],), y]
    return shapes[: len(op.node.outputs)]


@SHAPES.rule("QEmbedLayerNormalization", MS)
def _quantized_embed_norm(op: Op) -> Result:
    ids, table = op.shape(0), op.shape(2)
    return None if ids is None or not table else [(*ids, table[-1]), (ids[0],)]


@SHAPES.rule("GatherBlockQuantized", MS)
def _gather_blocks(op: Op) -> Result:
    table, index, scales = op.shape(0), op.shape(1), op.shape(2)
    axis = op.attr("gather_axis", 0)
    if table is None or index is None or scales is None or len(table) != len(scales):
        return None
    blocked = op.attr("quantize_axis", 1) % len(table)
    out = list(table)
    if op.dtype(0) == ir.DataType.UINT8 and op.attr("bits", 4) < 8:  # several values in a byte
        out[blocked] = out[blocked] * (8 // op.attr("bits", 4))
    return (*out[:axis], *index, *out[axis + 1 :])


@SHAPES.rule("FusedMatMul", MS)
def _fused_matmul(op: Op) -> Result:
    a, b = op.shape(0), op.shape(1)
    if a is None or b is None or op.attr("transBatchA", 0) or op.attr("transBatchB", 0):
        return None if a is None or b is None else op.unknown(max(len(a), len(b)))
    return matmul(_turned(a, op.attr("transA", 0)), _turned(b, op.attr("transB", 0)))


def _turned(shape: Shape, flag: int) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if flag and len(shape) > 1 else shape


@SHAPES.rule("MatMulNBits MatMulFpQ4 MatMulBnb4", MS)
def _quantized_matmul(op: Op) -> Result:
    a, columns = op.shape(), op.attr("N")
    return None if a is None else (*a[:-1], op.fresh() if columns is None else columns)


@SHAPES.rule("FusedConv NhwcConv", MS)
def _fused_conv(op: Op) -> Result:
    if op.node.op_type == "NhwcConv":
        x, w = op.shape(0), op.shape(1)
        if x is None or w is None:
            return None
        out = convolved(op, (x[0], x[-1], *x[1:-1]), (w[0], w[-1], *w[1:-1]))
        return None if out is None else (out[0], *out[2:], out[1])
    return convolved(op, op.shape(0), op.shape(1))


@SHAPES.rule("QLinearAdd QLinearMul", MS)
def _quantized_binary(op: Op) -> Result:
    return joint([op.shape(0), op.shape(3)])


@SHAPES.rule("QLinearWhere", MS)
def _quantized_where(op: Op) -> Result:
    return joint([op.shape(0), op.shape(1), op.shape(4)])


@SHAPES.rule("QLinearConcat", MS)
def _quantized_concat(op: Op) -> Result:
    shapes = [op.shape(k) for k in range(2, len(op.inputs), 3)]
    known = [shape for shape in shapes if shape is not None]
    if not known or len(known) < len(shapes):
        return None
    axis = op.attr("axis", 0)
    total: Size = 0
    for shape in known:
        total = total + shape[axis]
    out = list(known[0])
    out[axis] = total
    return tuple(out)


@SHAPES.rule("QLinearGlobalAveragePool", MS)
def _quantized_pool(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return None
    ones: Sequence[Size] = [1] * (len(x) - 2)
    return (x[0], *ones, x[-1]) if op.attr("channels_last", 0) else (*x[:2], *ones)


@SHAPES.rule("QGemm", MS)
def _quantized_gemm(op: Op) -> Result:
    a, b = op.shape(0), op.shape(3)
    if not a or not b:
        return op.unknown(2)
    return (a[-1 if op.attr("transA", 0) else 0], b[0 if op.attr("transB", 0) else -1])


SHAPES.add(
    "Gelu FastGelu QuickGelu QLinearSigmoid QLinearLeakyRelu QLinearSoftmax RotaryEmbedding QuantizeLinear "
    "DequantizeLinear GroupNorm SkipGroupNorm GemmaRotaryEmbedding Trilu Inverse",
    lambda op: [op.shape(), *[None] * (len(op.node.outputs) - 1)],
    MS,
)
SHAPES.add(
    "BiasGelu BiasAdd BiasSoftmax BiasDropout BitmaskDropout DynamicQuantizeLinear MoE", lambda op: [op.shape()], MS
)
# operators that ONNX Runtime keeps under the default domain name in older files
SHAPES.add("SimplifiedLayerNormalization", BASIC["", "LayerNormalization"])
SHAPES.add("FusedGemm GemmFastGelu", SHAPES["", "Gemm"], MS)
SHAPES.add("DynamicQuantizeLSTM", SHAPES["", "LSTM"], MS)
SHAPES.add("QLinearAveragePool", SPATIAL["", "AveragePool"], MS)


@SHAPES.rule("BiasSplitGelu", MS)
def _bias_split_gelu(op: Op) -> Result:
    x = op.shape()
    return None if x is None else (*x[:-1], x[-1] // 2)
