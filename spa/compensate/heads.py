"""Where the units of a group are the inner dimension of attention heads: products q k^T, and values on their way out.

Exporters write attention in many ways (one fused projection or three, reshapes, splits, transposed copies, repeated
key heads). What matters is only whether each number behind a projection is, times one constant, one of its rows.
That is found out by running: the projections' outputs are replaced by random codes, the same at all positions, and the
codes are looked for where the units are summed over. A rotary embedding, a norm or a gate in between changes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.consumers import Tap, units_along
from spa.errors import RuntimeFailure, UnsupportedModelError
from spa.executors.segments import Segments, placed
from spa.groups import Group
from spa.measured import Measured
from spa.runtime import fetch, is_plain, place
from spa.sites import Site

Index = NDArray[np.int64]
CODES = 6
"""Random codes that are sent through."""
TOLERANCE = 1e-3
"""Relative; probabilities that sum to one do so up to rounding."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One head's units as a projection makes them."""

    site: Site
    index: Index
    """[units]: rows of the site's matrix."""


@dataclass(frozen=True, eq=False)
class Columns:
    """One head's units as the output projection reads them."""

    site: Site
    index: Index
    """[units]: columns of the site's matrix."""


@dataclass(frozen=True)
class Product:
    """Heads whose q k^T share queries or keys; as a rule one of each."""

    queries: tuple[Rows, ...]
    keys: tuple[Rows, ...]


@dataclass(frozen=True)
class Outlet:
    """Values of one head and what reads them, once per query head."""

    values: Rows
    readers: tuple[Columns, ...]


@dataclass(frozen=True)
class Heads:
    """All places where a group's units are made and summed over."""

    group: Group
    products: tuple[Product, ...]
    outlets: tuple[Outlet, ...]


def find_heads(groups: Sequence[Group], measured: Measured) -> dict[str, Heads]:
    """By name the groups whose units can be mixed freely within each head.

    Args:
        groups: groups to look at.
        measured: knows the sites, and where units are summed over; one of its samples is run.
    """
    likely = {g.name: makers for g in groups if len(makers := _makers(g, measured))}
    if not likely:
        return {}
    known = measured.cache.get("heads", "", list(likely))
    if known is None:
        try:
            found = _probed([g for g in groups if g.name in likely], likely, measured)
        except (RuntimeFailure, UnsupportedModelError):
            found = {}  # codes are no values that every operator takes: units are selected then
        measured.cache.put("heads", "", list(likely), {"json": np.frombuffer(_packed(found).encode(), dtype=np.uint8)})
        return found
    return _unpacked(known["json"].tobytes().decode(), groups, measured)


def _probed(
    groups: Sequence[Group], likely: Mapping[str, Mapping[Site, Index]], measured: Measured
) -> dict[str, Heads]:
    """Send codes through the model."""
    graph = measured.analysis.coupling.model.graph
    parts = Segments.of(measured.analysis.coupling.model, measured.setup.provider, measured.setup.threads)
    sites = {site.name: site for makers in likely.values() for site in makers}
    shares = [n.outputs[0].name or "" for n in graph if n.op_type == "Softmax" and n.domain in ("", "ai.onnx")]
    batch = placed(next(iter(measured.data.batches(measured.data.fixed or 1))))
    held = [name for name in (*sites, *shares) if name in parts.producer]
    values = {**parts.runner(held, ())(batch), **batch}
    if not all(is_plain(values[name]) for name in sites):
        return {}  # numpy has no such numbers
    watched = {tap.key[0]: None for group in groups for tap in measured.taps(group)}
    run = parts.runner(list(watched), list(values))
    rng = np.random.default_rng(0)
    codes = {name: rng.normal(size=(CODES, site.rows)) for name, site in sites.items()}

    def seen(k: int | None) -> dict[str, NDArray[np.float64]]:
        shown = dict(values)
        for name, code in codes.items():
            array = fetch(values[name])
            row = np.zeros(array.shape[-1]) if k is None else code[k]
            shown[name] = place(np.ascontiguousarray(np.broadcast_to(row, array.shape).astype(array.dtype)))
        return {name: fetch(value).astype(np.float64) for name, value in run(shown).items()}

    rest = seen(None)
    moved = [{name: value - rest[name] for name, value in seen(k).items()} for k in range(CODES)]
    signals = {name: np.stack([m[name] for m in moved]) for name in watched}
    found = (_heads(g, likely[g.name], measured.taps(g), signals, codes) for g in groups)
    return {heads.group.name: heads for heads in found if heads is not None}


