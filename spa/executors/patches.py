"""Which input positions each output position of a convolution reads, and which output positions are looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.sites import Site


def _list(site: Site, name: str, default: int, rank: int) -> list[int]:
    attribute = site.node.attributes.get(name)
    return [default] * rank if attribute is None else [int(v) for v in attribute.as_ints()]


def _pads(site: Site, space: Sequence[int], strides: list[int], spans: list[int]) -> list[int]:
    """Pads before each axis."""
    rank = len(space)
    mode = site.node.attributes.get("auto_pad")
    kind = "NOTSET" if mode is None else mode.as_string()
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        out = []
        for size, stride, span in zip(space, strides, spans, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            out.append(total // 2 if kind == "SAME_UPPER" else total - total // 2)
        return out
    return [0] * rank if kind == "VALID" else _list(site, "pads", 0, 2 * rank)[:rank]


def window(site: Site, space: Sequence[int], out_space: Sequence[int], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Flat input position of each kernel tap for the flat output positions `chosen`: [chosen, taps].

    Positions outside of the input are given as the number of input positions.

    Args:
        site: a convolution, plain or transposed.
        space: spatial sizes of its input.
        out_space: spatial sizes of its output.
        chosen: flat output positions.
    """
    rank = len(space)
    strides, dilations = _list(site, "strides", 1, rank), _list(site, "dilations", 1, rank)
    spans = [(k - 1) * d + 1 for k, d in zip(site.kernel, dilations, strict=True)]
    place = np.unravel_index(chosen, tuple(out_space))
    taps = np.unravel_index(np.arange(site.taps), site.kernel)
    flat = np.zeros((len(chosen), site.taps), dtype=np.int64)
    inside = np.ones((len(chosen), site.taps), dtype=bool)
    pads = _pads(site, space, strides, spans) if site.layout == "conv" else _transposed_pads(site, space, out_space)
    for a in range(rank):
        if site.layout == "conv":
            at = place[a][:, None] * strides[a] - pads[a] + taps[a][None, :] * dilations[a]
        else:
            at = place[a][:, None] + pads[a] - taps[a][None, :] * dilations[a]
            inside &= at % strides[a] == 0
            at = at // strides[a]
        inside &= (at >= 0) & (at < space[a])
        flat = flat * space[a] + at
    return np.where(inside, flat, math.prod(space))


def _transposed_pads(site: Site, space: Sequence[int], out_space: Sequence[int]) -> list[int]:
    """Pads before each axis of a transposed convolution; where they are automatic they follow from its output size."""
    rank = len(space)
    mode = site.node.attributes.get("auto_pad")
    kind = "NOTSET" if mode is None else mode.as_string()
    if kind not in ("SAME_UPPER", "SAME_LOWER") and "output_shape" not in site.node.attributes:
        return _list(site, "pads", 0, 2 * rank)[:rank]
    strides, dilations = _list(site, "strides", 1, rank), _list(site, "dilations", 1, rank)
    extra = _list(site, "output_padding", 0, rank)
    out = []
    for a in range(rank):
        span = (site.kernel[a] - 1) * dilations[a] + 1
        total = max(strides[a] * (space[a] - 1) + extra[a] + span - out_space[a], 0)
        out.append(total // 2 if kind == "SAME_UPPER" else total - total // 2)
    return out


def output_space(site: Site, space: Sequence[int]) -> tuple[int, ...]:
    """Spatial sizes of the output of a convolution that reads `space`."""
    rank = len(space)
    strides, dilations = _list(site, "strides", 1, rank), _list(site, "dilations", 1, rank)
    spans = [(k - 1) * d + 1 for k, d in zip(site.kernel, dilations, strict=True)]
    mode = site.node.attributes.get("auto_pad")
    same = mode is not None and mode.as_string().startswith("SAME")
    pads = _list(site, "pads", 0, 2 * rank)
    if mode is not None and mode.as_string() == "VALID":
        pads = [0] * (2 * rank)
    if site.layout == "conv":
        if same:
            return tuple(math.ceil(n / s) for n, s in zip(space, strides, strict=True))
        return tuple((space[a] + pads[a] + pads[a + rank] - spans[a]) // strides[a] + 1 for a in range(rank))
    if "output_shape" in site.node.attributes:
        return tuple(_list(site, "output_shape", 0, rank)[-rank:])
    if same:
        return tuple(n * s for n, s in zip(space, strides, strict=True))
    extra = _list(site, "output_padding", 0, rank)
    return tuple(strides[a] * (space[a] - 1) + extra[a] + spans[a] - pads[a] - pads[a + rank] for a in range(rank))


_CHEAP = 2e9
"""Multiply-accumulates for the moments of one operator that nobody needs to save."""


_SPEED = 0.75
"""Of a Gram matrix relative to a convolution with as many multiplications, about."""


def sample(site: Site, space: Sequence[int], samples: int, *, least: int = 20, most: int = 1000) -> NDArray[np.int64]:
    """Output positions that are looked at, of a grid `space`: the same for all samples, spread evenly.

    As many as make the moments cost what the operator costs itself; more if it takes more to have `least` rows per
    column over all samples, but then at most twice that cost, unless it is next to nothing. Never fewer than give a
    row for every four columns, and no more than give `most` per column: a fit of d columns to N rows loses d / N of
    the variance to noise, and from there on only more samples help.
    """
    positions = math.prod(space)
    affordable = _SPEED * positions * site.rows / site.columns
    needed = least * site.columns / max(samples, 1)
    cheap = _CHEAP / (max(samples, 1) * site.groups * site.columns**2)
    fewest = math.ceil(site.columns / (4 * max(samples, 1)))
    enough = math.ceil(most * site.columns / max(samples, 1))
    count = int(min(max(affordable, min(needed, max(2 * affordable, cheap)), fewest), enough, positions))
    if count == positions:
        return np.arange(positions)
    return np.sort(spread_evenly(tuple(space), count))


@lru_cache(maxsize=256)
def spread_evenly(space: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """`count` positions of a grid, flat, that cover it evenly.

    Those of a low-discrepancy sequence: multiples of powers of 1/g modulo 1, g^(d + 1) = g + 1 for d axes (the golden
    ratio for one), as in Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018). Positions drawn by
    chance miss whole corners where there are few, and a refit then knows nothing of them. Each is moved by chance
    within its own share of the grid: what repeats every few positions, as behind a stride, is not hit in step.
    """
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (len(space) + 1))
    steps = root ** -np.arange(1.0, len(space) + 1)
    jitter = np.random.default_rng(0).random((4 * count, len(space))) * count ** (-1 / len(space))
    points = (np.arange(4 * count)[:, None] * steps + jitter) % 1
    cells = np.ravel_multi_index(tuple((points * space).astype(np.int64).T), space)
    found, first = np.unique(cells, return_index=True)
    order = found[np.argsort(first)]
    rest = np.setdiff1d(np.arange(math.prod(space)), found) if len(order) < count else order[:0]
    return np.append(order, rest)[:count].astype(np.int64)


def spatial(shape: Sequence[Any]) -> tuple[int, ...]:
    """Sizes behind batch and channels."""
    return tuple(int(n) for n in shape[2:])
