"""Shapes of pointwise operators, reductions, normalisations and quantisation."""

from __future__ import annotations

from collections.abc import Sequence

from spa.shapes.op import Op, Result, Shape, Table, axis_of
from spa.symbols import Size, Sym, broadcast, maximum, product

SHAPES = Table()


def joint(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape of operands broadcast together."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not known:
        return None
    out = known[0]
    for shape in known[1:]:
        if shape == out:
            continue
        if len(shape) > len(out):
            out, shape = shape, out
        head = len(out) - len(shape)
        out = (*out[:head], *[_broadcast(a, b) for a, b in zip(out[head:], shape, strict=True)])
    return out


def _broadcast(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int) and a != b:
        return b if a == 1 else a  # where neither is 1 the model is wrong
    return broadcast(a, b)


def _pointwise(op: Op) -> Result:
    return joint([shape for k, shape in enumerate(op.shapes) if op.has(k)])


def _same(op: Op) -> Result:
    return op.shape()


def _same_all(op: Op) -> Result:
    return [op.shape()] * len(op.node.outputs)


def _scalar(op: Op) -> Result:
    return ()


SHAPES.add(
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min "
    "Mod Mul Or Pow PRelu Sub Sum Where Xor",
    _pointwise,
)
SHAPES.add(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Bernoulli Cast CastLike Ceil Celu Clip Cos Cosh CumProd CumSum "
    "DequantizeLinear Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax Identity "
    "InstanceNormalization IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg "
    "Not QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike Reciprocal Relu Round ScatterElements "
    "Scatter ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh TensorScatter "
    "ThresholdedRelu Trilu EyeLike RotaryEmbedding",
    _same,
)
SHAPES.add("Dropout", _same_all)


@SHAPES.rule("ArrayFeatureExtractor", "ai.onnx.ml")
def _extract(op: Op) -> Result:
    x, index = op.shape(0), op.shape(1)
    if not x or index is None:
        return None
    return (*(x[:-1] or (1,)), product(index))


SHAPES.add("Scaler Normalizer Imputer Binarizer", _same, "ai.onnx.ml")


@SHAPES.rule("BatchNormalization")
def _batch_norm(op: Op) -> Result:
    return [op.shape(), *[op.shape(3)] * (len(op.node.outputs) - 1)]


@SHAPES.rule("LayerNormalization")
def _layer_norm(op: Op) -> Result:
    x = op.shape()
    axis = None if x is None else axis_of(op.attr("axis", -1), len(x))
    stat = None if x is None or axis is None else (*x[:axis], *[1] * (len(x) - axis))
    return [x, *[stat] * (len(op.node.outputs) - 1)]


@SHAPES.rule("DynamicQuantizeLinear")
def _dynamic_quantize(op: Op) -> Result:
    return [op.shape(), (), ()]


# --- reductions ------------------------------------------------------------------------------------------------------


@SHAPES.rule(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
def _reduce(op: Op) -> Result:
    x, keep = op.shape(), bool(op.attr("keepdims", 1))
    if x is None:
        return None
    given = op.attr("axes") is not None or op.has(1)
    axes = op.ints(1, "axes")
    if given and axes is None:
        if keep:
            return tuple(d if d == 1 else op.fresh() for d in x)
        count = op.shape(1)
        gone = count[0] if count else None
        return op.unknown(max(len(x) - gone, 0)) if isinstance(gone, int) and gone else None
    if not axes:
        return x if op.attr("noop_with_empty_axes", 0) else tuple(1 for _ in x) if keep else ()
    return _dropped(x, axes, keep)


def _dropped(x: Shape, axes: Sequence[int], keep: bool) -> Shape | None:
    marked = {axis_of(a, len(x)) for a in axes}
    if None in marked:
        return None
    if keep:
        return tuple(1 if k in marked else d for k, d in enumerate(x))
    return tuple(d for k, d in enumerate(x) if k not in marked)


@SHAPES.rule("ArgMax ArgMin")
def _arg(op: Op) -> Result:
    x = op.shape()
    return None if x is None else _dropped(x, [op.attr("axis", 0)], bool(op.attr("keepdims", 1)))


@SHAPES.rule("TopK")
def _top_k(op: Op) -> Result:
    x = op.shape()
    items = op.items(1, "k")
    axis = None if x is None else axis_of(op.attr("axis", -1), len(x))
    if x is None or axis is None:
        return None
    out = (*x[:axis], op.size(items[0]) if items else op.fresh(), *x[axis + 1 :])
    return [out, out]


@SHAPES.rule("SoftmaxCrossEntropyLoss")
def _loss(op: Op) -> Result:
    target = op.shape(1) if op.attr("reduction", "mean") == "none" else ()
    return [target, op.shape()][: len(op.node.outputs)]


SHAPES.add("Det", lambda op: None if (x := op.shape()) is None else x[:-2])


# --- made from nothing, or from a value ------------------------------------------------------------------------------


@SHAPES.rule("Shape")
def _shape(op: Op) -> Result:
    x = op.shape()
    if x is None:
        return (op.fresh(),)
    return (len(x[bounds(op, len(x))]),)


def bounds(op: Op, rank: int) -> slice:
    """The dims that `Shape` returns."""
    return slice(op.attr("start", 0), op.attr("end", rank))


SHAPES.add("Size", _scalar)


@SHAPES.rule("ConstantOfShape")
def _constant_of_shape(op: Op) -> Result:
    return listed(op, 0)


def listed(op: Op, slot: int) -> Shape | None:
    """The shape that an input lists."""
    items = op.items(slot)
    if items is None:
        rank = op.shape(slot)
        return op.unknown(rank[0]) if rank and isinstance(rank[0], int) else None
    return tuple(op.size(item) for item in items)


@SHAPES.rule("RandomNormal RandomUniform")
def _random(op: Op) -> Result:
    return tuple(op.attr("shape", ()))


@SHAPES.rule("Range")
def _range(op: Op) -> Result:
    start, limit, delta = (op.items(k) for k in range(3))
    if not start or not limit or not delta:
        return (op.fresh(),)
    first, last, step = start[0], limit[0], delta[0]
    if type(first) is int and type(last) is int and type(step) is int and step:
        return (len(range(first, last, step)),)
    if step == 1 and isinstance(first, int | Sym) and isinstance(last, int | Sym):
        return (maximum(last - first, 0),)
    return (op.fresh(),)


@SHAPES.rule("NonZero")
def _non_zero(op: Op) -> Result:
    x = op.shape()
    return None if x is None else (len(x) or 1, op.fresh())


@SHAPES.rule("Multinomial")
def _multinomial(op: Op) -> Result:
    x = op.shape()
    return (x[0] if x else op.fresh(), op.attr("sample_size", 1))


@SHAPES.rule("OneHot")
def _one_hot(op: Op) -> Result:
    x, depth = op.shape(), op.items(1)
    if x is None:
        return None
    axis = axis_of(op.attr("axis", -1), len(x) + 1)
    if axis is None:
        return None
    return (*x[:axis], op.size(depth[0]) if depth else op.fresh(), *x[axis:])


@SHAPES.rule("HannWindow HammingWindow BlackmanWindow")
def _window(op: Op) -> Result:
    size = op.items(0)
    return (op.size(size[0]) if size else op.fresh(),)


@SHAPES.rule("NonMaxSuppression")
def _non_max_suppression(op: Op) -> Result:
    return (op.fresh(), 3)
