"""Operators that act on each position by itself, with numpy broadcasting: every dimension passes."""

from __future__ import annotations

from spa.rules.base import FACTOR, NEVER, Rule, Zero, register
from spa.rules.notation import einsum

UNARY = "... -> ..."
BINARY = "..., ... -> ..."
MANY = "..., ..., ... -> ..."


def _pointwise(text: str, zero: Zero, divisors: tuple[int, ...] = ()) -> Rule:
    rule = einsum(text, zero=zero)
    return Rule(rule.apply, rule.text, zero, divisors, combines="," in text)


# f(0) = 0: a channel whose weights are zero stays zero
register(
    "Relu LeakyRelu Elu Selu Celu ThresholdedRelu Tanh Erf Gelu HardSwish Mish Swish Softsign Shrink Sin Tan Asin Atan "
    "Sinh Asinh Atanh Sqrt Abs Neg Sign Floor Ceil Round Identity Cast BitwiseNot",
    _pointwise(UNARY, FACTOR),
)
# f(0) != 0, or it depends on attributes
register("Sigmoid HardSigmoid Softplus Exp Cos Cosh Acos Acosh Not IsNaN IsInf Bernoulli", _pointwise(UNARY, NEVER))
register("Reciprocal Log", _pointwise(UNARY, NEVER, divisors=(0,)))
register("Dropout", _pointwise("..., ~, ~ -> ..., ...", FACTOR))
register("Clip", _pointwise("..., ~, ~ -> ...", NEVER))
register("CastLike", _pointwise("..., ~ -> ...", FACTOR))

register("Add Sub", _pointwise(BINARY, Zero(all_of=(0, 1))))
register("Mul And BitwiseAnd", _pointwise(BINARY, Zero(any_of=(0, 1))))
register("Div", _pointwise(BINARY, FACTOR, divisors=(1,)))
register("Pow", _pointwise(BINARY, FACTOR))
register("Mod BitShift", _pointwise(BINARY, FACTOR, divisors=(1,)))
register("PRelu", _pointwise(BINARY, FACTOR))
register("Or Xor BitwiseOr BitwiseXor", _pointwise(BINARY, Zero(all_of=(0, 1))))
register("Equal Greater Less GreaterOrEqual LessOrEqual", _pointwise(BINARY, NEVER))
register("Where", _pointwise(MANY, Zero(all_of=(1, 2))))
register("Sum Max Min Mean", _pointwise(MANY, Zero(all_of="all")))

register("FastGelu BiasGelu", _pointwise("... c, c -> ... c", Zero(all_of=(0, 1))), domain="com.microsoft")
register("Gelu QuickGelu", _pointwise(UNARY, FACTOR), domain="com.microsoft")
register("BiasAdd", _pointwise("... c, c, ... c -> ... c", Zero(all_of=(0, 1, 2))), domain="com.microsoft")
