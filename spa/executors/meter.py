"""Moments of one site over many batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.executors import kernels
from spa.executors.patches import output_space, sample, spatial, window
from spa.moments import Joint
from spa.runtime import Provider, Value
from spa.sites import Site

ENOUGH = 1024
"""Observations that are held before they are reduced to moments: a Gram matrix is large next to a few rows."""


@dataclass
class _Sum:
    held: kernels.Rows | None = None
    total: Joint | None = None


class Meter:
    """Adds up the joint moments of a site's inputs, and of targets for its outputs if there are any.

    Args:
        site: the operator.
        samples: how many samples there will be; decides how many positions of each are looked at.
        select: which channels of the targets are looked at; None for the first of as many as the site has outputs.
        width: channels of the targets as they come; 0 without targets.
        skip: the targets come with a residual branch, see `kernels.Form.skip`.
        dtypes: element types of the inputs and of the targets.
        keep: bytes that observations may take, so that `bent` need not ask for the batches again.
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
        keep: int = 0,
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
            (site.rows if select is None else len(select) // site.groups) if width else 0,
            *dtypes,
            width=width,
            skip=skip,
        )
        self.constants: dict[str, Value] = {}
        if width > site.groups * self.form.rows:
            assert select is not None
            self.constants["select"] = kernels.indices(select)
        self._sums = [_Sum(), _Sum()]
        """The second one is used if halves are asked for."""
        self._room = keep
        self._kept: list[kernels.Rows] = []
        self.seen = 0
        self._picks: dict[tuple[int, ...], kernels.Picks] = {}

    def split(self, x: Value, targets: Mapping[str, Value]) -> None:
        """As `add`, but every second sample (entry of the leading axis) goes to the other half."""
        count = int(x.shape()[0])
        for k in range(2):
            who = np.arange((k - self.seen) % 2, count, 2)
            if len(who):
                self._take(self._sums[k], x, targets, who)
        self.seen += count

    def add(self, x: Value, targets: Mapping[str, Value] | None = None) -> None:
        """Take one batch in; `targets` as in `kernels.rows`, without `select`."""
        self._take(self._sums[0], x, targets, None)

    def _take(self, into: _Sum, x: Value, targets: Mapping[str, Value] | None, who: NDArray[np.int64] | None) -> None:
        into.held = self._rows(x, targets, who, into.held)
        if into.held.count >= ENOUGH:
            self._reduce(into)

    def _rows(
        self, x: Value, targets: Mapping[str, Value] | None, who: NDArray[np.int64] | None, held: kernels.Rows | None
    ) -> kernels.Rows:
        picks = self._pick(tuple(int(n) for n in x.shape()))
        form = replace(self.form, pick=picks.patches is not None, half=who is not None)
        given = None if targets is None else {**targets, **self.constants}
        return kernels.rows(form, x, picks, given, who, held, provider=self.provider, threads=self.threads)

    def _reduce(self, into: _Sum) -> None:
        if into.held is not None:
            into.total = _merged(into.total, kernels.moments(into.held, provider=self.provider, threads=self.threads))
            self._room -= into.held.nbytes
            if self._room >= 0:
                self._kept.append(into.held)
            else:
                self._kept.clear()
            into.held = None

    def bent(self, bend: Mapping[str, Value], again: Iterable[tuple[Value, Mapping[str, Value]]]) -> Joint | None:
        """Moments with targets that follow an activation (`bend` as in `kernels.moments`), without those of the inputs.

        To be called after `moments` or `halves`. `again` gives all batches once more, as `add` takes them; it is only
        asked for what was not kept.
        """
        total = None
        for rows in self._kept if self._room >= 0 else self._again(again):
            part = kernels.moments(rows, inner=False, bend=bend, provider=self.provider, threads=self.threads)
            total = _merged(total, part)
        return total

    def _again(self, batches: Iterable[tuple[Value, Mapping[str, Value]]]) -> Iterator[kernels.Rows]:
        held = None
        for x, targets in batches:
            held = self._rows(x, targets, None, held)
            if held.count >= ENOUGH:
                yield held
                held = None
        if held is not None:
            yield held

    def moments(self) -> Joint | None:
        """Of all batches since the start, or since `clear`; None if there was none."""
        self._reduce(self._sums[0])
        return self._sums[0].total

    def clear(self) -> None:
        """Forget the sums; what was kept for `bent` stays."""
        self._sums = [_Sum(), _Sum()]

    def halves(self) -> tuple[Joint, Joint | None]:
        """What `split` put apart; one if there is one sample only. Add them up yourself: they are large."""
        for each in self._sums:
            self._reduce(each)
        first, second = (each.total for each in self._sums)
        assert first is not None
        return first, second

    def _pick(self, shape: tuple[int, ...]) -> kernels.Picks:
        key = shape[1:]
        if key not in self._picks:
            self._picks[key] = self._tokens(shape) if self.form.tokens else self._patches(shape)
        return self._picks[key]

    def _tokens(self, shape: tuple[int, ...]) -> kernels.Picks:
        positions = math.prod(shape[1:-1])
        if len(shape) < 3 or positions == 1:
            return kernels.Picks(None, None)
        chosen = sample(self.site, shape[1:-1], self.samples)
        if len(chosen) == positions:
            return kernels.Picks(None, None)
        index = kernels.indices(chosen)
        return kernels.Picks(index, index)

    def _patches(self, shape: tuple[int, ...]) -> kernels.Picks:
        space = spatial(shape)
        out = output_space(self.site, space)
        chosen = sample(self.site, out, self.samples)
        flat = window(self.site, space, out, chosen)
        return kernels.Picks(kernels.indices(flat), kernels.indices(chosen))


def _merged(total: Joint | None, part: Joint) -> Joint:
    if total is None:
        return part
    total.merge(part)
    return total
