"""Sizes that depend on the inputs, as Python: what a model computes with twenty nodes is `batch * 12` here.

`spa.shapes` knows integers of a graph as expressions of the inputs' axes. They are written down by evaluating them
with texts in place of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import onnx_ir as ir

from spa.shapes.infer import Shapes
from spa.symbols import Size, Sym, bind

_SUM, _PRODUCT, _ATOM = range(3)


class Text:
    """Python for a number, with how tightly it binds."""

    def __init__(self, text: str, level: int = _ATOM) -> None:
        self.text = text
        self.level = level

    def at(self, level: int) -> str:
        """Its text where something of `level` is expected."""
        return self.text if self.level >= level else f"({self.text})"

    def __mul__(self, other: Text | int) -> Text:
        if isinstance(other, int):
            if other == 1:
                return self
            return Text(f"-{self.at(_ATOM)}" if other == -1 else f"{other} * {self.at(_PRODUCT)}", _PRODUCT)
        return Text(f"{self.at(_PRODUCT)} * {other.at(_PRODUCT)}", _PRODUCT)

    __rmul__ = __mul__

    def __add__(self, other: Text | int) -> Text:
        if isinstance(other, int):
            if not other:
                return self
            return Text(f"{self.text} {'-' if other < 0 else '+'} {abs(other)}", _SUM)
        if other.text.startswith("-"):
            return Text(f"{self.text} - {other.text[1:]}", _SUM)
        return Text(f"{self.text} + {other.text}", _SUM)

    def __radd__(self, other: int) -> Text:
        if not other:
            return self
        return self + other if other < 0 else Text(f"{other} + {self.text}".replace("+ -", "- "), _SUM)

    def __floordiv__(self, other: Text | int) -> Text:
        return Text(f"{self.at(_PRODUCT)} // {_at(other)}", _PRODUCT)

    def __rfloordiv__(self, other: int) -> Text:
        return Text(f"{other} // {self.at(_ATOM)}", _PRODUCT)

    def __mod__(self, other: Text | int) -> Text:
        return Text(f"{self.at(_PRODUCT)} % {_at(other)}", _PRODUCT)

    def __rmod__(self, other: int) -> Text:
        return Text(f"{other} % {self.at(_ATOM)}", _PRODUCT)


def _at(other: Text | int) -> str:
    return other.at(_ATOM) if isinstance(other, Text) else str(other) if other >= 0 else f"({other})"


class Sizes:
    """Which symbols have a name in the code so far."""

    def __init__(self, facts: Shapes) -> None:
        self._facts = facts
        self._known: dict[str, Text] = {}

    def shape(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """Dims of a value, None if its rank is unknown."""
        return None if value is None else self._facts.shape(value)

    def offer(self, value: ir.Value, variable: str) -> None:
        """From now on the sizes of `value` can be read off `variable`."""
        for axis, size in enumerate(self._facts.shape(value) or ()):
            name = plain(size)
            if name is not None:
                self._known.setdefault(name, Text(f"{variable}.shape[{axis}]"))

    def name(self, symbol: str, variable: str) -> None:
        """`variable` holds the size called `symbol`."""
        self._known[symbol] = Text(variable)

    def text(self, size: Size) -> str | None:
        """Python for a size, None if something in it has no name yet."""
        if isinstance(size, bool | int):
            return str(int(size))
        try:
            found = bind(size, cast("Mapping[str, int]", self._known))  # texts for numbers
        except TypeError:  # min and max compare
            return None
        return None if found is None else cast("Any", found).text

    def fixed(self, value: ir.Value) -> float | None:
        """One float that is the same whatever the inputs are (the square root of a head's size), None for others."""
        known, kind = self._facts.const(value), self._facts.dtype(value)
        if known is None or known.size != 1 or known.ndim or kind not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return None
        return float(known)

    def items(self, value: ir.Value) -> tuple[list[str], int] | None:
        """The numbers of a small integer value, and its rank (0 or 1); None if one of them is not known."""
        known = self._facts.const(value)
        kind = self._facts.dtype(value)
        if known is None or known.ndim > 1 or kind is None or not (kind.is_integer() or kind == ir.DataType.BOOL):
            return None
        texts = [None if item is None else self.text(item) for item in known.reshape(-1).tolist()]
        if any(t is None for t in texts):
            return None
        if kind == ir.DataType.BOOL:
            texts = [{"0": "False", "1": "True"}.get(t or "") for t in texts]
        return None if None in texts else ([t for t in texts if t is not None], known.ndim)


def plain(size: Size) -> str | None:
    """The symbol that a size is, None if it is a number or an expression."""
    if not isinstance(size, Sym) or size.coefficient != 1 or len(size.names) != 1 or len(size.free) != 1:
        return None
    (name,) = size.free
    return name if size.names[0] in (name, repr(name)) else None
