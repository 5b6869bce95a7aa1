"""Exact arithmetic of axis sizes: integers and products of unknown sizes.

A `Sym` is a coefficient times a sorted tuple of atoms, for instance 12*N*S. Multiplication and exact division stay
inside this form. Every other result (S + 1, S // 2, min(S, 512)) becomes one *opaque* atom that is named after its
normalised expression: equal expressions give equal symbols, and `bind` can still evaluate them. Nothing is stored
globally.

Assumption: the size behind a named symbol is at least 1. What else is known about a sign is asked with `low`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from math import gcd
from typing import TypeAlias, TypeGuard, Union

__all__ = [
    "Size",
    "Sym",
    "bind",
    "broadcast",
    "coefficient",
    "divides",
    "exact_div",
    "fresh",
    "is_static",
    "low",
    "maximum",
    "minimum",
    "opaque",
    "product",
    "symbol",
]

Size: TypeAlias = Union[int, "Sym"]

_PLAIN = re.compile(r"[A-Za-z_][\w.]*")
_LONGEST = 160


class _Atom:
    """One unknown number: a named size, or an opaque expression of other sizes."""

    __slots__ = ("args", "bottom", "free", "key", "name", "op")

    def __init__(self, key: str, bottom: int | None, name: str = "", op: str = "", args: tuple[Size, ...] = ()) -> None:
        self.key = key
        self.bottom = bottom
        self.name = name
        self.op = op
        self.args = args
        self.free: frozenset[str] | None = None
        """Filled in when first asked for: an expression shares its parts, and may have exponentially many paths."""


class Sym:
    """An immutable product `coefficient * atoms`; at least one atom, coefficient not 0."""

    __slots__ = ("_atoms", "_coefficient", "_hash", "_names")

    def __init__(self, coefficient: int, names: tuple[str, ...], atoms: tuple[_Atom, ...]) -> None:
        self._coefficient = coefficient
        self._names = names
        self._atoms = atoms
        self._hash = 0

    @property
    def coefficient(self) -> int:
        """The integer factor."""
        return self._coefficient

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted names of the atoms, with repetition."""
        return self._names

    @property
    def free(self) -> frozenset[str]:
        """The plain symbols in it, also those inside opaque expressions."""
        return frozenset(n for atom in self._atoms for n in _free(atom))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Sym) and self._coefficient == other._coefficient and self._names == other._names

    def __hash__(self) -> int:
        if not self._hash:
            self._hash = hash((self._coefficient, self._names))
        return self._hash

    def __repr__(self) -> str:
        text = "*".join(self._names)
        return text if self._coefficient == 1 else f"{self._coefficient}*{text}"

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, int):
            return Sym(self._coefficient * other, self._names, self._atoms) if other else 0
        return _monomial(self._coefficient * other._coefficient, self._atoms + other._atoms)

    __rmul__ = __mul__

    def __neg__(self) -> Sym:
        return Sym(-self._coefficient, self._names, self._atoms)

    def __add__(self, other: Size) -> Size:
        return _add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        return _add(self, -other)

    def __rsub__(self, other: Size) -> Size:
        return _add(-self, other)

    def __floordiv__(self, other: Size) -> Size:
        return _floordiv(self, other)

    def __rfloordiv__(self, other: Size) -> Size:
        return _floordiv(other, self)

    def __mod__(self, other: Size) -> Size:
        return _mod(self, other)

    def __rmod__(self, other: Size) -> Size:
        return _mod(other, self)


# --- making symbols --------------------------------------------------------------------------------------------------


def symbol(name: str) -> Sym:
    """The unknown size called `name`, at least 1; equal names are equal sizes."""
    key = name if _PLAIN.fullmatch(name) else repr(name)
    return Sym(1, (key,), (_Atom(key, 1, name),))


