"""Moments of one site over many batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.executors import kernels
from spa.executors.patches import output_space, sample, spatial, window
from spa.moments import Joint
from spa.runtime import Provider, Value
from spa.sites import Site


class Meter:
    """Adds up the joint moments of a site's inputs, and of targets for its outputs if there are any.

    Args:
        site: the operator.
        samples: how many samples there will be; decides how many positions of each are looked at.
        select: which channels of the targets belong to the site's outputs; None for all.
        width: channels of the targets as they come; 0 without targets.
        skip: the targets come with a residual branch, see `kernels.Form.skip`.
        dtypes: element types of the inputs and of the targets.
    """

    def __init__(
        self,
        site: Site,
        samples: int,
        *,
        select: NDArray[np.int64] | None = None,
        width: int = 0,
        skip: bool = False,
        dtypes: tuple[ir.DataType, ir.DataType] = (ir.DataType.FLOAT, ir.DataType.FLOAT),
        provider: Provider = "cpu",
        threads: int = 0,
    ) -> None:
        self.site, self.samples = site, samples
        self.provider: Provider = provider
        self.threads = threads
        self.form = kernels.Form(
            site.layout == "tokens",
            site.groups,
            site.channels,
            site.taps,
            site.rows if width else 0,
            *dtypes,
            width=width,
            skip=skip,
        )
        self.constants: dict[str, Value] = {}
        if width > site.groups * site.rows:
            assert select is not None
            self.constants["select"] = kernels.indices(select)
        self.total: Joint | None = None
        self.halves: list[Joint | None] = [None, None]
        """Of every second entry of the leading axis (samples), where they were asked for."""
        self.seen = 0
        self._picks: dict[tuple[int, ...], kernels.Picks] = {}

    def split(self, x: Value, targets: Mapping[str, Value]) -> None:
        """As `add`, but every second sample goes to the other half."""
        count = int(x.shape()[0])
        for k in range(2):
            who = np.arange((k - self.seen) % 2, count, 2)
            if len(who):
                self.halves[k] = _merged(self.halves[k], self._part(x, targets, who))
        self.seen += count

    def add(self, x: Value, targets: Mapping[str, Value] | None = None) -> None:
        """Take one batch in; `targets` as in `kernels.joint`, without `select`."""
        self.total = _merged(self.total, self._part(x, targets, None))

    def _part(self, x: Value, targets: Mapping[str, Value] | None, who: NDArray[np.int64] | None) -> Joint:
        picks = self._pick(tuple(int(n) for n in x.shape()))
        form = replace(
            self.form,
            pick=picks.patches is not None,
            bend=targets is not None and "weight" in targets,
            half=who is not None,
        )
        given = None if targets is None else {**targets, **self.constants}
        return kernels.joint(form, x, picks, given, who, provider=self.provider, threads=self.threads)

    @property
    def moments(self) -> Joint:
        """Of all batches since the start, or since `clear`."""
        assert self.total is not None
        return self.total

    def clear(self) -> None:
        """Forget all batches."""
        self.total = None

    def join(self) -> tuple[Joint, Joint | None]:
        """Both halves, which are one if there is one sample only; their sum becomes the total."""
        first, second = self.halves
        assert first is not None
        self.total = copy.deepcopy(first)
        if second is not None:
            self.total.merge(second)
        return first, second

    def _pick(self, shape: tuple[int, ...]) -> kernels.Picks:
        key = shape[1:]
        if key not in self._picks:
            self._picks[key] = self._tokens(shape) if self.form.tokens else self._patches(shape)
        return self._picks[key]

    def _tokens(self, shape: tuple[int, ...]) -> kernels.Picks:
        positions = math.prod(shape[1:-1])
        if len(shape) < 3 or positions == 1:
            return kernels.Picks(None, None, 0)
        chosen = sample(self.site, positions, self.samples)
        if len(chosen) == positions:
            return kernels.Picks(None, None, 0)
        index = kernels.indices(chosen)
        return kernels.Picks(index, index, len(chosen))

    def _patches(self, shape: tuple[int, ...]) -> kernels.Picks:
        space = spatial(shape)
        out = output_space(self.site, space)
        chosen = sample(self.site, math.prod(out), self.samples)
        flat = window(self.site, space, out, chosen)
        return kernels.Picks(kernels.indices(flat), kernels.indices(chosen), len(chosen))


def _merged(total: Joint | None, part: Joint) -> Joint:
    if total is None:
        return part
    total.merge(part)
    return total
