"""One forward pass over the samples, many measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.executors import kernels
from spa.executors.meter import Meter
from spa.executors.segments import Segments, placed
from spa.moments import Joint
from spa.runtime import Provider
from spa.sites import Site

Progress = Callable[[float], None]


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


def profiles(
    model: ir.Model, sites: Sequence[Site], data: Calibration, setup: Setup, progress: Progress | None = None
) -> dict[str, Profile]:
    """Profile of the input of each site, by the name of the input tensor."""
    taps = {site.data.name or "": site for site in sites}
    found: dict[str, list[tuple[NDArray[np.float64], int]]] = {name: [] for name in taps}
    parts = Segments.of(model, setup.provider, setup.threads)
    for names in _blocks(list(taps), [0] * len(taps), setup.memory):
        run = parts.runner(names, ())
        for k, batch in enumerate(data.batches(setup.batch)):
            size = _size(batch)
            values = run(placed(batch))
            for name in names:
                site = taps[name]
                dtype = ir.DataType(parts.types.get(name, int(ir.DataType.FLOAT)))
                tokens = site.layout == "tokens"
                width = site.groups * site.channels
                result = kernels.profile(
                    tokens, width, dtype, values[name], size, provider=setup.provider, threads=setup.threads
                )
                found[name].append(result)
            if progress is not None:
                progress(min((k + 1) * setup.batch / data.samples, 1.0))
    out = {}
    for name, parts_ in found.items():
        rows = np.concatenate([r for r, _ in parts_])
        positions = np.concatenate([np.full(len(r), n, dtype=np.int64) for r, n in parts_])
        out[name] = Profile(rows[:, 0], rows[:, 1], rows[:, 2], positions)
    return out


def covariances(
    model: ir.Model, sites: Sequence[Site], data: Calibration, setup: Setup, progress: Progress | None = None
) -> dict[str, Joint]:
    """Moments of the inputs of each site, by the name of the site: as many passes as the memory asks for."""
    parts = Segments.of(model, setup.provider, setup.threads)
    meters = {site.name: Meter(site, data.samples, dtypes=_types(parts, site), provider=setup.provider,
                               threads=setup.threads) for site in sites}  # fmt: skip
    weights = [8 * site.groups * site.columns**2 for site in sites]
    for names in _blocks([site.name for site in sites], weights, setup.memory):
        chosen = [meters[name].site for name in names]
        run = parts.runner([site.data.name or "" for site in chosen], ())
        for k, batch in enumerate(data.batches(setup.batch)):
            values = run(placed(batch))
            for site in chosen:
                meters[site.name].add(values[site.data.name or ""])
            if progress is not None:
                progress(min((k + 1) * setup.batch / data.samples, 1.0))
    return {name: meter.total for name, meter in meters.items() if meter.total is not None}


def _types(parts: Segments, site: Site) -> tuple[ir.DataType, ir.DataType]:
    found = [parts.types.get(v.name or "", 0) or int(ir.DataType.FLOAT) for v in (site.data, site.output)]
    return ir.DataType(found[0]), ir.DataType(found[1])


def _size(batch: dict[str, NDArray[np.generic]]) -> int:
    return len(next(iter(batch.values())))


def _blocks(names: Sequence[str], weights: Sequence[int], memory: int) -> Iterator[list[str]]:
    """Cut `names` into runs whose weights stay below half of the memory; the other half is for activations."""
    block: list[str] = []
    taken = 0
    for name, weight in zip(names, weights, strict=True):
        if block and taken + weight > memory // 2:
            yield block
            block, taken = [], 0
        block.append(name)
        taken += weight
    if block:
        yield block
