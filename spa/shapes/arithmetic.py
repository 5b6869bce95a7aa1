"""Exact arithmetic on the items of small known values: numbers, symbols, None for unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from spa.shapes.op import BOOL, FLOATS, INTS, Item
from spa.symbols import Size, Sym, exact_div, low, maximum, minimum

Binary: TypeAlias = Callable[[Item, Item], Item]
Unary: TypeAlias = Callable[[Item], Item]

_RANGE = {
    getattr(ir.DataType, name): (low, high)
    for name, low, high in [
        *[(f"INT{n}", -(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)],
        *[(f"UINT{n}", 0, 2**n - 1) for n in (8, 16, 32, 64)],
    ]
}
_WIDE = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE))
"""Types that hold every size exactly (in single precision: below 2**24)."""


def fit(item: Item, dtype: ir.DataType) -> Item:
    """The item as an element of `dtype`, None where the type cannot hold it exactly as the runtime would."""
    if item is None:
        return None
    if isinstance(item, Sym):
        return item if dtype in _WIDE else None
    if dtype in FLOATS:
        return _rounded(float(item), dtype)
    if dtype == BOOL:
        return bool(item)
    if not isinstance(item, int) or dtype not in _RANGE:
        return None
    bottom, top = _RANGE[dtype]
    return int(item) if bottom <= item <= top else None


def _rounded(item: float, dtype: ir.DataType) -> Item:
    if math.isnan(item):
        return None
    with np.errstate(over="ignore"):
        return item if dtype == ir.DataType.DOUBLE else float(dtype.numpy().type(item))


def cast(item: Item, dtype: ir.DataType) -> Item:
    """Cast to another type."""
    if isinstance(item, Sym) and dtype == BOOL:
        bottom = low(item)
        return True if bottom is not None and bottom > 0 else None
    if isinstance(item, float) and dtype in INTS and dtype != BOOL:
        return fit(int(item), dtype) if math.isfinite(item) else None
    return fit(item, dtype)


def _sizes(a: Item, b: Item) -> tuple[Size, Size] | None:
    """Both as sizes if one is a symbol; None if that is impossible."""
    left, right = _whole(a), _whole(b)
    return None if left is None or right is None else (left, right)


def _whole(item: Item) -> Size | None:
    if isinstance(item, float):
        return int(item) if item.is_integer() else None
    return item


def add(a: Item, b: Item) -> Item:
    """a + b."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else pair[0] + pair[1]
    return None if a is None or b is None else a + b


def sub(a: Item, b: Item) -> Item:
    """a - b."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else pair[0] - pair[1]
    return None if a is None or b is None else a - b


def mul(a: Item, b: Item) -> Item:
    """a * b."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else pair[0] * pair[1]
    return None if a is None or b is None else a * b


def int_div(a: Item, b: Item) -> Item:
    """Division of integers rounds towards zero."""
    if not isinstance(a, int | Sym) or not isinstance(b, int | Sym) or b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    if (exact := exact_div(a, b)) is not None:
        return exact
    bottom_a, bottom_b = low(a), low(b)
    return a // b if bottom_a is not None and bottom_a >= 0 and bottom_b is not None and bottom_b > 0 else None


def float_div(a: Item, b: Item) -> Item:
    """Division of floats; symbols only if it is exact."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else exact_div(*pair)
    return None if a is None or b is None or b == 0 else a / b


def mod(a: Item, b: Item) -> Item:
    """The sign follows the divisor."""
    if not isinstance(a, int | Sym) or not isinstance(b, int | Sym) or b == 0:
        return None
    return a % b


def fmod(a: Item, b: Item) -> Item:
    """The sign follows the dividend."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        bottom = low(a) if isinstance(a, int | Sym) else None
        return mod(a, b) if bottom is not None and bottom >= 0 else None
    if a is None or b is None or b == 0:
        return None
    rest = math.fmod(a, b)
    return int(rest) if isinstance(a, int) else rest