def fresh(number: int, bottom: int | None = 0) -> Sym:
    """An unknown about which nothing is known but `bottom <= value`; a number must be used once per analysis."""
    key = f"?{number}"
    return Sym(1, (key,), (_Atom(key, bottom, key),))


def opaque(op: str, *args: Size, bottom: int | None = 0) -> Sym:
    """The unknown `op(args)`: equal arguments give an equal symbol, `bind` knows only the operators of this module."""
    text = f"{op}({','.join(map(repr, args))})"
    return _opaque(text, bottom, op, args)


def _opaque(text: str, bottom: int | None, op: str, args: tuple[Size, ...]) -> Sym:
    if len(text) > _LONGEST:
        text = f"{op}(#{blake2b(text.encode(), digest_size=12).hexdigest()})"
    return Sym(1, (text,), (_Atom(text, bottom, "", op, args),))


def _key(atom: _Atom) -> str:
    return atom.key


def _monomial(factor: int, atoms: Sequence[_Atom]) -> Size:
    if not atoms or not factor:
        return factor
    ordered = tuple(sorted(atoms, key=_key))
    return Sym(factor, tuple([atom.key for atom in ordered]), ordered)


def _free(atom: _Atom) -> frozenset[str]:
    if atom.free is None:
        inner = (n for arg in atom.args if isinstance(arg, Sym) for n in arg.free)
        atom.free = frozenset(inner) if atom.op else frozenset((atom.name,))
    return atom.free


# --- questions -------------------------------------------------------------------------------------------------------


def is_static(size: Size) -> TypeGuard[int]:
    """Whether the size is a plain number."""
    return isinstance(size, int)


def coefficient(size: Size) -> int:
    """The known integer factor."""
    return size if isinstance(size, int) else size._coefficient


def low(size: Size) -> int | None:
    """A number that the size is never below, None if it may be negative without limit."""
    if isinstance(size, int):
        return size
    bottom = size._coefficient
    if bottom < 0:
        return None
    for atom in size._atoms:
        if atom.bottom is None or atom.bottom < 0:
            return atom.bottom if bottom == 1 and len(size._atoms) == 1 else None
        bottom *= atom.bottom
    return bottom


