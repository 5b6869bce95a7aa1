"""What calibration samples say about a model: each measurement is taken once, kept, and found again in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spa.cache import Cache
from spa.calibration import Calibration
from spa.calibration.data import plural
from spa.calibration.trials import needed
from spa.consumers import Tap, taps
from spa.errors import UsageError
from spa.executors.collect import Profile, Setup, covariances, profiles, same_reading
from spa.groups import Analysis, Group
from spa.least_squares import Consumer, damped
from spa.moments import Joint
from spa.progress import Progress, silent
from spa.shelf import Shelf
from spa.sites import Site, find_sites

FEWEST = 8
"""Columns per observation above which not even a ridge helps."""
_BLOCK = 64


@dataclass
class Measured:
    """Statistics of one model on one set of samples."""

    analysis: Analysis
    groups: Sequence[Group]
    data: Calibration
    setup: Setup = field(default_factory=Setup)
    cache: Cache = field(default_factory=Cache)
    progress: Progress = silent
    given: int | None = None
    """Samples that the user gave, where some of them are held out of `data`."""
    shelf: Shelf = field(init=False)
    problems: dict[str, list[Consumer]] = field(default_factory=dict)
    """What a criterion made of the moments, by group."""
    _profiles: dict[tuple[str, int], Profile] = field(default_factory=dict)
    _inverses: dict[tuple[tuple[object, ...], int, float], NDArray[np.float64]] = field(default_factory=dict)
    _joints: dict[str, Joint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.setup.memory // 4)

    @cached_property
    def sites(self) -> list[Site]:
        """Linear operators of the main graph."""
        return find_sites(self.analysis.coupling.model)

    @cached_property
    def _taps(self) -> Mapping[str, list[Tap]]:
        return taps(self.analysis, self.groups, self.sites)

    def taps(self, group: Group) -> list[Tap]:
        """Activations that carry the group into a sum."""
        return self._taps[group.name]

    def readers(self, group: Group) -> list[Tap]:
        """Those of them that a site reads."""
        return [tap for tap in self._taps[group.name] if tap.site is not None]

    def profile(self, tap: Tap) -> Profile:
        """Per-sample statistics of each position of the tap's axis; all taps are measured in one pass."""
        if tap.key not in self._profiles:
            every = {t.key: t for mine in self._taps.values() for t in mine}
            names = [list(key) for key in every]
            parts = self.cache.get("profiles", self.data.digest, names)
            if parts is None:
                got = profiles(self.analysis.coupling.model, list(every.values()), self.data, self.setup, self.progress)
                parts = {f"{k}.{n}": getattr(p, n) for k, p in enumerate(got.values()) for n in Profile.FIELDS}
                self.cache.put("profiles", self.data.digest, names, parts)
            for k, key in enumerate(every):
                self._profiles[key] = Profile(*(parts[f"{k}.{n}"] for n in Profile.FIELDS))
                self._check(key[0], self._profiles[key])
        return self._profiles[tap.key]

    def _check(self, name: str, profile: Profile) -> None:
        if not all(np.isfinite(getattr(profile, n)).all() for n in Profile.FIELDS):
            raise UsageError(
                f"calibration: activation {name!r} becomes NaN or infinite; check the data's preprocessing"
            )

    def joint(self, site: Site) -> Joint:
        """Moments of a site's inputs; those of all sites that read a group are measured together."""
        if site.name not in self._joints:
            readers = {t.site.name: t.site for mine in self._taps.values() for t in mine if t.site is not None}
            self.measure({**readers, site.name: site}.values())
        return self._joints[site.name]

    def inverse(self, site: Site, group: int, damping: float) -> NDArray[np.float64]:
        """(Cov(x) + ridge)^-1 of one group of a site, [k c, k c]; kept for the next time."""
        key = (site.reading, group, damping)
        if key not in self._inverses:
            joint = self.joint(site)
            self._inverses[key] = self.shelf.keep(_inverse(damped(joint.xx[group] / joint.rows, damping)))
        return self._inverses[key]

    def measure(self, sites: Iterable[Site]) -> None:
        """Take the moments of these sites in as few passes as the memory allows."""
        missing = [site for site in sites if site.name not in self._joints]
        if not missing:
            return
        rows = {reading: max(site.rows for site in same) for reading, same in same_reading(missing).items()}
        requests = {site.name: [*site.reading, rows[site.reading]] for site in missing}
        unknown = [site for site in missing if not self._recall(site, requests[site.name])]
        if not unknown:
            return
        found = covariances(
            self.analysis.coupling.model, unknown, self.data, self.setup, self.progress, self.shelf.keep
        )
        for site in unknown:
            enough(site, found[site.name], self.data, self.given)
            self._joints[site.name] = found[site.name]
        for same in same_reading(unknown).values():
            joint = found[same[0].name]
            parts = {"rows": np.array(joint.rows), "mean": joint.mean_x, "xx": joint.xx}
            self.cache.put("moments", self.data.digest, requests[same[0].name], parts)

    def _recall(self, site: Site, request: list[object]) -> bool:
        """Take moments from the cache, or from a site that reads the same."""
        for other in self.sites:
            if other.reading == site.reading and other.name in self._joints:
                self._joints[site.name] = self._joints[other.name]
                return True
        parts = self.cache.get("moments", self.data.digest, request)
        if parts is None:
            return False
        mean, xx = parts["mean"], self.shelf.keep(parts["xx"])
        none = np.zeros((len(mean), 0))
        cross = np.zeros((len(mean), 0, xx.shape[1]))
        self._joints[site.name] = Joint(int(parts["rows"]), mean, none, xx, cross, none)
        return True


def _inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a symmetric positive definite matrix; by Cholesky factors, in less than half the time of a general one."""
    from scipy.linalg.lapack import dpotrf, dpotri  # a tenth of a second to import

    factor, failed = dpotrf(matrix, lower=True, clean=True)
    if not failed:
        inverse, failed = dpotri(factor, lower=True, overwrite_c=True)
    if failed:  # a ridge too small for its rounding
        return np.asarray(np.linalg.inv(matrix))
    out = np.ascontiguousarray(inverse.T)  # its upper triangle is filled
    for start in range(0, len(out), _BLOCK):  # block by block, as whole transposed copies miss the caches
        stop = start + _BLOCK
        out[stop:, start:stop] = out[start:stop, stop:].T
        corner = np.triu(out[start:stop, start:stop])
        out[start:stop, start:stop] = corner + np.triu(corner, 1).T
    return out


def enough(site: Site, joint: Joint, data: Calibration, given: int | None = None) -> None:
    """Raise UsageError unless there is an observation for every `FEWEST` columns, and all of them are finite.

    `given` is the number of samples where some are held out of `data`.
    """
    if not np.isfinite(joint.xx).all():
        raise UsageError(
            f"calibration: the inputs of {site.name!r} become NaN or infinite; check the data's preprocessing"
        )
    need = max(site.columns // FEWEST, 2)
    if joint.rows < need:
        samples = int(np.ceil(need / max(joint.rows / data.samples, 1e-9)))
        least = samples if given is None else needed(samples, data.fixed)
        more = 0 if given is None else given - data.samples
        raise UsageError(
            f"calibration: {plural(data.samples)} give {joint.rows} observations of the {site.columns} inputs of "
            f"{site.name!r}{f' ({more} more are held out)' if more else ''}; give at least {least} samples"
        )
