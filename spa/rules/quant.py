"""Quantised graphs: scales and zero points follow their channels; borders of blocks are respected."""

from __future__ import annotations

from spa.rules.base import FACTOR, NEVER, Op, Operand, Rule, Zero, register
from spa.rules.notation import Attr, Einsum, einsum
from spa.symbols import exact_div, is_static

MS = "com.microsoft"


def _quantize(op: Op) -> None:
    x, scale = op.input(0), op.input(1)
    if x is None or scale is None:
        op.freeze_all(f"{op.node.op_type} of a tensor of unknown rank")
        return
    names = [f"d{k}" for k in range(len(x.dims))]
    parts = scale_names = ""
    block = int(op.attr("block_size", 0))
    axis = int(op.attr("axis", 1)) % max(len(names), 1)
    if block and len(scale.dims) == len(names):
        # whole blocks leave: kernels that join this with a product know a few block sizes only
        parts = " ".join(f"(n {block})" if k == axis else n for k, n in enumerate(names))
        scale_names = " ".join("n" if k == axis else n for k, n in enumerate(names))
    else:
        parts = " ".join(names)
        scale_names = names[axis] if len(scale.dims) == 1 and scale.shape[0] != 1 else "~"
    Einsum(f"{parts}, {scale_names}, {scale_names} -> {parts}")(op)


_TEXT = "... c ..., c, c -> ... c ..., per tensor, axis or block"
for _domain in ("", MS):
    register("QuantizeLinear", Rule(_quantize, _TEXT, FACTOR, divisors=(1,), points={0: 2}), domain=_domain)
    # a zero scale always gives zero
    register("DequantizeLinear", Rule(_quantize, _TEXT, Zero(any_of=(0, 1)), points={0: 2}), domain=_domain)
# the scale is found from the extremes of the whole tensor and zero: zeros leave it as it is
register("DynamicQuantizeLinear", einsum("... -> ..., ~, ~", zero=NEVER, leaving={"...": "sum"}))

_CHANNEL = {"i": "channel", "o": "channel", "g": "channel"}
_POINTS = {0: 2, 3: 5}
register(
    "QLinearConv",
    einsum(
        "b (g i) ~, ~, ~, (g o) i ~, (g o), (g o), ~, ~, (g o) -> b (g o) ~",
        zero=NEVER,
        macs="b g o i ~3 ~y",
        roles=_CHANNEL,
        sizes={"g": Attr("group", 1)},
        points=_POINTS,
    ),
)
_QLINEAR_MATMUL = einsum(
    "... m k, ~, ~, ... k n, n, n, ~, ~ -> ... m n",
    zero=NEVER,
    macs="... m k n",
    roles={"n": "neuron", "k": "neuron"},
    points=_POINTS,
)
register("QLinearMatMul", _QLINEAR_MATMUL)
register("QLinearWhere", einsum("..., ..., ~, ~, ..., ~, ~, ~, ~ -> ...", zero=NEVER), domain=MS)
register("QLinearAdd QLinearMul", einsum("..., ~, ~, ..., ~, ~, ~, ~ -> ...", zero=NEVER), domain=MS)
register("QLinearSigmoid QLinearLeakyRelu", einsum("..., ~, ~, ~, ~ -> ...", zero=NEVER), domain=MS)
register("QLinearGlobalAveragePool QLinearAveragePool", einsum("b c ~, ~, ~, ~, ~ -> b c ~", zero=NEVER), domain=MS)


def _qlinear_softmax(op: Op) -> None:
    x = op.input(0)
    Einsum("..., ~, ~, ~, ~ -> ...")(op)
    if x is None:
        return
    axis = int(op.attr("axis", -1)) % max(len(x.dims), 1)
    for dim in x.dims[axis:] if op.attr("opset", 13) < 13 else x.dims[axis : axis + 1]:
        op.freeze(dim, "QLinearSoftmax runs over this axis")


register("QLinearSoftmax", Rule(_qlinear_softmax, "all axes pass but `axis`, which is frozen", NEVER), domain=MS)


def _qgemm(op: Op) -> None:
    left = "k m" if op.attr("transA", 0) else "m k"
    right = "n k" if op.attr("transB", 0) else "k n"
    Einsum(f"{left}, ~, ~, {right}, n, n, n, ~, ~ -> m n", macs="m k n", roles={"n": "neuron", "k": "neuron"})(op)


register("QGemm", Rule(_qgemm, "m k, k n, n -> m n, quantised", NEVER, points=_POINTS), domain=MS)


def _qlinear_concat(op: Op) -> None:
    """Inputs are: output scale, output zero point, then (tensor, scale, zero point) each."""
    y = op.output()
    parts: list[Operand] = [x for x in op.inputs[2::3] if x is not None]
    if y is None or len(parts) * 3 + 2 != len(op.inputs) or not all(p.dims for p in parts):
        op.freeze_all("QLinearConcat of a tensor of unknown rank")
        return
    axis = int(op.attr("axis", 1)) % len(y.dims)
    op.axes.cat(y.dims[axis], [x.dims[axis] for x in parts])
    for x in parts:
        for d, dim in enumerate(x.dims):
            if d != axis:
                op.axes.same(dim, y.dims[d])


