"""The best basis inside attention heads: which r numbers of a head's d serve its queries and keys, or its values, best.

Which of the d dims of a head leave does not matter if the others may be mixed. For queries and keys the kept r take the
best product of rank r, in closed form: with Q = E[q q^T] and K = Cov(k) (a constant added to all keys changes no
softmax), the singular value decomposition Q^1/2 K^1/2 = U S V^T gives q' = S^1/2 U_r^T Q^-1/2 q and
k' = S^1/2 V_r^T K^-1/2 k, and the loss is the sum of the other s^2. For values the r directions that matter most to the
output projection, from W C^1/2 = U S V^T with their covariance C behind the probabilities, which is refit to them.

Source: A3, arXiv 2505.12942 (QK and OV parts), there without biases. New here: it applies to groups as the graph has
them (q, k and v that only leave together included), one r for all heads of a layer, on the pruned prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.compensate.bias import bias_of
from spa.compensate.heads import Heads, Outlet, Product, Rows, find_heads
from spa.compensate.pairs import kept_outputs
from spa.groups import Group
from spa.least_squares import refit
from spa.measured import Measured
from spa.removal import Mask
from spa.sites import Site, constant_of, exchange, site_of
from spa.twin import Twin

Array = NDArray[np.float64]
Index = NDArray[np.int64]
DAMPING = 1e-2
"""Ridge for what reads mixed values."""
FLOOR = 1e-6
"""Directions with less of the variance than this share of the largest count as not there."""


@dataclass(frozen=True, eq=False)
class Part:
    """The units of one head in one projection, and what to mix them with."""

    rows: Rows
    mix: Array
    """[units, units]: the first r rows give the best r numbers."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How the heads of one group are mixed."""

    heads: Heads
    parts: tuple[Part, ...]
    losses: Array
    """[units]: what leaves with the last, the second last, ... number; relative to the power of what is computed."""

    def scores(self, before: Array) -> Array:
        """Losses in the order of other scores: which of the units leave is all the same, but how many. [units]"""
        out = np.empty(len(before))
        out[np.argsort(before, kind="stable")] = self.losses
        return out

    def rows(self, site: Site, outputs: Index, kept: Index) -> Array | None:
        """Rows of the original `site` to those of the pruned one, [len(outputs), rows]; None if it makes no heads.

        Args:
            site: a projection of the original model.
            outputs: its rows that the pruned model has, others than these heads' included.
            kept: units that the pruned model has, ascending.
        """
        mine = [part for part in self.parts if part.rows.site.node is site.node]
        if not mine or len(kept) == self.heads.group.units:
            return None
        out = np.zeros((len(outputs), site.rows))
        out[np.arange(len(outputs)), outputs] = 1.0
        place = {row: k for k, row in enumerate(outputs.tolist())}
        for part in mine:
            index = part.rows.index
            at = [place[row] for row in index[kept].tolist() if row in place]
            if len(at) == len(kept):  # else the head is gone
                out[at] = 0.0
                out[np.ix_(np.array(at), index)] = part.mix[: len(kept)]
        return out


def find_rotations(groups: Sequence[Group], measured: Measured) -> dict[str, Rotation]:
    """By name the groups whose units may be mixed within heads; measures what it needs."""
    found = find_heads(groups, measured)
    sites = {rows.site.name: rows.site for heads in found.values() for rows in _made(heads)}
    sites |= {c.site.name: c.site for heads in found.values() for o in heads.outlets for c in o.readers}
    measured.measure(sites.values())
    return {name: _rotation(heads, measured) for name, heads in found.items()}


def _made(heads: Heads) -> list[Rows]:
    inner = [rows for product in heads.products for rows in (*product.queries, *product.keys)]
    return [*inner, *(outlet.values for outlet in heads.outlets)]


def _rotation(heads: Heads, measured: Measured) -> Rotation:
    units = heads.group.units
    parts: list[Part] = []
    losses = np.zeros(units)
    products = [_product(product, measured) for product in heads.products]
    total = sum(float(np.square(s).sum()) for _, s in products)
    for mixed, s in products:
        parts += mixed
        losses += np.square(s) / max(total, 1e-300)
    outlets = [_outlet(outlet, measured) for outlet in heads.outlets]
    total = sum(float(np.square(s).sum()) for _, s in outlets)
    for part, s in outlets:
        parts.append(part)
        losses += np.square(s) / max(total, 1e-300)
    return Rotation(heads, tuple(parts), losses[::-1])


def _product(product: Product, measured: Measured) -> tuple[list[Part], Array]:
    """The mixing of one head's queries and keys, and the singular values of their product."""
    queries = sum(_second(rows, measured, centred=False) for rows in product.queries)
    keys = sum(_second(rows, measured, centred=True) for rows in product.keys)
    q, q_inverse = _roots(np.asarray(queries))
    k, k_inverse = _roots(np.asarray(keys))
    u, s, vt = np.linalg.svd(q @ k)
    root = np.sqrt(s)[:, None]
    parts = [Part(rows, root * (u.T @ q_inverse)) for rows in product.queries]
    return [*parts, *(Part(rows, root * (vt @ k_inverse)) for rows in product.keys)], s


