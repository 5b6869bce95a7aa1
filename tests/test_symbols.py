"""Laws of the size arithmetic: whatever form a result takes, binding it gives the number that integers would give."""

from __future__ import annotations

import operator
import timeit
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa.symbols import (
    Size,
    Sym,
    bind,
    broadcast,
    coefficient,
    divides,
    exact_div,
    fresh,
    is_static,
    low,
    maximum,
    minimum,
    opaque,
    product,
    symbol,
)

NAMES = ["N", "S", "P", "a+b", "2", "(S+1)", "?1"]
N, S, P = (symbol(name) for name in "NSP")
leaves = st.one_of(st.integers(-6, 12), st.sampled_from([symbol(name) for name in NAMES]))
values = st.fixed_dictionaries({name: st.integers(1, 9) for name in NAMES})
OPERATORS: list[Callable[[Size, Size], Size]] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
    minimum,
    maximum,
]


def _combine(children: st.SearchStrategy[Size]) -> st.SearchStrategy[Size]:
    def apply(parts: tuple[Callable[[Size, Size], Size], Size, Size]) -> Size:
        function, a, b = parts
        return a if b == 0 and function in (operator.floordiv, operator.mod) else function(a, b)

    return st.tuples(st.sampled_from(OPERATORS), children, children).map(apply)


sizes = st.recursive(leaves, _combine, max_leaves=6)


@pytest.mark.parametrize("function", OPERATORS)
@given(sizes, sizes, values)
def test_bind_is_a_homomorphism(function: Callable[[Size, Size], Size], a: Size, b: Size, at: dict[str, int]) -> None:
    left, right = bind(a, at), bind(b, at)
    if left is None or right is None or (right == 0 and function in (operator.floordiv, operator.mod)):
        return  # undefined: a division by zero somewhere
    if b == 0 and function in (operator.floordiv, operator.mod):
        return
    assert bind(function(a, b), at) == function(left, right)


@given(sizes, sizes, values)
def test_exact_division_is_exact(a: Size, b: Size, at: dict[str, int]) -> None:
    quotient = exact_div(a, b)
    assert (quotient is not None) == divides(b, a)
    left, right = bind(a, at), bind(b, at)
    if quotient is not None and left is not None and right:
        found = bind(quotient, at)
        assert found is not None
        assert found * right == left


@given(sizes, values)
def test_low_is_a_bound(a: Size, at: dict[str, int]) -> None:
    bottom, value = low(a), bind(a, at)
    if bottom is not None and value is not None:
        assert bottom <= value


@given(sizes, sizes)
def test_commutative(a: Size, b: Size) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert hash(a * b) == hash(b * a)
    assert minimum(a, b) == minimum(b, a)
    assert broadcast(a, b) == broadcast(b, a) or (is_static(a) and is_static(b))


@given(sizes, sizes, sizes, values)
def test_regrouping_means_the_same(a: Size, b: Size, c: Size, at: dict[str, int]) -> None:
    assert (a * b) * c == a * (b * c) == product([c, b, a])
    assert bind((a + b) + c, at) == bind(a + (b + c), at)
    assert a - a == 0
    assert a + 0 == a * 1 == a


@given(st.lists(st.sampled_from([1, 7, N, S]), min_size=1, max_size=4), values)
def test_broadcast_is_what_numpy_says(parts: list[Size], at: dict[str, int]) -> None:
    bound = [bind(part, at) for part in parts]
    wide = {n for n in bound if n != 1}
    total: Size = 1
    for part in parts:
        total = broadcast(total, part)
    if len(wide) < 2:
        assert bind(total, at) == (wide.pop() if wide else 1)


def test_sums_cancel() -> None:
    assert S + 1 - 1 == S
    assert (P + S) - S == P
    assert (S + 1) is not (S + 1)
    assert S + 1 == 1 + S
    assert {S + P: 1}[P + S] == 1
    assert 3 * S + 2 * S == 5 * S
    assert N * S + N == N * (S + 1)
    assert exact_div(N * S + N, S + 1) == N


def test_windows_have_one_name() -> None:
    assert (S - 1) // 2 + 1 == (S + 1) // 2
    assert (S + 2 - 3) // 2 + 1 == (S - 1 + 2) // 2
    assert S // 2 // 2 == S // 4
    assert (12 * N * S) // (4 * S) == 3 * N
    assert (4 * S) // 6 == (2 * S) // 3


def test_extremes_know_their_parts() -> None:
    short = minimum(S, 512)
    assert minimum(S, 1) == 1
    assert maximum(S - 1, 0) == S - 1
    assert maximum(S, short) == S
    assert broadcast(S, short) == S
    assert bind(short, {"S": 600}) == 512
    assert broadcast(S, 8) == broadcast(8, S) == 8


def test_what_is_known_of_signs() -> None:
    assert low(N) == 1
    assert low(S - 1) == 0
    assert low(S - P) is None
    assert low(fresh(1)) == 0
    assert low(fresh(2, None)) is None
    assert low(12) == 12
    assert coefficient(12 * N * S) == coefficient(12) == 12


def test_odd_names_stay_apart() -> None:
    assert symbol("N+1") != N + 1
    assert symbol("?1") != fresh(1)
    assert symbol("(S+1)") != S + 1
    assert bind(symbol("(S+1)"), {"(S+1)": 4}) == 4
    assert opaque("f", N) == opaque("f", symbol("N"))
    assert bind(opaque("f", N), {"N": 1}) is None
    assert symbol("a,b").free == {"a,b"}


def test_long_expressions_keep_short_names() -> None:
    size: Size = S
    for n in range(40):
        size = (size * size + n) // (N + n)
    assert len(repr(size)) < 400
    assert isinstance(size, Sym)
    assert size.free == {"N", "S"}


def test_division_by_zero_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        N // 0
    with pytest.raises(ZeroDivisionError):
        N % 0
    assert exact_div(N, 0) is None
    assert bind(N // (S - 1), {"N": 4, "S": 1}) is None


def test_fast() -> None:
    """Microseconds: a graph has thousands of dims."""
    assert min(timeit.repeat(lambda: N * S * 12, number=1000, repeat=3)) < 0.02
    assert min(timeit.repeat(lambda: S + 1, number=1000, repeat=3)) < 0.05
