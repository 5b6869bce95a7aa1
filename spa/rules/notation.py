"""The one-line notation of rules, parsed once.

    b (g i) ~, (g o) i ~, (g o) -> b (g o) ~

Operands are separated by commas, inputs from outputs by `->`. Each operand lists its dimensions:

    name     an index space; equal names are one space, in all operands
    (a b)    the row-major product of spaces
    4        a constant: this dimension, or this factor of a product, is never pruned
    ...      leading dimensions shared by all operands that have it, right-aligned, with broadcasting
    ~        remaining dimensions that the operator reads as a whole (space, time): never pruned

A name that is missing from the outputs is contracted: by addition unless the rule says otherwise. A dimension of size 1
where the name is larger is broadcast and not part of the space. Trailing optional operands may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from spa.axes import Axis
from spa.rules.base import Leaving, Op, Operand, Rule, Zero
from spa.symbols import Size, exact_div, product

_TOKEN = re.compile(r"\(([^()]*)\)|(\.\.\.)|(~)|([A-Za-z_]\w*|\d+)")


@dataclass(frozen=True)
class Attr:
    """A size that stands in an attribute, and is written back with the surviving size."""

    name: str
    default: int | None = None


@dataclass(frozen=True)
class Notation:
    """A parsed line: per operand its dimensions, each a tuple of factor names, or the strings "..." and "~"."""

    inputs: tuple[tuple[tuple[str, ...] | str, ...], ...]
    outputs: tuple[tuple[tuple[str, ...] | str, ...], ...]


@cache
def parse(text: str) -> Notation:
    """Parse a notation line; raises ValueError with the offending operand."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"notation without '->': {text!r}")
    return Notation(*(tuple(_operand(part) for part in side.split(",")) for side in (left, right)))


def _operand(text: str) -> tuple[tuple[str, ...] | str, ...]:
    if _TOKEN.sub("", text).strip():
        raise ValueError(f"cannot read operand {text!r}")
    dims: list[tuple[str, ...] | str] = []
    for group, dots, tilde, name in _TOKEN.findall(text):
        dims.append(dots or tilde or (tuple(group.split()) if group else (name,)))
    if sum(isinstance(d, str) for d in dims) > 1:
        raise ValueError(f"more than one '...' or '~' in {text!r}")
    return tuple(dims)


@dataclass(frozen=True)
class Einsum:
    """A rule in notation; calling it states the relations of a node."""

    text: str
    sizes: Mapping[str, Attr | int] = field(default_factory=dict)
    """Factor sizes that only an attribute tells."""
    leaving: Mapping[str, Leaving] = field(default_factory=dict)
    """How names leave if not by plain passing or summing; the name "..." stands for the shared leading dimensions."""
    macs: str = ""
    """Space-separated names whose product is the cost; `~0` are the `~` dimensions of input 0, `~y` of the output."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Unit kinds of names (h -> head)."""

    def __call__(self, op: Op) -> None:
        """State the relations of `op`."""
        self.bind(op)

    def bind(self, op: Op) -> dict[str, Axis]:
        """State the relations of `op` and return the axis of each name (nothing if the node does not match)."""
        bound = _Bound(self, op)
        bound.run()
        return {} if bound.failed else bound.axis


def einsum(
    text: str,
    *,
    zero: Zero | None = None,
    leaving: Mapping[str, Leaving] | None = None,
    macs: str = "",
    roles: Mapping[str, str] | None = None,
    sizes: Mapping[str, Attr | int] | None = None,
    points: Mapping[int, int] | None = None,
) -> Rule:
    """A rule from one line of notation."""
    parse(text)
    apply = Einsum(text, sizes or {}, leaving or {}, macs, roles or {})
    return Rule(apply, text, zero or Zero(any_of=(0, 1), all_of=(2,)), points=points or {})