def power(a: Item, b: Item) -> Item:
    """a ** b where it is a real number."""
    exponent = _whole(b)
    if isinstance(a, Sym):
        return 1 if exponent == 0 else a if exponent == 1 else a * a if exponent == 2 else None
    if a is None or b is None or isinstance(b, Sym) or (a <= 0 and (b < 0 or exponent is None)):
        return None
    if isinstance(a, int) and b < 0:
        return None
    return a ** (exponent if isinstance(exponent, int) else b)


def smaller(a: Item, b: Item) -> Item:
    """Minimum."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else minimum(*pair)
    return None if a is None or b is None else min(a, b)


def larger(a: Item, b: Item) -> Item:
    """Maximum."""
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else maximum(*pair)
    return None if a is None or b is None else max(a, b)


# --- comparisons: True, False or None where the symbols do not tell ---------------------------------------------------


def _gap(a: Item, b: Item) -> tuple[int | None, int | None] | None:
    """Lower bounds of a - b and b - a."""
    if a is None or b is None:
        return None
    if isinstance(a, Sym) or isinstance(b, Sym):
        pair = _sizes(a, b)
        return None if pair is None else (low(pair[0] - pair[1]), low(pair[1] - pair[0]))
    sign = (a > b) - (a < b)
    return sign, -sign


def equal(a: Item, b: Item) -> Item:
    """a == b."""
    gap = _gap(a, b)
    if gap is None:
        return None
    if gap == (0, 0):
        return True
    return False if any(g is not None and g > 0 for g in gap) else None


def greater(a: Item, b: Item) -> Item:
    """a > b."""
    gap = _gap(a, b)
    if gap is None:
        return None
    if gap[0] is not None and gap[0] > 0:
        return True
    return False if gap[1] is not None and gap[1] >= 0 else None


def less(a: Item, b: Item) -> Item:
    """a < b."""
    return greater(b, a)


def at_least(a: Item, b: Item) -> Item:
    """a >= b."""
    return negated(greater(b, a))


def at_most(a: Item, b: Item) -> Item:
    """a <= b."""
    return negated(greater(a, b))


def negated(item: Item) -> Item:
    """Logical not."""
    return None if item is None else not item


def both(a: Item, b: Item) -> Item:
    """Logical and."""
    if a is False or b is False:
        return False
    return None if a is None or b is None else bool(a and b)


def either(a: Item, b: Item) -> Item:
    """Logical or."""
    if a is True or b is True:
        return True
    return None if a is None or b is None else bool(a or b)


def differs(a: Item, b: Item) -> Item:
    """Logical exclusive or."""
    return None if a is None or b is None else bool(a) != bool(b)


# --- one operand -----------------------------------------------------------------------------------------------------


def negative(item: Item) -> Item:
    """-a."""
    return None if item is None else -item


def absolute(item: Item) -> Item:
    """|a|."""
    if isinstance(item, Sym):
        bottom = low(item)
        return item if bottom is not None and bottom >= 0 else None
    return None if item is None else abs(item)


def _on_numbers(function: Callable[[float], float]) -> Unary:
    """Whole numbers, and so symbols, stay as they are."""

    def apply(item: Item) -> Item:
        if item is None or isinstance(item, Sym):
            return item
        return function(item) if math.isfinite(item) else item

    return apply


floor = _on_numbers(math.floor)
ceil = _on_numbers(math.ceil)
nearest = _on_numbers(round)


def root(item: Item) -> Item:
    """Square root."""
    return None if item is None or isinstance(item, Sym) or item < 0 else math.sqrt(item)


def inverse(item: Item) -> Item:
    """1 / a."""
    return float_div(1.0, item)


def sign(item: Item) -> Item:
    """-1, 0 or 1."""
    if isinstance(item, Sym):
        bottom = low(item)
        return 1 if bottom is not None and bottom > 0 else None
    return None if item is None else (item > 0) - (item < 0)


def positive(item: Item) -> Item:
    """max(a, 0)."""
    return larger(item, 0)
