"""Operators that act on each position by itself, with numpy broadcasting: every dimension passes."""

from __future__ import annotations

from spa.rules.base import FACTOR, NEVER, Op, Rule, Zero, register
from spa.rules.notation import Einsum, einsum

UNARY = "... -> ..."
BINARY = "..., ... -> ..."
MANY = "..., ..., ... -> ..."


def _pointwise(text: str, zero: Zero, divisors: tuple[int, ...] = ()) -> Rule:
    rule = einsum(text, zero=zero)
    return Rule(rule.apply, rule.text, zero, divisors, combines="," in text)


# f(0) = 0: a channel whose weights are zero stays zero
register(
    "Relu LeakyRelu Elu Selu Celu ThresholdedRelu Tanh Erf Gelu HardSwish Mish Swish Softsign Shrink Sin Tan Asin Atan "
    "Sinh Asinh Atanh Sqrt Abs Neg Sign Floor Ceil Round Identity Cast BitCast",
    _pointwise(UNARY, FACTOR),
)
# f(0) != 0, or it depends on attributes
register("Sigmoid HardSigmoid Softplus Exp Cos Cosh Acos Acosh Not BitwiseNot IsNaN IsInf", _pointwise(UNARY, NEVER))
register("Reciprocal Log", _pointwise(UNARY, NEVER, divisors=(0,)))


def _dropout(op: Op) -> None:
    """The identity at inference; in training it draws random numbers for the whole tensor."""
    training = op.input(2)
    if training is not None and (training.const is None or bool(training.const.reshape(-1)[0])):
        op.freeze_all("Dropout in training")
    else:
        Einsum("..., ~, ~ -> ..., ...")(op)


register("Dropout", Rule(_dropout, "..., ~, ~ -> ..., ...", Zero(any_of=(0,), outputs=(0,))))


def _clipped(op: Op) -> Zero:
    """Zero stays zero where it lies between the limits."""
    for slot, name, sign in ((1, "min", 1), (2, "max", -1)):
        operand = op.input(slot)
        limit = (
            op.attr(name, 0.0) if operand is None else None if operand.const is None else operand.const.reshape(-1)[0]
        )
        if limit is None or limit * sign > 0:
            return NEVER
    return FACTOR


register("Clip", Rule(einsum("..., ~, ~ -> ...").apply, "..., ~, ~ -> ...", _clipped))


def _cast_like(op: Op) -> None:
    """The second operand lends its type only."""
    x, like, y = op.input(0), op.input(1), op.output()
    if x is None or y is None:
        op.freeze_all("CastLike of a tensor of unknown rank")
        return
    for a, b in zip(x.dims, y.dims, strict=True):
        op.axes.same(a, b)
    op.axes.mentioned.update(like.dims if like is not None else ())


register("CastLike", Rule(_cast_like, "... -> ..., the second operand is free", FACTOR))

register("Add Sub", _pointwise(BINARY, Zero(all_of=(0, 1))))
register("Mul And BitwiseAnd", _pointwise(BINARY, Zero(any_of=(0, 1))))
register("Div", _pointwise(BINARY, FACTOR, divisors=(1,)))


def _power(op: Op) -> Zero:
    """0 ** y is zero for y > 0."""
    exponent = op.input(1)
    known = exponent.const if exponent is not None else None
    positive = known is not None and all(v is not None and v > 0 for v in known.reshape(-1).tolist())
    return FACTOR if positive else NEVER


register("Pow", Rule(einsum(BINARY).apply, BINARY, _power, combines=True))
register("Mod BitShift", _pointwise(BINARY, FACTOR, divisors=(1,)))
register("PRelu", _pointwise(BINARY, FACTOR))
register("Or Xor BitwiseOr BitwiseXor", _pointwise(BINARY, Zero(all_of=(0, 1))))
register("Greater Less GreaterOrEqual LessOrEqual", _pointwise(BINARY, NEVER))
register("Where", _pointwise(MANY, Zero(all_of=(1, 2))))
register("Sum Max Min Mean", _pointwise(MANY, Zero(all_of="all")))

register("FastGelu BiasGelu", _pointwise("... c, c -> ... c", Zero(all_of=(0, 1))), domain="com.microsoft")
register("Gelu QuickGelu", _pointwise(UNARY, FACTOR), domain="com.microsoft")
register("BiasAdd", _pointwise("... c, c, ... c -> ... c", Zero(all_of=(0, 1, 2))), domain="com.microsoft")
