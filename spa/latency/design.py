"""At which widths a model is measured: every group takes all its widths, each together with all kinds of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spa.budget.queues import alignment
from spa.groups import Group
from spa.latency.device import DENSE

MODELS = 40
"""With widths drawn at random: enough for some samples of each pair of (input, output) widths of a layer."""
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85)
"""Of every group, kept in further models: where pruned models lie."""
CLASSES = (1, 2, 4, 8, 16, 32)
"""Alignments that are compared: widths that are a multiple of one, and not of its double."""
_ALIGNED_AT = 0.6
_LEVELS = 16
_LEAST, _MOST = 4, 8


@dataclass(frozen=True)
class Configuration:
    """Widths of one model that is measured."""

    name: str
    widths: dict[str, int]
    """Units kept, per group that loses any."""


def step_of(group: Group) -> int:
    """Units kept are a multiple of this: 1 for heads, else 8 (whether 16 is better is measured), in narrow groups 4.

    At other widths kernels are slow throughout, which is measured for all groups together (`CLASSES`).
    """
    step = alignment(group, "auto")
    return step if step == 1 or group.units < 2 * _LEAST else min(max(step, _LEAST), _MOST)


def widths_of(group: Group) -> list[int]:
    """The widths at which a group is measured, at most `_LEVELS`, largest last."""
    step = step_of(group)
    few = [w for w in range(step, group.units, step) if w >= group.least]
    chosen = [w for w in few if w >= 0.08 * group.units] or few
    if len(chosen) >= _LEVELS:
        chosen = [chosen[k] for k in np.linspace(0, len(chosen) - 1, _LEVELS - 1).round().astype(int)]
    return [*chosen, group.units]


def configurations(groups: Sequence[Group], models: int = MODELS, seed: int = 0) -> list[Configuration]:
    """The dense model, `models` with random widths, some with all widths reduced alike, some per alignment.

    Random widths are a Latin hypercube: over all models each group takes each of its widths equally often.
    """
    rng = np.random.default_rng(seed)
    out = [Configuration(DENSE, {})]
    drawn: dict[str, list[int]] = {}
    for group in groups:
        levels = widths_of(group)
        many = np.resize(rng.permutation(levels), models)
        drawn[group.name] = rng.permutation(many).tolist()
    out += [Configuration(f"random{k}", {name: w[k] for name, w in drawn.items()}) for k in range(models)]
    for share in SHARES if models >= len(SHARES) else ():
        widths = {g.name: _nearest(widths_of(g), share * g.units) for g in groups}
        out.append(Configuration(f"share{round(100 * share)}", widths))
    for step in CLASSES:
        out.append(Configuration(f"align{step}", {g.name: _aligned(g, step) for g in groups}))
    return out


def _aligned(group: Group, step: int) -> int:
    """A width of this alignment and no better one, where the group is wide enough for a choice."""
    if step_of(group) == 1:
        return max(group.least, round(_ALIGNED_AT * group.units))
    while step > 1 and step * 4 > group.units:
        step //= 2
    return _nearest([*range(step, group.units, 2 * step)] or [group.units], _ALIGNED_AT * group.units)


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: abs(width - wanted))
