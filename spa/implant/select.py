"""Which units become implants: those that matter least, or of those that a plan removes the ones that matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spa.budget.queues import Align, alignment
from spa.errors import TargetError
from spa.evidence import Vector
from spa.implant.candidates import Candidate, Index


def choose_units(
    candidates: Sequence[Candidate],
    scores: Mapping[str, Vector],
    share: float,
    align: Align,
    leaving: Mapping[str, NDArray[np.bool_]] | None = None,
) -> list[tuple[Candidate, Index]]:
    """Groups with the units that become implants, [implants] each.

    One threshold for all groups, then the nearest multiple of the alignment in each; one unit of a group at least
    keeps its kernel.

    Args:
        candidates: the groups.
        scores: importance of each unit per group, comparable across groups, [units] each.
        share: of all units of these groups (of those that leave, if there are any such).
        align: implants per group are a multiple of this.
        leaving: per group the units that a plan removes, [units] each: the most important of them are taken.

    Raises:
        TargetError: the share is less than what kernels like in any group.
    """
    ranked: list[tuple[float, int, int]] = []
    for k, candidate in enumerate(candidates):
        of = scores[candidate.group.name]
        pool = np.arange(len(of)) if leaving is None else np.flatnonzero(leaving[candidate.group.name])
        sign = 1.0 if leaving is None else -1.0
        ranked.extend((sign * float(of[unit]), k, unit) for unit in pool.tolist())
    ranked.sort()
    taken: list[list[int]] = [[] for _ in candidates]
    pools = [sum(1 for _, k, _ in ranked if k == place) for place in range(len(candidates))]
    for _, k, unit in ranked[: round(share * len(ranked))]:
        taken[k].append(unit)
    out = []
    for k, candidate in enumerate(candidates):
        step = alignment(candidate.group, align)
        most = min(pools[k], candidate.group.units - 1)
        count = min(round(len(taken[k]) / step) * step, most // step * step)
        order = [unit for _, place, unit in ranked if place == k]
        if count:
            out.append((candidate, np.sort(np.array(order[:count], dtype=np.int64))))
    if not out:
        what = "channels that can become 1 x 1" if leaving is None else "such channels that the plan removes"
        raise TargetError(
            f"a share of {share:g} of the {len(ranked)} {what} is less than one step in each layer; "
            "give a larger --share, or --align 1"
        )
    return out