def _packed(found: Mapping[str, Heads]) -> str:
    def name(what: Rows | Columns) -> list[object]:
        return [what.site.name, what.index.tolist()]

    return json.dumps(
        {
            group: [
                [[[name(r) for r in side] for side in (p.queries, p.keys)] for p in heads.products],
                [[name(o.values), [name(c) for c in o.readers]] for o in heads.outlets],
            ]
            for group, heads in found.items()
        }
    )


def _unpacked(text: str, groups: Sequence[Group], measured: Measured) -> dict[str, Heads]:
    sites = {site.name: site for site in measured.sites}
    by_name = {group.name: group for group in groups}

    def rows(item: tuple[str, list[int]]) -> Rows:
        return Rows(sites[item[0]], np.array(item[1]))

    def columns(item: tuple[str, list[int]]) -> Columns:
        return Columns(sites[item[0]], np.array(item[1]))

    return {
        name: Heads(
            by_name[name],
            tuple(Product(*(tuple(map(rows, side)) for side in sides)) for sides in products),
            tuple(Outlet(rows(values), tuple(map(columns, readers))) for values, readers in outlets),
        )
        for name, (products, outlets) in json.loads(text).items()
    }


def _makers(group: Group, measured: Measured) -> dict[Site, Index]:
    """The projections that make the group, with [blocks, units] rows each; empty if anything else has a say."""
    made = {site.weight: site for site in measured.sites if site.layout == "tokens" and not site.fused}
    biases = {site.bias for site in made.values() if site.bias is not None}
    taps = measured.taps(group)
    readers = {tap.site.weight for tap in taps if tap.site is not None}
    if all(tap.site is not None for tap in taps) and group.kind not in ("v-dim", "qk-dim"):
        return {}
    if any(tap.site is not None and tap.site.layout != "tokens" for tap in taps):
        return {}
    out: dict[Site, Index] = {}
    for member in group.members:
        site = made.get(member.value)
        if site is not None and member.axis == site.output_axis:
            units = units_along(measured.analysis, group, group.leaves, member.dim)
            blocks = _blocks(units, group.units)
            if blocks is None:
                return {}
            out[site] = blocks
        elif member.value not in biases and member.value not in readers:
            return {}
    return out


def _blocks(units: Index, count: int) -> Index | None:
    """[blocks, units]: the k-th position of each unit; None if they do not come equally often."""
    inside = np.flatnonzero(units >= 0)
    order = inside[np.argsort(units[inside], kind="stable")]
    often = np.bincount(units[inside], minlength=count)
    return order.reshape(count, -1).T if len(order) and (often == often[0]).all() else None


_Place = tuple[Site, int]
"""A block of rows."""


def _heads(
    group: Group,
    makers: Mapping[Site, Index],
    taps: Sequence[Tap],
    signals: Mapping[str, NDArray[np.float64]],
    codes: Mapping[str, NDArray[np.float64]],
) -> Heads | None:
    places = [(site, k) for site, blocks in makers.items() for k in range(len(blocks))]
    table = np.stack([codes[site.name][:, makers[site][k]] for site, k in places], axis=1)  # [codes, places, units]
    operands: dict[tuple[str, int], NDArray[np.int64]] = {}
    outlets: dict[int, list[Columns]] = {}
    for tap in taps:
        where = _where(tap, signals[tap.value.name or ""], table, group.units)
        if where is None:
            return None
        if tap.site is None:
            operands[tap.key] = where
            continue
        column = where.reshape(-1, where.shape[-1])
        if (column != column[:1]).any():
            return None
        for block in np.unique(column[0][column[0] >= 0]).tolist():
            mine = _blocks(np.where(column[0] == block, tap.units, -1), group.units)
            if mine is None:
                return None
            outlets.setdefault(block, []).extend(Columns(tap.site, row) for row in mine)
    pairs = _pairs(taps, operands)
    if pairs is None:
        return None
    products = _joined(pairs)
    used = [*outlets, *(p for q, k in products for p in (*q, *k))]
    if sorted(used) != list(range(len(places))):
        return None  # a block is used twice in different ways, or not at all

    def rows(block: int) -> Rows:
        site, k = places[block]
        return Rows(site, makers[site][k])

    return Heads(
        group,
        tuple(Product(tuple(map(rows, sorted(q))), tuple(map(rows, sorted(k)))) for q, k in products),
        tuple(Outlet(rows(block), tuple(readers)) for block, readers in outlets.items()),
    )


