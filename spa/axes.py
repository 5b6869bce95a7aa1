"""Index spaces: which positions of which tensor axes must be removed together.

An *axis* stands for one dimension of one tensor (or for a factor of one). Operators relate axes by four relations:

    same(a, b)          one index space
    prod(d, [f, ...])   d is the row-major product of f ...   (reshape, heads, groups, gates)
    cat(d, [p, ...])    d is p ... laid end to end            (concat, split, slice, pad)
    take(d, src, idx)   position k of d is position idx[k] of src

plus `freeze(d, why)`: nothing may be removed. The solver keeps every class of equal axes as a term: a LEAF, a PROD of
axes or a CAT of axes. Equating two terms refines both to their common refinement (768 = 12 x 64 and 768 = 24 x 32
give 12 x 2 x 32), as unification does for types. What cannot be refined (cuts inside a factor) falls back to single
positions. `solve` then unites positions along `take` and returns the atoms: the smallest sets that can leave.

Nothing here knows ONNX. Sizes are ints or symbolic monomials (`spa.symbols`); symbolic leaves are never removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spa.symbols import Size, exact_div, is_static, product

LEAF, PROD, CAT = range(3)

Axis = int
"""An axis is a small integer, valid for the `Axes` that made it."""


@dataclass(frozen=True)
class Reason:
    """Why an axis may not be pruned."""

    text: str
    """One sentence fragment, e.g. "graph output"."""
    operator: str = ""
    """Type of the operator that froze it, empty if none did."""
    node: str = ""
    """Name of the node that froze it, empty if none did."""


_SINGLE = Reason("the only position of an axis")


@dataclass(frozen=True)
class _Take:
    axis: Axis
    source: Axis
    index: NDArray[np.int64]


@dataclass
class Axes:
    """A growing set of axes and the relations between them; `solve` turns it into a `Solution`."""

    _size: list[Size] = field(default_factory=list)
    _parent: list[int] = field(default_factory=list)
    _kind: list[int] = field(default_factory=list)
    _parts: list[tuple[Axis, ...]] = field(default_factory=list)
    _takes: list[_Take] = field(default_factory=list)
    _freezes: list[tuple[Axis, Reason]] = field(default_factory=list)
    mentioned: set[Axis] = field(default_factory=set)
    """Axes that a relation named; whoever applies rules clears it, to find the axes a rule says nothing about."""

    # -- making axes -------------------------------------------------------------------------------------------------

    def leaf(self, size: Size) -> Axis:
        """A new axis of `size` positions, related to nothing."""
        return self._new(size, LEAF, ())

    def product_of(self, factors: Iterable[Axis]) -> Axis:
        """The row-major product of `factors`; factors of size 1 are left out, and must stay."""
        factors = tuple(factors)
        self.mentioned.update(factors)
        kept = tuple(f for f in factors if self._size[f] != 1)
        for factor in factors:
            if self._size[factor] == 1:
                self.freeze(factor, _SINGLE)
        if len(kept) == 1:
            return kept[0]
        if not kept:
            return self.leaf(1)
        return self._new(product(self._size[f] for f in kept), PROD, kept)

    def concatenation_of(self, parts: Iterable[Axis]) -> Axis:
        """`parts` laid end to end; empty parts are dropped."""
        parts = tuple(parts)
        self.mentioned.update(parts)
        kept = tuple(p for p in parts if self._size[p] != 0)
        if len(kept) == 1:
            return kept[0]
        total: Size = 0
        for part in kept:
            total = total + self._size[part]
        return self._new(total, CAT, kept) if kept else self.leaf(0)

    def _new(self, size: Size, kind: int, parts: tuple[Axis, ...]) -> Axis:
        self._size.append(size)
        self._kind.append(kind)
        self._parts.append(parts)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def size(self, axis: Axis) -> Size:
        """Number of positions of `axis`."""
        return self._size[axis]

    # -- relations ---------------------------------------------------------------------------------------------------

    def prod(self, axis: Axis, factors: Sequence[Axis]) -> None:
        """Position of `axis` = row-major position in `factors`."""
        self.same(axis, self.product_of(factors))

    def cat(self, axis: Axis, parts: Sequence[Axis]) -> None:
        """`axis` is `parts` laid end to end."""
        self.same(axis, self.concatenation_of(parts))

    def take(self, axis: Axis, source: Axis, index: NDArray[np.int64]) -> None:
        """Position k of `axis` is position `index[k]` of `source` (`index` may repeat and may skip)."""
        self.mentioned.update((axis, source))
        self._takes.append(_Take(axis, source, index))

    def freeze(self, axis: Axis, reason: Reason) -> None:
        """Nothing of `axis` may be removed."""
        self.mentioned.add(axis)
        self._freezes.append((axis, reason))

    def free(self, axis: Axis, reason: Reason) -> None:
        """Take back that `axis` was frozen for `reason`."""
        self._freezes.remove((axis, reason))

    def same(self, a: Axis, b: Axis) -> None:
        """`a` and `b` are one index space; axes of different sizes are frozen instead."""
        self.mentioned.update((a, b))
        pending = [(a, b)]
        while pending:
            a, b = (self._find(x) for x in pending.pop())
            if a == b:
                continue
            if self._size[a] != self._size[b]:
                why = Reason(f"coupled with an axis of another size ({self._size[a]} and {self._size[b]})")
                self.freeze(a, why)
                self.freeze(b, why)
            elif self._kind[a] == LEAF:
                self._parent[a] = b
            elif self._kind[b] == LEAF:
                self._parent[b] = a
            elif self._kind[a] == self._kind[b] == PROD:
                self._unify_products(a, b, pending)
            elif self._kind[a] == self._kind[b] == CAT:
                self._unify_concatenations(a, b, pending)
            elif self._kind[a] == PROD:
                self._unify_mixed(a, b, pending)
            else:
                self._unify_mixed(b, a, pending)

    def whole(self, axis: Axis) -> Axis | None:
        """A name for the index space of `axis` as the relations stated so far have it; None if it is made of others."""
        root = self._find(axis)
        return root if self._kind[root] == LEAF else None

    # -- unification -------------------------------------------------------------------------------------------------

    def _find(self, axis: Axis) -> Axis:
        parent = self._parent
        while parent[axis] != axis:
            parent[axis] = parent[parent[axis]]
            axis = parent[axis]
        return axis

    def _flat(self, axis: Axis, kind: int) -> list[Axis]:
        """Factors (parts) of a term with nested products (concatenations) opened."""
        out: list[Axis] = []
        for part in self._parts[axis]:
            root = self._find(part)
            if self._kind[root] == kind:
                out.extend(self._flat(root, kind))
            else:
                out.append(root)
        return out

    def _unify_products(self, a: Axis, b: Axis, pending: list[tuple[Axis, Axis]]) -> None:
        xs, ys = self._flat(a, PROD), self._flat(b, PROD)
        self._parent[a] = b
        while xs and ys:
            x, y = xs.pop(), ys.pop()
            if self._size[x] == self._size[y]:
                pending.append((x, y))
            elif (rest := exact_div(self._size[y], self._size[x])) is not None:
                ys.append(self._split_product(y, rest, x, pending))
            elif (rest := exact_div(self._size[x], self._size[y])) is not None:
                xs.append(self._split_product(x, rest, y, pending))
            else:
                self._unify_leftovers([*xs, x], [*ys, y], pending)
                return

    def _split_product(self, axis: Axis, outer: Size, inner: Axis, pending: list[tuple[Axis, Axis]]) -> Axis:
        """Demand axis = outer x inner and return the new outer factor."""
        rest = self.leaf(outer)
        pending.append((axis, self._new(self._size[axis], PROD, (rest, inner))))
        return rest

    def _unify_leftovers(self, xs: list[Axis], ys: list[Axis], pending: list[tuple[Axis, Axis]]) -> None:
        """Factors that do not nest (6 x 4 against 8 x 3): equal outer ones still match, the rest goes to positions."""
        while xs and ys and self._size[xs[0]] == self._size[ys[0]]:
            pending.append((xs.pop(0), ys.pop(0)))
        if xs and ys:
            pending.append((self._collapse(self.product_of(xs)), self._collapse(self.product_of(ys))))

    def _unify_concatenations(self, a: Axis, b: Axis, pending: list[tuple[Axis, Axis]]) -> None:
        xs, ys = self._flat(a, CAT)[::-1], self._flat(b, CAT)[::-1]
        self._parent[a] = b
        while xs and ys:
            x, y = xs.pop(), ys.pop()
            sx, sy = self._size[x], self._size[y]
            if sx == sy:
                pending.append((x, y))
            elif not (isinstance(sx, int) and isinstance(sy, int)):
                for axis in (x, y, *xs, *ys):
                    self.freeze(axis, Reason("joined with parts of unknown size"))
                return
            elif sx < sy:
                ys.append(self._split_concatenation(y, x, sy - sx, pending))
            else:
                xs.append(self._split_concatenation(x, y, sx - sy, pending))

    def _split_concatenation(self, axis: Axis, head: Axis, rest: int, pending: list[tuple[Axis, Axis]]) -> Axis:
        tail = self.leaf(rest)
        pending.append((axis, self._new(self._size[axis], CAT, (head, tail))))
        return tail

    def _unify_mixed(self, p: Axis, c: Axis, pending: list[tuple[Axis, Axis]]) -> None:
        """A product cut into parts: cuts between positions of the outermost factor cut that factor."""
        outer, *inner = self._flat(p, PROD)
        parts = self._flat(c, CAT)
        stride = product(self._size[f] for f in inner)
        counts = [exact_div(self._size[part], stride) for part in parts]
        if any(count is None for count in counts):
            pending.append((self._collapse(p), c))
            return
        self._parent[c] = p
        pieces = [self.leaf(count) for count in counts if count is not None]
        pending.append((outer, self.concatenation_of(pieces)))
        pending.extend((part, self.product_of([piece, *inner])) for part, piece in zip(parts, pieces, strict=True))

    def _collapse(self, axis: Axis) -> Axis:
        """Turn a product into single positions: only its largest factor stays prunable (one index, many positions)."""
        root = self._find(axis)
        if self._kind[root] != PROD:
            return root
        factors = self._flat(root, PROD)
        sizes = [self._size[f] for f in factors]
        self._kind[root], self._parts[root] = LEAF, ()
        why = Reason("cut inside a factor of a reshaped axis")
        static = [s for s in sizes if isinstance(s, int)]
        if len(static) < len(sizes):
            for axis_ in (root, *factors):
                self.freeze(axis_, why)
            return root
        chosen = max(range(len(static)), key=static.__getitem__)
        stride = int(np.prod(static[chosen + 1 :], dtype=np.int64))
        positions = np.arange(int(np.prod(static, dtype=np.int64)), dtype=np.int64)
        self.take(root, factors[chosen], positions // stride % static[chosen])
        for k, factor in enumerate(factors):
            if k != chosen:
                self.freeze(factor, why)
        return root

    # -- solving -----------------------------------------------------------------------------------------------------

    def solve(self) -> Solution:
        """Resolve all relations; the axes may not be extended afterwards."""
        return _Solver(self).run()


@dataclass(frozen=True)
class Solution:
    """The solved system: leaves with numbered positions, and which positions leave together."""

    terms: list[tuple[int, tuple[int, ...]]]
    """Per axis: (LEAF, (leaf,)) or (PROD | CAT, axes)."""
    leaf_size: list[Size]
    """Positions of each leaf; symbolic leaves are frozen and have no numbered positions."""
    base: NDArray[np.int64]
    """First position number of each leaf, one more entry than leaves."""
    label: NDArray[np.int64]
    """Per position: the number of its atom (the smallest position in it)."""
    frozen: NDArray[np.bool_]
    """Per position: may not be removed."""
    reasons: dict[int, Reason]
    """First reason per leaf that was frozen directly."""

    @property
    def positions(self) -> int:
        """How many positions there are in all leaves together."""
        return len(self.label)

    def leaves(self, axis: Axis) -> list[int]:
        """Leaves of `axis`, outer before inner, with repetition."""
        kind, parts = self.terms[axis]
        return [parts[0]] if kind == LEAF else [leaf for part in parts for leaf in self.leaves(part)]

    def counts(self, kept: NDArray[np.bool_]) -> list[Size]:
        """Kept size of each leaf under the position mask `kept`."""
        sums = np.concatenate([[0], np.cumsum(kept)])[self.base]
        return [int(sums[k + 1] - sums[k]) if isinstance(s, int) else s for k, s in enumerate(self.leaf_size)]

    def size(self, axis: Axis, counts: Sequence[Size]) -> Size:
        """Size of `axis` when each leaf has `counts` positions."""
        kind, parts = self.terms[axis]
        if kind == LEAF:
            return counts[parts[0]]
        if kind == PROD:
            return product(self.size(p, counts) for p in parts)
        total: Size = 0
        for part in parts:
            total = total + self.size(part, counts)
        return total

    def touched(self, axis: Axis, changed: set[int]) -> bool:
        """Whether `axis` contains one of the leaves in `changed`."""
        kind, parts = self.terms[axis]
        return parts[0] in changed if kind == LEAF else any(self.touched(p, changed) for p in parts)

    def keep(self, axis: Axis, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mask over the positions of `axis`: True where it stays. Static axes only."""
        kind, parts = self.terms[axis]
        if kind == LEAF:
            leaf = parts[0]
            return kept[self.base[leaf] : self.base[leaf + 1]]
        masks = [self.keep(p, kept) for p in parts]
        if kind == CAT:
            return np.concatenate(masks)
        out = masks[0]
        for mask in masks[1:]:
            out = (out[:, None] & mask[None, :]).reshape(-1)
        return out

    def spread(self, axis: Axis, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Per position of `axis` the largest of the per-position `values` of the leaves it is made of."""
        kind, parts = self.terms[axis]
        if kind == LEAF:
            return values[self.base[parts[0]] : self.base[parts[0] + 1]]
        pieces = [self.spread(p, values) for p in parts]
        if kind == CAT:
            return np.concatenate(pieces)
        out = pieces[0]
        for piece in pieces[1:]:
            out = np.maximum(out[:, None], piece[None, :]).reshape(-1)
        return out

    def fold(self, axis: Axis, values: NDArray[np.float64]) -> list[tuple[int, NDArray[np.float64]]]:
        """Sum per-position `values` of `axis` down to its leaves: [(leaf, per leaf position), ...]."""
        kind, parts = self.terms[axis]
        if kind == LEAF:
            return [(parts[0], values)]
        sizes = [len(self.keep(p, np.ones(self.positions, bool))) for p in parts]
        out: list[tuple[int, NDArray[np.float64]]] = []
        if kind == CAT:
            for part, piece in zip(parts, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
                out.extend(self.fold(part, piece))
            return out
        grid = values.reshape(sizes)
        for k, part in enumerate(parts):
            others = tuple(j for j in range(len(parts)) if j != k)
            out.extend(self.fold(part, grid.sum(axis=others)))
        return out


class _Solver:
    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.terms: list[tuple[int, tuple[int, ...]] | None] = [None] * len(axes._size)
        self.leaf_size: list[Size] = []

    def run(self) -> Solution:
        axes = self.axes
        terms = [self._term(a) for a in range(len(axes._size))]
        numbered = [s if isinstance(s, int) else 0 for s in self.leaf_size]
        base = np.concatenate([[0], np.cumsum(numbered, dtype=np.int64)]).astype(np.int64)
        free = np.zeros(int(base[-1]), dtype=bool)
        solution = Solution(terms, self.leaf_size, base, np.arange(len(free)), free, {})
        for leaf, size in enumerate(self.leaf_size):
            if not is_static(size):
                solution.reasons[leaf] = Reason("size known only at run time")
        edges = [e for t in axes._takes if (e := self._edges(t, solution)) is not None]
        for axis, reason in axes._freezes:
            for leaf in solution.leaves(axis):
                solution.reasons.setdefault(leaf, reason)
        for leaf in solution.reasons:
            free[base[leaf] : base[leaf + 1]] = True
        label = _components(len(free), edges)
        bad = np.zeros(len(free), dtype=bool)
        bad[label[free]] = True
        return Solution(terms, self.leaf_size, base, label, bad[label], solution.reasons)

    def _term(self, axis: Axis) -> tuple[int, tuple[int, ...]]:
        root = self.axes._find(axis)
        term = self.terms[root]
        if term is None:
            kind = self.axes._kind[root]
            if kind == LEAF:
                self.leaf_size.append(self.axes._size[root])
                term = (LEAF, (len(self.leaf_size) - 1,))
            else:
                term = (kind, tuple(self.axes._flat(root, kind)))
            self.terms[root] = term
        self.terms[axis] = term
        return term

    def _edges(self, take: _Take, solution: Solution) -> NDArray[np.int64] | None:
        target, source = self._signature(take.axis, solution), self._signature(take.source, solution)
        if target is not None and source is not None:
            source = source[take.index]
            width = min(target.shape[1], source.shape[1])
            target, source = self._varying(target, width, solution), self._varying(source, width, solution)
        if target is None or source is None or target.shape[1] != source.shape[1]:
            why = Reason("indexed across a reshaped axis")
            self.axes.freeze(take.axis, why)
            self.axes.freeze(take.source, why)
            return None
        return np.stack([target.reshape(-1), source.reshape(-1)])

    def _varying(self, signature: NDArray[np.int64], width: int, solution: Solution) -> NDArray[np.int64]:
        """`signature` without the factors that are read at one position only, if `width` are left.

        Every second position of n x 2 stands for the n positions as long as the pair stays: that factor is frozen.
        """
        varies = np.asarray((signature != signature[:1]).any(axis=0))
        if signature.shape[1] == width or np.count_nonzero(varies) != width:
            return signature
        for position in signature[0, ~varies]:
            leaf = int(np.searchsorted(solution.base, position, side="right")) - 1
            solution.reasons.setdefault(leaf, Reason("a factor that is read at one position"))
        return signature[:, varies]

    def _signature(self, axis: Axis, solution: Solution) -> NDArray[np.int64] | None:
        """Per position of `axis` the leaf positions it is made of, [n, factors]; None if ragged or symbolic."""
        kind, parts = solution.terms[axis]
        if kind == LEAF:
            leaf = parts[0]
            if not is_static(solution.leaf_size[leaf]):
                return None
            return np.arange(solution.base[leaf], solution.base[leaf + 1], dtype=np.int64)[:, None]
        signatures = [s for p in parts if (s := self._signature(p, solution)) is not None]
        if len(signatures) < len(parts):
            return None
        if kind == CAT:
            same_depth = len({s.shape[1] for s in signatures}) == 1
            return np.concatenate(signatures) if same_depth else None
        out = signatures[0]
        for s in signatures[1:]:
            out = np.concatenate([np.repeat(out, len(s), axis=0), np.tile(s, (len(out), 1))], axis=1)
        return out


def _components(n: int, edges: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Connected components of `n` positions: per position the smallest position it is joined with."""
    label = np.arange(n, dtype=np.int64)
    if not edges:
        return label
    u, v = np.concatenate(edges, axis=1)
    while True:
        low = np.minimum(label[u], label[v])
        before = label.copy()
        np.minimum.at(label, label[u], low)
        np.minimum.at(label, label[v], low)
        label = label[label]
        if np.array_equal(before, label):
            return label
