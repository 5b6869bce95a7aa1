"""Structured optimal brain surgeon: what a unit's leaving costs its consumers once they are refit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing
from spa.criteria.weights import l2
from spa.evidence import Evidence, Vector
from spa.groups import Group
from spa.least_squares import Consumer, damped, greedy, swapped
from spa.measured import Measured
from spa.sites import Site

DAMPING = 1e-2


def consumers(group: Group, measured: Measured) -> list[Consumer]:
    """The group's readers as least-squares problems; each counts relative to the variance of its own output.

    They are kept with the measurements: their inverses are wanted more than once.
    """
    known = measured.problems.get(group.name)
    if known is not None:
        return known
    out = measured.problems[group.name] = []
    for tap in measured.readers(group):
        assert tap.site is not None
        joint, weight, columns = measured.joint(tap.site), tap.site.weights, tap.columns(group.units)
        total = float(np.einsum("gmd,gde,gme->", weight, joint.xx, weight, optimize=True)) / joint.rows
        importance = 1.0 / max(total, 1e-30)
        weight = measured.shelf.keep(weight)
        out += [
            Consumer(weight[g], measured.inverse(tap.site, g, DAMPING), columns[g], importance)
            for g in range(len(weight))
        ]
    return out


def _obspa(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Each unit's share of the loss at the moment it leaves, never less than that of those before it."""
    problems = consumers(group, evidence.measured)
    if not problems:
        return [_energy(group, evidence)]
    found = greedy(problems)
    steps = np.maximum.accumulate(np.diff(found.loss))
    scores = np.empty(group.units)
    scores[found.order] = steps * (1 + 1e-9 * np.arange(group.units)) + 1e-300 * np.arange(group.units)
    return [scores]


def _swapped(group: Group, evidence: Evidence, removed: NDArray[np.int64]) -> NDArray[np.int64]:
    problems = consumers(group, evidence.measured)
    return swapped(problems, removed) if problems else removed


def _energy(group: Group, evidence: Evidence) -> Vector:
    """Where no weight reads the units (both sides of q k^T are activations): share of the power of the product."""
    rows = activations(group, evidence, lambda tap, profile: profile.power().mean(axis=0))
    product = np.square(l2(group, evidence))
    if rows:
        product = np.prod([row / (row.max() + 1e-30) for row in rows], axis=0)
    return np.asarray(product / (product.sum() + 1e-30))


def _paper(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """w^2 / [H^-1]_jj summed over a unit's slices in consumers and producers, H = E[x x^T] (uncentred, damped)."""
    measured = evidence.measured
    rows = []
    for tap in measured.readers(group):
        site = tap.site
        assert site is not None
        scores = _per_weight(site, measured).sum(axis=1).reshape(site.groups, site.taps, site.channels)
        rows.append(tap.per_unit(scores.sum(axis=1).reshape(-1), group.units))
    made = {site.weight: site for site in measured.sites}
    for member in group.members:
        if member.role == "out" and member.value in made:
            site = made[member.value]
            if member.axis == site.output_axis:
                scores = _per_weight(site, measured).sum(axis=2)  # [g, m]
                # where inputs come first, the axis holds the outputs within a group, and all groups lose the same
                along = scores.sum(axis=0) if site.output_axis else scores.reshape(-1)
                rows.append(evidence.per_unit(group, member, along))
    return rows or nothing(group)


def _per_weight(site: Site, measured: Measured) -> NDArray[np.float64]:
    """w_ij^2 / [H^-1]_jj, [g, m, k c]."""
    joint, weight = measured.joint(site), site.weights
    out = np.empty_like(weight)
    for g in range(site.groups):
        second = joint.covariance[g] + np.outer(joint.mean_x[g], joint.mean_x[g])
        out[g] = weight[g] ** 2 / np.diag(np.linalg.inv(damped(second, DAMPING)))
    return out


OBSPA = (
    Criterion(
        "obspa",
        "tr(w (Cinv_jj)^-1 w^T), greedy (SPA's OBS, arXiv 2403.18955, exact by blocks)",
        _obspa,
        "data",
        _swapped,
    ),
    Criterion("obspa-paper", "w^2 / [H^-1]_jj over all slices (SPA, arXiv 2403.18955)", _paper, "data"),
)  # fmt: skip
