"""The solver: laws for any relations, brute force where brute force is exact, and the cases the design names."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.axes import Axes, Reason, Solution
from spa.symbols import symbol


def atoms(solution: Solution) -> list[np.ndarray]:
    free = np.flatnonzero(~solution.frozen)
    return [free[solution.label[free] == label] for label in np.unique(solution.label[free])]


def everything(solution: Solution) -> np.ndarray:
    return np.ones(solution.positions, dtype=bool)


@dataclass
class System:
    """Axes with the relations that were stated, to check a solution against them."""

    axes: Axes = field(default_factory=Axes)
    ids: list[int] = field(default_factory=list)
    facts: list[tuple] = field(default_factory=list)

    def axis(self, size: int) -> int:
        self.ids.append(self.axes.leaf(size))
        return self.ids[-1]

    def state(self, kind: str, *args) -> None:
        self.facts.append((kind, *args))
        {"same": self.axes.same, "prod": self.axes.prod, "cat": self.axes.cat, "take": self.axes.take}[kind](*args)

    def holds(self, solution: Solution, kept: np.ndarray) -> bool:
        keep = {a: solution.keep(a, kept) for a in range(len(self.axes._size)) if a < len(solution.terms)}
        for kind, a, b, *rest in self.facts:
            if kind == "same":
                good = np.array_equal(keep[a], keep[b])
            elif kind == "cat":
                good = np.array_equal(keep[a], np.concatenate([keep[p] for p in b]))
            elif kind == "take":
                good = np.array_equal(keep[a], keep[b][rest[0]])
            else:
                expected = np.array([True])
                for p in b:
                    expected = (expected[:, None] & keep[p][None, :]).reshape(-1)
                good = np.array_equal(keep[a], expected)
            if not good:
                return False
        return True


@st.composite
def systems(draw: st.DrawFn, kinds: tuple[str, ...]) -> System:
    system = System()
    for size in draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=2, max_size=6)):
        system.axis(size)
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(kinds))
        a = draw(st.sampled_from(system.ids))
        n = int(system.axes.size(a))
        if kind == "same":
            others = [b for b in system.ids if system.axes.size(b) == n]
            system.state("same", a, draw(st.sampled_from(others)))
        elif kind == "take":
            b = draw(st.sampled_from(system.ids))
            m = int(system.axes.size(b))
            index = draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
            system.state("take", a, b, np.array(index, dtype=np.int64))
        elif kind == "cat" and n > 1:
            cut = draw(st.integers(1, n - 1))
            fits = [b for b in system.ids if system.axes.size(b) == cut]
            head = draw(st.sampled_from([*fits, -1])) if fits else -1
            head = system.axis(cut) if head == -1 else head
            system.state("cat", a, [head, system.axis(n - cut)])
        elif kind == "prod":
            divisors = [d for d in range(2, n) if n % d == 0]
            if divisors:
                d = draw(st.sampled_from(divisors))
                fits = [b for b in system.ids if system.axes.size(b) == d]
                inner = draw(st.sampled_from([*fits, -1])) if fits else -1
                inner = system.axis(d) if inner == -1 else inner
                system.state("prod", a, [system.axis(n // d), inner])
    if draw(st.booleans()):
        system.axes.freeze(draw(st.sampled_from(system.ids)), Reason("chosen"))
    return system


@settings(max_examples=400, deadline=None)
@given(systems(("same", "prod", "cat", "take")), st.randoms(use_true_random=False))
def test_any_set_of_atoms_satisfies_every_relation(system: System, random) -> None:
    solution = system.axes.solve()
    kept = everything(solution)
    for atom in atoms(solution):
        if random.random() < 0.4:
            kept[atom] = False
    assert system.holds(solution, kept)


@settings(max_examples=300, deadline=None)
@given(systems(("same", "cat", "take")))
def test_without_products_atoms_are_the_connected_components(system: System) -> None:
    """Brute force: positions joined one by one."""
    solution = system.axes.solve()
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def find(x: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for kind, a, b, *rest in system.facts:
        if kind == "same":
            pairs = [((a, k), (b, k)) for k in range(int(system.axes.size(a)))]
        elif kind == "take":
            pairs = [((a, k), (b, int(i))) for k, i in enumerate(rest[0])]
        else:
            flat = [(p, k) for p in b for k in range(int(system.axes.size(p)))]
            pairs = [((a, k), x) for k, x in enumerate(flat)]
        for x, y in pairs:
            parent[find(x)] = find(y)
    expected: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for a in system.ids:
        for k in range(int(system.axes.size(a))):
            expected.setdefault(find((a, k)), set()).add((a, k))
    frozen = {x for axis, _ in system.axes._freezes for x in [(axis, k) for k in range(int(system.axes.size(axis)))]}
    free = {frozenset(c) for c in expected.values() if not c & {x for f in frozen for x in expected[find(f)]}}
    found = set()
    for atom in atoms(solution):
        kept = everything(solution)
        kept[atom] = False
        touched = {(a, int(k)) for a in system.ids for k in np.flatnonzero(~solution.keep(a, kept))}
        found.add(frozenset(touched))
    assert found - {frozenset()} == free


def test_heads_query_dims_and_value_dims_are_separate() -> None:
    axes = Axes()
    fused = axes.leaf(3 * 768)
    q, k, v = (axes.leaf(768) for _ in range(3))
    axes.cat(fused, [q, k, v])
    heads, qk, vd = axes.leaf(12), axes.leaf(64), axes.leaf(64)
    for tensor, inner in ((q, qk), (k, qk), (v, vd)):
        axes.prod(tensor, [heads, inner])
    solution = axes.solve()
    assert sorted(len(a) for a in atoms(solution)) == [1] * (12 + 64 + 64)
    kept = everything(solution)
    kept[solution.base[solution.leaves(heads)[0]] + 5] = False
    assert (~solution.keep(fused, kept)).sum() == 3 * 64


def test_common_refinement() -> None:
    axes = Axes()
    a = axes.leaf(768)
    axes.prod(a, [axes.leaf(12), axes.leaf(64)])
    axes.prod(a, [axes.leaf(24), axes.leaf(32)])
    solution = axes.solve()
    assert [solution.leaf_size[leaf] for leaf in solution.leaves(a)] == [12, 2, 32]


def test_rotation_by_halves_couples_pairs() -> None:
    axes = Axes()
    d, rotated = axes.leaf(8), axes.leaf(8)
    low, high = axes.leaf(4), axes.leaf(4)
    axes.cat(d, [low, high])
    axes.cat(rotated, [high, low])
    axes.same(d, rotated)
    solution = axes.solve()
    kept = everything(solution)
    kept[atoms(solution)[1]] = False
    assert np.flatnonzero(~solution.keep(d, kept)).tolist() == [1, 5]


def test_every_second_position_of_pairs_couples_the_pairs() -> None:
    """RoPE with neighbours as pairs: x = n x 2 is read at x[::2] and x[1::2]."""
    axes = Axes()
    x, even, odd, n, pair = axes.leaf(8), axes.leaf(4), axes.leaf(4), axes.leaf(4), axes.leaf(2)
    axes.prod(x, [n, pair])
    axes.take(even, x, np.arange(0, 8, 2))
    axes.take(odd, x, np.arange(1, 8, 2))
    solution = axes.solve()
    leaves = [leaf for axis in (n, even, odd) for leaf in solution.leaves(axis)]
    labels = [solution.label[solution.base[leaf] : solution.base[leaf + 1]] for leaf in leaves]
    assert all(np.array_equal(label, labels[0]) for label in labels)
    assert solution.frozen.sum() == 2  # the pair itself stays


def test_factors_that_do_not_nest_fall_back_to_positions() -> None:
    axes = Axes()
    a = axes.leaf(24)
    axes.prod(a, [axes.leaf(6), axes.leaf(4)])
    axes.prod(a, [axes.leaf(8), axes.leaf(3)])
    solution = axes.solve()
    assert solution.positions
    for atom in atoms(solution):
        kept = everything(solution)
        kept[atom] = False
        gone = np.flatnonzero(~solution.keep(a, kept))
        assert len(gone) % 12 == 0, "only whole rows of both layouts may leave"


def test_symbolic_factors_match_and_are_never_removed() -> None:
    axes, n = Axes(), symbol("N")
    merged = axes.leaf(12 * n)
    heads = axes.leaf(12)
    axes.prod(merged, [axes.leaf(n), heads])
    again = axes.leaf(12)
    axes.prod(merged, [axes.leaf(n), again])
    solution = axes.solve()
    assert solution.leaves(heads) == solution.leaves(again)
    assert len(atoms(solution)) == 12


@pytest.mark.parametrize(("a", "b"), [(3, 4), (1, 2)])
def test_axes_of_different_sizes_freeze_each_other(a: int, b: int) -> None:
    axes = Axes()
    x, y = axes.leaf(a), axes.leaf(b)
    axes.same(x, y)
    solution = axes.solve()
    assert solution.frozen.all()
    assert "another size" in solution.reasons[solution.leaves(x)[0]].text


@settings(max_examples=200, deadline=None)
@given(systems(("same", "prod", "cat", "take")), st.integers(0, 2**31))
def test_fold_sums_what_keep_removes(system: System, seed: int) -> None:
    """The folded value of a position is the sum over the slice that leaves with it (for a single factor)."""
    solution = system.axes.solve()
    rng = np.random.default_rng(seed)
    for axis in system.ids:
        values = rng.random(int(system.axes.size(axis)))
        folded = solution.fold(axis, values)
        leaves = solution.leaves(axis)
        assert [leaf for leaf, _ in folded] == leaves
        for leaf, part in folded:
            if leaves.count(leaf) > 1:
                continue
            for k in range(len(part)):
                kept = everything(solution)
                kept[solution.base[leaf] + k] = False
                assert np.isclose(part[k], values[~solution.keep(axis, kept)].sum())
