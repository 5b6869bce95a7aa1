"""CFSP: relative importance of weights, times activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.consumers import Tap
from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing
from spa.evidence import Evidence, Vector
from spa.executors.collect import Profile
from spa.groups import Group


def _cfsp(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """(|w_in| ||h|| share + shares of |w_out|) x ||h||: shares are relative to the whole matrix, exponents 1.

    The coarse stage of the paper (a ratio per block from angular distance) is left to the allocation.
    """
    produced = np.zeros(group.units)
    for member in group.members:
        if member.role == "out" and member.rank >= 2:
            mine = evidence.per_unit(group, member, evidence.power_sums(member, 1))
            produced += mine / (mine.sum() + 1e-30)

    def weighted(tap: Tap, profile: Profile) -> Vector:
        """||h|| times the L1 norm of the weights that read it."""
        norm = np.sqrt(profile.power().mean(axis=0))
        if tap.site is None:
            return np.asarray(norm)
        site = tap.site
        read = np.abs(tap.site.weights).sum(axis=1).reshape(site.groups, site.taps, site.channels)
        return np.asarray(norm * read.sum(axis=1).reshape(-1))

    def plain(tap: Tap, profile: Profile) -> Vector:
        return np.asarray(np.sqrt(profile.power().mean(axis=0)))

    norms = activations(group, evidence, plain, every_reader=True)
    shares = [row / (row.sum() + 1e-30) for row in activations(group, evidence, weighted, every_reader=True)]
    rows = [(share + produced) * norm for share, norm in zip(shares, norms, strict=True)]
    return rows or nothing(group)


CFSP = Criterion("cfsp", "(share of |w| ||h|| + shares of |w_out|) ||h|| (CFSP, COLING 2025)", _cfsp, "data")
