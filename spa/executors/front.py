"""A cut that moves through a model, with the values there for all batches of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spa.calibration import Calibration
from spa.executors.segments import Runner, Segments, placed
from spa.runtime import Value

Values = dict[str, Value]


class Front:
    """Runs a model over the data piece by piece, each piece once if the values at the cuts fit into the memory.

    Args:
        parts: the model; weights behind the cut may be exchanged at any time.
        data: samples.
        batch: samples per run.
        memory: bytes for the values of one cut and of what is asked for there; above that the cut stays where it is,
            and what is asked for is computed again from there.
        beside: another front that has not moved yet, over the same samples.
    """

    def __init__(
        self, parts: Segments, data: Calibration, batch: int, memory: int, beside: Front | None = None
    ) -> None:
        self.parts, self.memory = parts, memory
        # two fronts over the same samples hold them once
        self.anchor: list[Values] = [placed(b) for b in data.batches(batch)] if beside is None else beside.anchor

    def at(self, position: int, wanted: Sequence[str]) -> Window:
        """Move the cut before the node at `position`; the values of `wanted` for all batches."""
        live = list(dict.fromkeys([*self.parts.inputs, *self.parts.live(position)]))
        run = self.parts.runner([*live, *wanted], self.anchor[0])
        anchor, held = self.anchor, self._hold(run)
        if held is not None:
            self.anchor = [{name: values[name] for name in live} for values in held]
        return Window(run, anchor, held)

    def _hold(self, run: Runner) -> list[Values] | None:
        """What `run` gives for all batches, None if that does not fit into the memory."""
        held: list[Values] = []
        taken = 0
        for values in self.anchor:
            held.append(run(values))
            taken += sum(v.tensor_size_in_bytes() for v in held[-1].values())
            if taken > self.memory:
                return None
        return held


class Window:
    """Values at one place for all batches; may be iterated more than once."""

    def __init__(self, run: Runner, anchor: list[Values], held: list[Values] | None) -> None:
        self.run, self.anchor, self.held = run, anchor, held

    def __iter__(self) -> Iterator[Values]:
        """One batch after the other."""
        return iter(self.held) if self.held is not None else (self.run(values) for values in self.anchor)
