"""What a shape rule sees: a node, the shapes and known values of its inputs, and a registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.symbols import Size, Sym, fresh, low

Shape: TypeAlias = tuple[Size, ...]
Item: TypeAlias = int | float | Sym | None
"""An element of a known value; None: unknown."""

MOST_INTS = 4096
MOST_FLOATS = 64
_MOST_UNKNOWN = 64

_T = ir.DataType
INTS = frozenset((_T.INT64, _T.INT32, _T.INT16, _T.INT8, _T.UINT64, _T.UINT32, _T.UINT16, _T.UINT8, _T.BOOL))
FLOATS = frozenset((_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16))
BOOL = ir.DataType.BOOL


class Const:
    """A small known value: row-major items. Items of float tensors may be symbols that stand for whole numbers."""

    __slots__ = ("dims", "dtype", "items")

    def __init__(self, dims: tuple[int, ...], items: list[Any], dtype: ir.DataType) -> None:
        self.dims = dims
        self.items = items
        self.dtype = dtype

    def like(self, items: list[Any]) -> Const:
        """Same shape and type, other items."""
        return Const(self.dims, items, self.dtype)

    def array(self) -> NDArray[Any]:
        """As an object array."""
        flat = np.empty(len(self.items), dtype=object)
        flat[:] = self.items
        return flat.reshape(self.dims)

    @staticmethod
    def of(array: NDArray[Any], dtype: ir.DataType) -> Const:
        """From an array of any kind."""
        return Const(array.shape, array.reshape(-1).tolist(), dtype)

    def unknown(self) -> bool:
        """Whether nothing is known."""
        return all(item is None for item in self.items)

    def static(self) -> bool:
        """Whether every item is a plain number."""
        return not any(item is None or isinstance(item, Sym) for item in self.items)


def fits(count: int, dtype: ir.DataType | None) -> bool:
    """Whether a tensor is of a kind and size whose value is followed."""
    return (count <= MOST_INTS and dtype in INTS) or (count <= MOST_FLOATS and dtype in FLOATS)


class Facts(Protocol):
    """What is known so far about the values of a model."""

    def shape(self, value: ir.Value) -> Shape | None:
        """Its shape, None if the rank is unknown."""

    def known(self, value: ir.Value) -> Const | None:
        """Its value."""

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Its element type."""

    def number(self) -> int:
        """A number never returned before."""


class Op:
    """A node with what is known about its inputs."""

    __slots__ = ("dtypes", "facts", "inputs", "node", "outs", "shapes", "version")

    def __init__(self, node: ir.Node, facts: Facts, version: int) -> None:
        self.node = node
        self.facts = facts
        self.version = version
        self.inputs = node.inputs
        self.shapes = [None if value is None else facts.shape(value) for value in node.inputs]
        self.dtypes: list[ir.DataType | None] = []
        """Element types of the outputs, filled in before values are computed."""
        self.outs: list[Shape | None] = []
        """Shapes of the outputs, filled in before values are computed."""

    def has(self, slot: int) -> bool:
        """Whether the input is given."""
        return slot < len(self.inputs) and self.inputs[slot] is not None

    def shape(self, slot: int = 0) -> Shape | None:
        """Shape of an input, None if it is absent or its rank is unknown."""
        return self.shapes[slot] if slot < len(self.shapes) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of an attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None or attribute.is_ref() else attribute.value

    def dtype(self, slot: int = 0) -> ir.DataType | None:
        """Element type of an input."""
        value = self.inputs[slot] if slot < len(self.inputs) else None
        return None if value is None else self.facts.dtype(value)

    def const(self, slot: int = 0) -> Const | None:
        """The known value of an input; a short integer list of which nothing is known has unknown items."""
        value = self.inputs[slot] if slot < len(self.inputs) else None
        if value is None:
            return None
        known = self.facts.known(value)
        if known is None:
            shape = self.shapes[slot]
            if shape is not None and len(shape) <= 1 and self.facts.dtype(value) in INTS:
                count = shape[0] if shape else 1
                if isinstance(count, int) and count <= _MOST_UNKNOWN:
                    return Const((count,) if shape else (), [None] * count, self.facts.dtype(value) or BOOL)
        return known

    def items(self, slot: int, attribute: str | None = None) -> list[Item] | None:
        """Items of an integer input, or of the attribute that held them in an older opset."""
        if attribute is not None and (value := self.attr(attribute)) is not None:
            return [value] if isinstance(value, int | float) else list(value)
        known = self.const(slot)
        return None if known is None else known.items

    def ints(self, slot: int, attribute: str | None = None) -> list[int] | None:
        """As `items`, None unless all are plain integers."""
        items = self.items(slot, attribute)
        return None if items is None or not all(type(i) is int for i in items) else items  # type: ignore[return-value]  # just checked

    def fresh(self, bottom: int | None = 0) -> Sym:
        """A new unknown size."""
        return fresh(self.facts.number(), bottom)

    def unknown(self, rank: int) -> Shape:
        """A shape of which only the rank is known."""
        return tuple(self.fresh() for _ in range(rank))

    def size(self, item: Item) -> Size:
        """An item used as a size: itself if it cannot be negative, else unknown."""
        if isinstance(item, int | Sym) and (bottom := low(item)) is not None and bottom >= 0:
            return int(item) if isinstance(item, int) else item
        return self.fresh()


Result: TypeAlias = Shape | list[Shape | None] | None
"""The shape of the only output, or one per output."""
ShapeRule: TypeAlias = Callable[[Op], Result]
ValueRule: TypeAlias = Callable[[Op], "Const | list[Const | None] | None"]
Key: TypeAlias = tuple[str, str]
"""Domain and operator."""


class Table(dict[Key, Callable[[Op], Any]]):
    """Rules by domain and operator; a module fills its own table while it is defined."""

    def rule(self, operators: str, domain: str = "") -> Callable[[Callable[[Op], Any]], Callable[[Op], Any]]:
        """Decorate the rule of some operators."""

        def enter(function: Callable[[Op], Any]) -> Callable[[Op], Any]:
            self.add(operators, function, domain)
            return function

        return enter

    def add(self, operators: str, function: Callable[[Op], Any], domain: str = "") -> None:
        """Enter the rule of some operators."""
        for name in operators.split():
            self[domain, name] = function


def merge(a: Size, b: Size) -> Size:
    """One of two sizes that must be equal: a number, or the symbol that says more."""
    if a == b or isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    return b if any(name.startswith("?") for name in a.free) else a


def axis_of(axis: int, rank: int) -> int | None:
    """A non-negative axis, None if it is out of range."""
    axis = axis + rank if axis < 0 else axis
    return axis if 0 <= axis < rank else None


def count_of(dims: Sequence[int]) -> int:
    """Number of elements."""
    return prod(dims)


def static(shape: Iterable[Size] | None) -> tuple[int, ...] | None:
    """The shape if it is all numbers."""
    if shape is None:
        return None
    dims = tuple(shape)
    return dims if all(isinstance(d, int) for d in dims) else None  # type: ignore[return-value]  # just checked