def _outlet(outlet: Outlet, measured: Measured) -> tuple[Part, Array]:
    """The mixing of one head's values, and the singular values of what they add to the output."""
    units = len(outlet.values.index)
    covariance, reach = np.zeros((units, units)), np.zeros((units, units))
    for reader in outlet.readers:
        joint, weight = measured.joint(reader.site), reader.site.weights[0][:, reader.index]
        covariance += joint.covariance[0][np.ix_(reader.index, reader.index)] / len(outlet.readers)
        reach += weight.T @ weight
    root, inverse = _roots(covariance)
    values, vectors = np.linalg.eigh(root @ reach @ root)
    order = np.argsort(-values, kind="stable")
    mix = vectors[:, order].T @ inverse
    # only the spaces that the first r span matter: orthonormal rows keep the numbers in the range they had
    return Part(outlet.values, np.linalg.qr(mix.T)[0].T), np.sqrt(np.maximum(values[order], 0.0))


def _second(rows: Rows, measured: Measured, *, centred: bool) -> Array:
    """Cov(y) of some outputs of a projection, or E[y y^T] with its bias."""
    joint, weight = measured.joint(rows.site), rows.site.weights[0][rows.index]
    out = weight @ joint.covariance[0] @ weight.T
    if not centred:
        mean = weight @ joint.mean_x[0] + _bias(rows.site)[rows.index]
        out = out + np.outer(mean, mean)
    return np.asarray(out)


def _bias(site: Site) -> Array:
    tensor = constant_of(site.bias) if site.bias is not None else None
    if tensor is None:
        return np.zeros(site.rows)
    return np.asarray(tensor.numpy().astype(np.float64).reshape(-1) * site.bias_scale)


def _roots(matrix: Array) -> tuple[Array, Array]:
    """Square root of a covariance, and its inverse where there is any variance."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, FLOOR * max(float(values[-1]), 1e-300))
    root = np.sqrt(values)
    return np.asarray((vectors * root) @ vectors.T), np.asarray((vectors / root) @ vectors.T)


class Mixer:
    """The rotations of one plan: which rows of each projection the pruned model mixes."""

    def __init__(self, measured: Measured, rotations: Mapping[str, Rotation], kept: Mask) -> None:
        self.measured, self.coupling, self.kept = measured, measured.analysis.coupling, kept
        self.rotations: list[Rotation] = []
        self.units: list[Index] = []
        for rotation in rotations.values():
            units = np.flatnonzero(kept[rotation.heads.group.positions[:, 0]])
            if 0 < len(units) < rotation.heads.group.units:
                self.rotations.append(rotation)
                self.units.append(units)

    def rows(self, site: Site) -> Array | None:
        """What the outputs of the pruned site are made of, [rows kept, rows]; None if they are as they were."""
        outputs = self.outputs(site)
        found = [
            m for r, u in zip(self.rotations, self.units, strict=True) if (m := r.rows(site, outputs, u)) is not None
        ]
        if not found:
            return None
        out = found[0]
        for other in found[1:]:  # groups that share a projection mix rows of their own
            changed = (other != np.eye(site.rows)[outputs]).any(axis=1)
            out[changed] = other[changed]
        return out

    def outputs(self, site: Site) -> Index:
        """Rows of a projection that stay."""
        outputs = kept_outputs(self.coupling, site, self.kept)
        assert outputs is not None
        return outputs

    def inputs(self, site: Site) -> Index:
        """Columns of a layer that stay."""
        dims = self.coupling.dims(site.data)
        assert dims is not None
        return np.flatnonzero(self.coupling.solution.keep(dims[-1], self.kept))

    def write(self, twin: Twin) -> None:
        """Give the projections of the pruned model their mixed rows, and what reads the values its weights for them."""
        sites = {part.rows.site: None for rotation in self.rotations for part in rotation.parts}
        for site in sites:
            mix, mirror = self.rows(site), site_of(twin.node(site.node))
            if mix is None or mirror is None:
                continue
            weight = mix @ site.weights[0][:, self.inputs(site)]
            exchange(mirror.weight, mirror.stored(weight[None]))
            if site.bias is not None:
                bias_of(twin, mirror).write(mix @ _bias(site))
        readers = {c.site: None for r in self.rotations for o in r.heads.outlets for c in o.readers}
        for site in readers:
            self._read(twin, site)

    def _read(self, twin: Twin, site: Site) -> None:
        """Refit what reads the values of heads to the mixed ones."""
        mirror = site_of(twin.node(site.node))
        if mirror is None:
            return
        inputs, outputs = self.inputs(site), self.outputs(site)
        place = {column: k for k, column in enumerate(inputs.tolist())}
        mix = np.zeros((len(inputs), site.columns))
        mix[np.arange(len(inputs)), inputs] = 1.0
        for rotation, units in zip(self.rotations, self.units, strict=True):
            mixes = {part.rows: part.mix[: len(units)] for part in rotation.parts}
            for outlet in rotation.heads.outlets:
                for reader in outlet.readers:
                    at = [place[c] for c in reader.index[units].tolist() if c in place]
                    if reader.site.node is site.node and len(at) == len(units):
                        mix[at] = 0.0
                        mix[np.ix_(np.array(at), reader.index)] = mixes[outlet.values]
        joint, weight = self.measured.joint(site), site.weights[0][outputs]
        cross = mix @ joint.covariance[0]
        new = refit(cross @ mix.T, weight @ cross.T, weight @ mix.T, DAMPING)
        exchange(mirror.weight, mirror.stored(new[None]))
        bias = bias_of(twin, mirror)
        bias.write(bias.read() + (weight - new @ mix) @ joint.mean_x[0])
