"""One forward pass over the samples, many measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.executors import kernels
from spa.executors.meter import ENOUGH, Meter
from spa.executors.segments import Segments, placed
from spa.moments import Joint
from spa.progress import Progress, silent
from spa.runtime import Provider
from spa.sites import Site


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
    found: dict[tuple[str, int], list[tuple[NDArray[np.float64], int]]] = {tap.key: [] for tap in taps}
    run = parts.runner([tap.value.name or "" for tap in taps], (), optimize=True)
    done = 0
    progress("collect", done, data.samples)
    for batch in data.batches(setup.batch):
        values = run(placed(batch))
        for tap in {t.key: t for t in taps}.values():
            kind = ir.DataType(parts.types.get(tap.key[0], 0) or int(ir.DataType.FLOAT))
            x = values[tap.key[0]]
            found[tap.key].append(
                kernels.profile(tap.rank, tap.axis, kind, x, _size(batch), provider=setup.provider,
                                threads=setup.threads)
            )  # fmt: skip
        done += _size(batch)
        progress("collect", done, data.samples)
    out = {}
    for key, pieces in found.items():
        rows = np.concatenate([r for r, _ in pieces])
        positions = np.concatenate([np.full(len(r), n, dtype=np.int64) for r, n in pieces])
        out[key] = Profile(rows[:, 0], rows[:, 1], rows[:, 2], positions)
    return out


def covariances(
    model: ir.Model, sites: Sequence[Site], data: Calibration, setup: Setup, progress: Progress = silent
) -> dict[str, Joint]:
    """Moments of the inputs of each site, by the name of the site: as many passes as the memory asks for.

    Sites that read the same (`Site.reading`) share one measurement, and one result.
    """
    parts = Segments.of(model, setup.provider, setup.threads)
    shared: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        shared.setdefault(site.reading, []).append(site)
    widest = [max(same, key=lambda site: site.rows) for same in shared.values()]
    weights = [8 * site.groups * site.columns * (site.columns + ENOUGH // 2) for site in widest]
    blocks = list(_blocks(widest, weights, setup.memory))
    found: dict[str, Joint] = {}
    done = 0
    progress("collect", done, len(blocks) * data.samples)
    for block in blocks:
        meters = [Meter(site, data.samples, dtypes=_types(parts, site), provider=setup.provider,
                        threads=setup.threads) for site in block]  # fmt: skip
        run = parts.runner([site.data.name or "" for site in block], (), optimize=True)
        for batch in data.batches(setup.batch):
            values = run(placed(batch))
            for meter in meters:
                meter.add(values[meter.site.data.name or ""])
            done += _size(batch)
            progress("collect", done, len(blocks) * data.samples)
        for meter in meters:
            moments = meter.moments()
            if moments is not None:
                found.update((site.name, moments) for site in shared[meter.site.reading])
    return found


def _types(parts: Segments, site: Site) -> tuple[ir.DataType, ir.DataType]:
    found = [parts.types.get(v.name or "", 0) or int(ir.DataType.FLOAT) for v in (site.data, site.output)]
    return ir.DataType(found[0]), ir.DataType(found[1])


def _size(batch: dict[str, NDArray[np.generic]]) -> int:
    return len(next(iter(batch.values())))


def _blocks(sites: Sequence[Site], weights: Sequence[int], memory: int) -> Iterator[list[Site]]:
    """Cut `sites` into runs whose weights stay below half of the memory; the other half is for activations."""
    block: list[Site] = []
    taken = 0
    for site, weight in zip(sites, weights, strict=True):
        if block and taken + weight > memory // 2:
            yield block
            block, taken = [], 0
        block.append(site)
        taken += weight
    if block:
        yield block