def _where(tap: Tap, signal: NDArray[np.float64], table: NDArray[np.float64], count: int) -> Index | None:
    """Per position of the activation (the tap's axis last) the block that it shows, -1 where there is no unit.

    None if one of them shows something else, or not all the same constant times a code.
    """
    moved = np.moveaxis(signal, 1 + tap.axis, -1)
    flat = moved.reshape(CODES, -1, moved.shape[-1])
    where = np.full(flat.shape[1:], -1, dtype=np.int64)
    scales = []
    for p in np.flatnonzero(tap.units >= 0).tolist():
        code = table[:, :, tap.units[p]]  # [codes, places]
        seen = flat[:, :, p]  # [codes, positions]
        dots = code.T @ seen / np.square(code).sum(axis=0)[:, None]
        errors = np.stack([np.square(seen - code[:, [b]] * dots[b]).sum(axis=0) for b in range(code.shape[1])])
        best = errors.argmin(axis=0)
        at = np.arange(seen.shape[1])
        if (errors[best, at] > TOLERANCE**2 * np.square(seen).sum(axis=0)).any():
            return None
        where[:, p] = best
        scales.append(dots[best, at])
    scale = np.stack(scales)
    if not scale.mean() or np.abs(scale / scale.mean() - 1).max() > TOLERANCE:
        return None
    return where.reshape(moved.shape[1:])


def _pairs(taps: Sequence[Tap], operands: Mapping[tuple[str, int], Index]) -> set[tuple[int, int]] | None:
    """(block of queries, block of keys) wherever two operands are multiplied; None if something else sums them."""
    found: set[tuple[int, int]] = set()
    left = {tap.key: tap for tap in taps if tap.site is None}
    done: set[tuple[str, int]] = set()
    for key, tap in left.items():
        for node, slot in tap.value.uses():
            other = node.inputs[1 - slot] if slot < 2 and len(node.inputs) >= 2 else None
            sides = _contracted(node, tap.rank)
            if other is None or sides is None or sides[slot] != tap.axis:
                continue
            partner = (other.name or "", sides[1 - slot])
            if slot != 0 or partner not in left:
                continue
            blocks = [_per_head(operands[k]) for k in (key, partner)]
            if blocks[0] is None or blocks[1] is None:
                return None
            both = np.broadcast_arrays(blocks[0], blocks[1])
            found |= set(zip(both[0].reshape(-1).tolist(), both[1].reshape(-1).tolist(), strict=True))
            done |= {key, partner}
    return found if done == set(left) else None


def _contracted(node: ir.Node, rank: int) -> tuple[int, int] | None:
    """The axes of both operands that a product sums over."""
    if (node.domain, node.op_type) not in (("", "MatMul"), ("ai.onnx", "MatMul"), ("com.microsoft", "FusedMatMul")):
        return None
    flags = ("transA", "transB", "transBatchA", "transBatchB")
    turned = [bool(a.as_int()) if (a := node.attributes.get(name)) is not None else False for name in flags]
    if any(turned[2:]):
        return None
    return rank - 2 if turned[0] else rank - 1, rank - 1 if turned[1] else rank - 2


def _per_head(where: Index) -> Index | None:
    """[batch axes]: the one block that all units and positions of a head show (the units are the last axis)."""
    flat = where.reshape(*where.shape[:-2], -1)
    return flat[..., 0] if (flat == flat[..., :1]).all() else None


def _joined(pairs: set[tuple[int, int]]) -> list[tuple[set[int], set[int]]]:
    """Blocks that are multiplied with common ones, together."""
    out: list[tuple[set[int], set[int]]] = []
    for query, key in sorted(pairs):
        meet = [item for item in out if query in item[0] or key in item[1]]
        out = [item for item in out if item not in meet]
        out.append(({query}.union(*(q for q, _ in meet)), {key}.union(*(k for _, k in meet))))
    return out