def exact_div(a: Size, b: Size) -> Size | None:
    """a / b if b provably divides a, else None."""
    if isinstance(b, int):
        if b == 0:
            return None
        if isinstance(a, int):
            return None if a % b else a // b
        return None if a._coefficient % b else Sym(a._coefficient // b, a._names, a._atoms)
    if isinstance(a, int):
        return None if a else 0
    if a._coefficient % b._coefficient:
        return None
    if a._names == b._names:
        return a._coefficient // b._coefficient
    rest = _without(a._atoms, b._names)
    return None if rest is None else _monomial(a._coefficient // b._coefficient, rest)


def divides(a: Size, b: Size) -> bool:
    """Whether `a` provably divides `b`."""
    return exact_div(b, a) is not None


def product(sizes: Iterable[Size]) -> Size:
    """The exact product, 1 if there are none."""
    factor = 1
    atoms: list[_Atom] = []
    for size in sizes:
        if isinstance(size, int):
            factor *= size
        else:
            factor *= size._coefficient
            atoms.extend(size._atoms)
    return _monomial(factor, atoms)


def bind(size: Size, values: Mapping[str, int]) -> int | None:
    """The number when each symbol has its value in `values`, None if one is missing or the result is undefined."""
    return size if isinstance(size, int) else _bound(size, values, {})


def _bound(size: Sym, values: Mapping[str, int], done: dict[str, int | None]) -> int | None:
    total = size._coefficient
    for atom in size._atoms:
        if atom.key not in done:
            done[atom.key] = _evaluated(atom, values, done) if atom.op else values.get(atom.name)
        value = done[atom.key]
        if value is None:
            return None
        total *= value
    return total


def _evaluated(atom: _Atom, values: Mapping[str, int], done: dict[str, int | None]) -> int | None:
    evaluate = _EVALUATE.get(atom.op)
    args = [arg if isinstance(arg, int) else _bound(arg, values, done) for arg in atom.args]
    known = [a for a in args if a is not None]
    return evaluate(known) if evaluate is not None and len(known) == len(args) else None


def _without(atoms: Sequence[_Atom], names: Iterable[str]) -> list[_Atom] | None:
    rest = list(atoms)
    for name in names:
        for k, atom in enumerate(rest):
            if atom.key == name:
                del rest[k]
                break
        else:
            return None
    return rest


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _addends(size: Size) -> Sequence[Size]:
    """The size as a sum: a coefficient times one sum is multiplied out, anything else is one term."""
    if isinstance(size, int):
        return (size,) if size else ()
    if len(size._atoms) == 1 and size._atoms[0].op == "+":
        args = size._atoms[0].args
        return args if size._coefficient == 1 else [size._coefficient * arg for arg in args]
    return (size,)


def _add(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if isinstance(a, Sym) and isinstance(b, Sym) and a._names == b._names:
        total = a._coefficient + b._coefficient
        return Sym(total, a._names, a._atoms) if total else 0
    if not a or not b:
        return a or b
    factors: dict[tuple[str, ...], int] = {}
    atoms: dict[tuple[str, ...], tuple[_Atom, ...]] = {}
    for term in (*_addends(a), *_addends(b)):
        names, parts = (term._names, term._atoms) if isinstance(term, Sym) else ((), ())
        factors[names] = factors.get(names, 0) + coefficient(term)
        atoms[names] = parts
    return _sum({names: factor for names, factor in factors.items() if factor}, atoms)


def _sum(factors: dict[tuple[str, ...], int], atoms: dict[tuple[str, ...], tuple[_Atom, ...]]) -> Size:
    """The sum of monomials; what they have in common is a factor of the result, so that it can be cancelled."""
    order = sorted(factors, reverse=True)  # the constant, (), is last
    if len(order) < 2:
        return _monomial(factors[order[0]], atoms[order[0]]) if order else 0
    common = list(atoms[order[-1]])
    for names in order:
        common = _shared(common, names)
    if common:
        keys = [atom.key for atom in common]
        inner: Size = 0
        for names in order:
            inner = _add(inner, _monomial(factors[names], _without(atoms[names], keys) or ()))
        return _monomial(1, common) * inner
    content = gcd(*factors.values())
    if factors[order[0]] < 0:
        content = -content
    terms = tuple(_monomial(factors[names] // content, atoms[names]) for names in order)
    lows = [low(term) for term in terms]
    bottom = sum(n for n in lows if n is not None) if None not in lows else None
    text = f"({'+'.join(map(repr, terms))})"
    total = _opaque(text, bottom, "+", terms)
    return Sym(content, total._names, total._atoms)


def _shared(atoms: Iterable[_Atom], names: Iterable[str]) -> list[_Atom]:
    left = list(names)
    kept = []
    for atom in atoms:
        if atom.key in left:
            left.remove(atom.key)
            kept.append(atom)
    return kept


def _floordiv(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if (quotient := exact_div(a, b)) is not None:
        return quotient
    if b == 0:
        raise ZeroDivisionError(f"{a!r} // 0")
    a, b = _cancel(a, b)
    if isinstance(b, int):
        if b < 0:
            a, b = -a, -b
        if b == 1:
            return a
        # (x + k*b + c) // b = k + (x + c) // b, so that all spellings of a window count are one symbol
        whole = sum(term // b for term in _addends(a) if isinstance(term, int))
        if whole:
            return _floordiv(a - whole * b, b) + whole
        if isinstance(a, Sym) and a._coefficient == 1 and len(a._atoms) == 1 and a._atoms[0].op == "//":
            inner, divisor = a._atoms[0].args
            if isinstance(divisor, int) and divisor > 0:  # x // m // n = x // (m*n)
                return _floordiv(inner, divisor * b)
    bottom_a, bottom_b = low(a), low(b)
    bottom = None
    if bottom_a is not None and bottom_b is not None and bottom_b > 0:
        bottom = bottom_a // b if isinstance(b, int) else min(bottom_a // bottom_b, 0)
    return _opaque(f"({a!r}//{b!r})", bottom, "//", (a, b))


def _cancel(a: Size, b: Size) -> tuple[Size, Size]:
    """Both without their common factors: floor(k*a / k*b) = floor(a / b)."""
    common = gcd(coefficient(a), coefficient(b))
    shared = _shared(a._atoms, b._names) if isinstance(a, Sym) and isinstance(b, Sym) else []
    factor = _monomial(common, shared)
    left, right = exact_div(a, factor), exact_div(b, factor)
    assert left is not None
    assert right is not None
    return left, right


def _mod(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    if b == 0:
        raise ZeroDivisionError(f"{a!r} % 0")
    if exact_div(a, b) is not None:
        return 0
    if isinstance(b, int):
        reduced: Size = 0
        for term in _addends(a):
            factor = coefficient(term)
            rest = factor % abs(b)
            reduced = reduced + (rest if isinstance(term, int) else Sym(rest, term._names, term._atoms) if rest else 0)
        if isinstance(reduced, int):
            return reduced % b
        a = reduced
    bottom = low(b)
    return _opaque(f"({a!r}%{b!r})", 0 if bottom is not None and bottom > 0 else None, "%", (a, b))


def minimum(a: Size, b: Size) -> Size:
    """The smaller one; a symbol where it is not known which."""
    return _extreme("min", a, b)


def maximum(a: Size, b: Size) -> Size:
    """The larger one; a symbol where it is not known which."""
    return _extreme("max", a, b)


def _extreme(op: str, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b) if op == "min" else max(a, b)
    if a == b:
        return a
    for small, large in ((a, b), (b, a)):
        gap = low(large - small)
        if (gap is not None and gap >= 0) or _bounded(small, large):
            return small if op == "min" else large
    lows = [low(a), low(b)]
    known = [n for n in lows if n is not None]
    bottom = (min(known) if len(known) == 2 else None) if op == "min" else (max(known) if known else None)
    first, second = sorted((a, b), key=repr)
    return opaque(op, first, second, bottom=bottom)


def _bounded(small: Size, large: Size) -> bool:
    """Whether `small` is min(large, ...) or `large` is max(small, ...)."""
    return any(
        isinstance(whole, Sym)
        and len(whole._atoms) == 1
        and whole._coefficient == 1
        and whole._atoms[0].op == op
        and part in whole._atoms[0].args
        for whole, op, part in ((small, "min", large), (large, "max", small))
    )


def broadcast(a: Size, b: Size) -> Size:
    """The size of two broadcast axes: equal, or one of them is 1."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b
    if _bounded(a, b):  # min(S, 512) fits S only if it is S or 1
        return b
    if _bounded(b, a):
        return a
    parts = sorted({*_operands(a), *_operands(b)}, key=repr)
    lows = [low(part) for part in parts]
    return opaque("bcast", *parts, bottom=1 if all(n is not None and n > 0 for n in lows) else 0)


def _operands(size: Sym) -> tuple[Size, ...]:
    atom = size._atoms[0]
    return atom.args if atom.op == "bcast" and len(size._atoms) == 1 and size._coefficient == 1 else (size,)


def _common_size(sizes: Sequence[int]) -> int | None:
    wide = {n for n in sizes if n != 1}
    return None if len(wide) > 1 else wide.pop() if wide else 1


_EVALUATE: dict[str, Callable[[Sequence[int]], int | None]] = {
    "+": sum,
    "//": lambda n: n[0] // n[1] if n[1] else None,
    "%": lambda n: n[0] % n[1] if n[1] else None,
    "min": min,
    "max": max,
    "bcast": _common_size,
}
