"""Values of a model for all samples, batch after batch, stage after stage: no more of them at a time than fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spa.calibration import Calibration
from spa.executors.front import Values
from spa.executors.segments import Runner, Segments, placed


class Flow:
    """The values of `names` while the model runs over the data once.

    Args:
        parts: the model.
        names: what is looked at.
        data: samples.
        batch: samples per run.
        memory: bytes that the values of one stage should take at most; one sample decides where the model is cut.
    """

    def __init__(self, parts: Segments, names: Sequence[str], data: Calibration, batch: int, memory: int) -> None:
        self.data, self.batch = data, batch
        ordered = sorted(dict.fromkeys(names), key=lambda name: parts.producer.get(name, -1))
        self._stages = [_runner(parts, ordered, [], None)]
        if not ordered:
            return
        widest = max(data.feeds, key=lambda bucket: sum(array[:1].nbytes for array in bucket.values()))
        probe = placed({name: array[: data.fixed or 1] for name, array in widest.items()})
        share = batch / max(size_of(probe), 1)
        sizes = {name: value.tensor_size_in_bytes() for name, value in self._stages[0][0](probe).items()}
        if sum(sizes.values()) * share <= memory:
            return
        self._stages = []
        stages: list[list[str]] = [[]]
        taken = 0.0
        for name in ordered:
            if stages[-1] and taken + sizes[name] * share > memory:
                stages.append([])
                taken = 0.0
            stages[-1].append(name)
            taken += sizes[name] * share
        at_hand: list[str] = []
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            cut = None if following is None else max(parts.producer.get(name, -1) for name in stage) + 1
            self._stages.append(_runner(parts, stage, at_hand, cut))
            at_hand = self._stages[-1][2]

    def __iter__(self) -> Iterator[tuple[int, Iterator[Values]]]:
        """Per batch its number of samples, and the values that were asked for, in parts."""
        for batch in self.data.batches(self.batch):
            values = placed(batch)
            yield size_of(values), self._through(values)

    def _through(self, values: Values) -> Iterator[Values]:
        for run, wanted, live in self._stages:
            values = run(values)
            yield {name: values[name] for name in wanted}
            values = {name: values[name] for name in live}


def _runner(
    parts: Segments, wanted: list[str], at_hand: list[str], cut: int | None
) -> tuple[Runner, list[str], list[str]]:
    """One stage: what runs, what is wanted of it, and what the next one goes on from."""
    live = [] if cut is None else [*parts.inputs, *parts.live(cut)]
    return parts.runner([*wanted, *live], at_hand, optimize=True), wanted, live


def size_of(batch: Values) -> int:
    """Samples in a batch."""
    return int(next(iter(batch.values())).shape()[0])
