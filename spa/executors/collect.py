"""One forward pass over the samples, many measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.executors import kernels
from spa.executors.flow import Flow
from spa.executors.meter import ENOUGH, Meter
from spa.executors.segments import Segments
from spa.moments import Joint
from spa.progress import Progress, silent
from spa.runtime import Provider, Value
from spa.sites import Site

Keep = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Setup:
    """How forward passes are run."""

    batch: int = 32
    """Samples per run."""
    memory: int = 4 << 30
    """Bytes that measurements and activations may take together."""
    provider: Provider = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class Profile:
    """What single channels of one tensor do, per sample."""

    FIELDS: ClassVar[tuple[str, ...]] = ("mean", "variance", "absolute", "positions")

    mean: NDArray[np.float64]
    """[samples, channels], over positions."""
    variance: NDArray[np.float64]
    """[samples, channels], over the positions of one sample (divided by their number)."""
    absolute: NDArray[np.float64]
    """[samples, channels], mean magnitude over positions."""
    positions: NDArray[np.int64]
    """[samples]: positions per sample."""

    @property
    def rows(self) -> int:
        """Observations per channel."""
        return int(self.positions.sum())

    def pooled(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and unbiased variance over samples and positions together, [channels] each (Chan et al.'s merge)."""
        share = self.positions[:, None] / self.rows
        mean = (share * self.mean).sum(axis=0)
        inner = (self.positions[:, None] * self.variance).sum(axis=0)
        between = (self.positions[:, None] * (self.mean - mean) ** 2).sum(axis=0)
        return mean, (inner + between) / max(self.rows - 1, 1)

    def power(self) -> NDArray[np.float64]:
        """Mean square per sample, [samples, channels]."""
        return np.asarray(self.variance + self.mean**2)


class Channels(Protocol):
    """One axis of one activation."""

    @property
    def value(self) -> ir.Value:
        """The activation."""

    @property
    def axis(self) -> int:
        """The axis."""

    @property
    def rank(self) -> int:
        """Axes of the activation."""

    @property
    def key(self) -> tuple[str, int]:
        """Names both."""


def profiles(
    model: ir.Model,
    taps: Sequence[Channels],
    data: Calibration,
    setup: Setup,
    progress: Progress = silent,
) -> dict[tuple[str, int], Profile]:
    """Profile of each tap, by its key, in one pass."""
    parts = Segments.of(model, setup.provider, setup.threads)
    at: dict[str, dict[tuple[str, int], Channels]] = {}
    for tap in taps:
        at.setdefault(tap.key[0], {})[tap.key] = tap
    found: dict[tuple[str, int], list[tuple[NDArray[np.float64], int]]] = {tap.key: [] for tap in taps}
    done = 0
    progress("collect", done, data.samples)
    for size, stages in Flow(parts, list(at), data, setup.batch, setup.memory // 2):
        for values in stages:
            for name, x in values.items():
                kind = ir.DataType(parts.types.get(name, 0) or int(ir.DataType.FLOAT))
                for key, tap in at[name].items():
                    found[key].append(
                        kernels.profile(
                            tap.rank, tap.axis, kind, x, size, provider=setup.provider, threads=setup.threads
                        )
                    )
        done += size
        progress("collect", done, data.samples)
    out = {}
    for key, pieces in found.items():
        rows = np.concatenate([r for r, _ in pieces])
        positions = np.concatenate([np.full(len(r), n, dtype=np.int64) for r, n in pieces])
        out[key] = Profile(rows[:, 0], rows[:, 1], rows[:, 2], positions)
    return out


def covariances(
    model: ir.Model,
    sites: Sequence[Site],
    data: Calibration,
    setup: Setup,
    progress: Progress = silent,
    keep: Keep = lambda array: array,
) -> dict[str, Joint]:
    """Moments of the inputs of each site, by the name of the site: as many passes as the memory asks for.

    Sites that read the same (`Site.reading`) share one measurement, and one result. Matrices that are finished go
    through `keep`.
    """
    parts = Segments.of(model, setup.provider, setup.threads)
    shared = same_reading(sites)
    widest = [max(same, key=lambda site: site.rows) for same in shared.values()]
    weights = [8 * site.groups * site.columns * (site.columns + ENOUGH // 2) for site in widest]
    blocks = list(_blocks(widest, weights, setup.memory // 2))
    found: dict[str, Joint] = {}
    done = 0
    progress("collect", done, len(blocks) * data.samples)
    for block in blocks:
        meters = _Meters(parts, block, data, setup)
        for size, stages in Flow(parts, list(meters.at), data, setup.batch, setup.memory // 4):
            for values in stages:
                meters.take(values)
            done += size
            progress("collect", done, len(blocks) * data.samples)
        for site, moments in meters.close():
            moments.xx = keep(moments.xx)
            found.update((same.name, moments) for same in shared[site.reading])
    return found


def same_reading(sites: Iterable[Site]) -> dict[tuple[object, ...], list[Site]]:
    """Sites by what they read."""
    out: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        out.setdefault(site.reading, []).append(site)
    return out


class _Meters:
    """One meter per site of a block."""

    def __init__(self, parts: Segments, sites: Sequence[Site], data: Calibration, setup: Setup) -> None:
        self.at: dict[str, list[Meter]] = {}
        for site in sites:
            meter = Meter(
                site, data.samples, dtypes=_types(parts, site), provider=setup.provider, threads=setup.threads
            )
            self.at.setdefault(site.data.name or "", []).append(meter)

    def take(self, values: Mapping[str, Value]) -> None:
        for name, x in values.items():
            for meter in self.at[name]:
                meter.add(x)

    def close(self) -> Iterator[tuple[Site, Joint]]:
        """The moments, one site after the other; what a meter held is given up."""
        for meters in self.at.values():
            while meters:
                meter = meters.pop()
                moments = meter.moments()
                if moments is not None:
                    yield meter.site, moments


def _types(parts: Segments, site: Site) -> tuple[ir.DataType, ir.DataType]:
    found = [parts.types.get(v.name or "", 0) or int(ir.DataType.FLOAT) for v in (site.data, site.output)]
    return ir.DataType(found[0]), ir.DataType(found[1])


def _blocks(sites: Sequence[Site], weights: Sequence[int], memory: int) -> Iterator[list[Site]]:
    """Cut `sites` into runs whose weights stay below `memory`."""
    block: list[Site] = []
    taken = 0
    for site, weight in zip(sites, weights, strict=True):
        if block and taken + weight > memory:
            yield block
            block, taken = [], 0
        block.append(site)
        taken += weight
    if block:
        yield block