register("QLinearConcat", Rule(_qlinear_concat, "out axis = inputs laid end to end", NEVER), domain=MS)


def _gather_blocks(op: Op) -> None:
    """Rows of a quantised table, unpacked; blocks run along the last axis."""
    table, index, scales, zeros = (op.input(k) for k in range(4))
    block = int(op.attr("block_size", 128))
    if table is None or index is None or scales is None or len(table.dims) != 2 or not is_static(scales.shape[1]):
        op.freeze_all("GatherBlockQuantized of a table that is not a matrix")
        return
    blocks = scales.shape[1]
    width = exact_div(table.shape[1], blocks)
    if width is None or int(op.attr("gather_axis", 0)) or int(op.attr("quantize_axis", 1)) not in (1, -1):
        op.freeze_all("GatherBlockQuantized along other axes, or with a last block that is not full")
        return
    rows = " ".join(f"i{k}" for k in range(len(index.dims)))
    points = "~" if zeros is None or zeros.shape[1] == blocks else "~ z"
    bound = Einsum(
        f"~ (q {width}), {rows}, ~ q, {'~ q' if points == '~' else points} -> {rows} (q {block})",
        {"q": blocks},
        leaving={"q": "pass", "z": "pass"},
        roles={"q": "hidden"},
    ).bind(op)
    if "z" in bound:
        op.freeze(bound["z"], "packed zero points")
        op.freeze(bound["q"], "packed zero points")


register(
    "GatherBlockQuantized",
    Rule(_gather_blocks, "~ (q w), i, ~ q, ~ q -> i (q w), w the block", Zero(any_of=(2,)), selects=True),
    domain=MS,
)


def _matmul_bnb4(op: Op) -> None:
    """B is [n, k] in one row of bytes, two values each; blocks run along k."""
    block, columns = int(op.attr("block_size")), int(op.attr("K"))
    if columns % block or block % 2:
        op.freeze_all("MatMulBnb4 with blocks across rows")
        return
    bound = Einsum(
        f"... m (q {block}), (n q {block // 2}), (n q) -> ... m n",
        {"n": Attr("N"), "q": columns // block},
        macs=f"... m q n {block}",
        roles={"n": "neuron", "q": "neuron"},
    ).bind(op)
    if bound:
        inner = op.axes.leaf(block)
        op.freeze(inner, "MatMulBnb4 needs whole blocks")
        op.edit("K", None, op.axes.product_of((bound["q"], inner)))


register(
    "MatMulBnb4",
    Rule(_matmul_bnb4, "... m (q w), (n q w/2), (n q) -> ... m n, w the block", Zero(any_of=(0, 2))),
    domain=MS,
)


def _matmul_nbits(op: Op) -> None:
    """B is [n, blocks of k, bytes of a block]: whole blocks of k may leave, and rows of n.

    Zero points of less than a byte are packed: then the blocks that share a byte leave together.
    """
    scales, zeros = op.input(2), op.input(3)
    block, bits = int(op.attr("block_size")), int(op.attr("bits", 4))
    blocks, rest = divmod(int(op.attr("K")), block)
    blocks += rest > 0
    packed = zeros is not None and zeros.value.dtype != (scales.value.dtype if scales is not None else None)
    shared = 8 // bits if packed and blocks * bits % 8 == 0 else 1
    flat = scales is None or len(scales.dims) == 1
    scale = f"(n q {shared})" if flat else f"n (q {shared})"
    points = "~" if zeros is None else scale
    if packed:
        byte = "q" if blocks * bits % 8 == 0 else "z"
        points = f"(n {byte})" if zeros is not None and len(zeros.dims) == 1 else f"n {byte}"
    columns = "k" if rest else f"(q {shared} {block})"
    bound = Einsum(
        f"... m {columns}, n (q {shared}) ~, {scale}, {points}, ~, n -> ... m n",
        {"n": Attr("N"), "q": blocks // shared},
        macs=f"... m q n {shared * block}",
        roles={"n": "neuron", "q": "neuron"},
    ).bind(op)
    if not bound:
        return
    if "z" in bound:
        op.freeze(bound["z"], "packed zero points")
        op.freeze(bound["q"], "packed zero points")
    if op.input(4) is not None:
        op.freeze(bound["q"], "group indices")
    if rest:
        op.freeze(bound["q"], "the last block is not full")
        op.freeze(bound["k"], "the last block is not full")
        return
    inner = op.axes.leaf(shared * block)
    op.freeze(inner, "MatMulNBits needs whole blocks")
    op.edit("K", None, op.axes.product_of((bound["q"], inner)))


register(
    "MatMulNBits",
    Rule(_matmul_nbits, "... m (q w), n q ~, n q -> ... m n, w the block", Zero(any_of=(0, 2), all_of=(5,))),
    domain=MS,
)