class _Bound:
    """One node matched against a notation line."""

    def __init__(self, rule: Einsum, op: Op) -> None:
        self.rule = rule
        self.op = op
        notation = parse(rule.text)
        self.pairs: list[tuple[bool, int, Operand, list[tuple[str, ...] | str]]] = []
        self.failed = ""
        for is_input, terms, operands in ((True, notation.inputs, op.inputs), (False, notation.outputs, op.outputs)):
            for slot, operand in enumerate(operands):
                if operand is None:
                    continue
                if slot >= len(terms) and is_input and terms[-1] == ("...",):
                    self._match(is_input, slot, operand, terms[-1])
                elif slot >= len(terms):
                    self.failed = (
                        f"the rule of {op.node.op_type} does not cover {'input' if is_input else 'output'} {slot}"
                    )
                else:
                    self._match(is_input, slot, operand, terms[slot])
        self.axis: dict[str, Axis] = {}
        self.carriers: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}

    def _match(self, is_input: bool, slot: int, operand: Operand, terms: tuple[tuple[str, ...] | str, ...]) -> None:
        """Give every dimension a term; `...` and `~` stretch to the rank."""
        if not operand.dims:
            self.pairs.append((is_input, slot, operand, []))
            return
        free = len(operand.dims) - sum(not isinstance(t, str) for t in terms)
        stretch = any(isinstance(t, str) for t in terms)
        if free < 0 or (free > 0 and not stretch):
            self.failed = (
                f"{operand.value.name} has rank {len(operand.dims)}, which {self.op.node.op_type} does not take"
            )
            return
        expanded: list[tuple[str, ...] | str] = []
        for term in terms:
            if term == "...":
                expanded.extend((f"...{free - k}",) for k in range(free))
            elif isinstance(term, str):
                expanded.extend("~" for _ in range(free))
            else:
                expanded.append(term)
        self.pairs.append((is_input, slot, operand, expanded))

    def run(self) -> None:
        """State all relations, or freeze everything if the node does not fit."""
        if not self.failed:
            self._sizes()
        if self.failed:
            self.op.freeze_all(self.failed)
            return
        for is_input, slot, operand, terms in self.pairs:
            for d, term in enumerate(terms):
                self._relate(is_input, slot, d, operand, term)
        for name, (inputs, outputs) in self.carriers.items():
            self._flow(name, inputs, outputs)
        for name, attr in self.rule.sizes.items():
            if isinstance(attr, Attr) and name in self.axis and self._editable(attr):
                self.op.edit(attr.name, None, self.axis[name])
        for term in filter(None, self.rule.macs.split(",")):
            self._cost(term.split())

    def _editable(self, attr: Attr) -> bool:
        return attr.name in self.op.node.attributes or attr.default is not None

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _sizes(self) -> None:
        """Find the size of every name: from attributes, from plain dimensions, then by division in products."""
        known: dict[str, Size] = {}
        for name, attr in self.rule.sizes.items():
            value = self.op.attr(attr.name, attr.default) if isinstance(attr, Attr) else attr
            if value is not None:
                known[name] = int(value)
        products: list[tuple[tuple[str, ...], Size]] = []
        for _, _, operand, terms in self.pairs:
            for term, size in zip(terms, operand.shape, strict=True):
                if isinstance(term, str):
                    continue
                if len(term) == 1 and not term[0].isdigit():
                    if known.get(term[0], 1) == 1:
                        known[term[0]] = size
                elif len(term) > 1:
                    products.append((term, size))
        self.known = known
        for _ in range(len(products) + 1):
            products = [p for p in products if not self._divide(*p)]
        if products and not self.failed:
            self.failed = f"{self.op.node.op_type} does not tell how {' x '.join(products[0][0])} divide"

    def _divide(self, term: tuple[str, ...], size: Size) -> bool:
        """Solve a product with one unknown factor; True if it is settled."""
        unknown = [n for n in dict.fromkeys(term) if not n.isdigit() and n not in self.known]
        if size == 1 and not unknown:
            return True
        if len(unknown) > 1:
            return False
        rest = product(int(n) if n.isdigit() else self.known[n] for n in term if n not in unknown)
        quotient = exact_div(size, rest)
        if unknown and quotient is not None:
            self.known[unknown[0]] = quotient
        elif quotient is None or (not unknown and quotient != 1 and size != 1):
            self.failed = f"{self.op.node.op_type} cannot divide {size} into {' x '.join(term)}"
        return True

    # -- relations ---------------------------------------------------------------------------------------------------

    def _name(self, name: str) -> Axis:
        axis = self.axis.get(name)
        if axis is None:
            axis = self.op.axes.leaf(self.known[name])
            self.axis[name] = axis
        return axis

    def _relate(self, is_input: bool, slot: int, d: int, operand: Operand, term: tuple[str, ...] | str) -> None:
        axes, dim, size = self.op.axes, operand.dims[d], operand.shape[d]
        if isinstance(term, str):
            if size != 1:
                self.op.freeze(dim, f"{self.op.node.op_type} reads this axis as a whole")
            return
        names = [n for n in term if not n.isdigit()]
        total = product(int(n) if n.isdigit() else self.known[n] for n in term)
        if size == 1 and total != 1:
            return
        if size != total:
            self.op.freeze(dim, f"broadcast against an axis of unknown size in {self.op.node.op_type}")
            for n in names:
                self.op.freeze(self._name(n), f"broadcast against an axis of unknown size in {self.op.node.op_type}")
            return
        factors = []
        for n in term:
            if n.isdigit():
                constant = axes.leaf(int(n))
                self.op.freeze(constant, f"{self.op.node.op_type} has a fixed layout here")
                factors.append(constant)
            else:
                factors.append(self._name(n))
        axes.prod(dim, factors)
        for n in names:
            self.carriers.setdefault(n, ([], []))[0 if is_input else 1].append((slot, d))

    def _flow(self, name: str, inputs: list[tuple[int, int]], outputs: list[tuple[int, int]]) -> None:
        default: Leaving = "pass" if outputs else "sum"
        key = "..." if name.startswith("...") else name
        leaving = self.rule.leaving.get(key, default)
        self.op.flow(self.axis[name], inputs, outputs, leaving, self.rule.roles.get(key, ""))

    def _cost(self, names: list[str]) -> None:
        axes: list[Axis] = []
        coefficient = 1
        for name in names:
            if name.isdigit():
                coefficient *= int(name)
            elif name.startswith("~"):
                axes.extend(self._rest(name[1:]))
            elif name == "...":
                axes.extend(axis for n, axis in self.axis.items() if n.startswith("..."))
            elif name in self.axis:
                axes.append(self.axis[name])
        self.op.cost(*axes, coefficient=coefficient)

    def _rest(self, which: str) -> list[Axis]:
        """The `~` dimensions of input number `which`, or of the first output for "y"."""
        for is_input, slot, operand, terms in self.pairs:
            if is_input == (which != "y") and slot == (0 if which == "y" else int(which)):
                return [dim for dim, term in zip(operand.dims, terms, strict=True) if term == "~"]
        return []
