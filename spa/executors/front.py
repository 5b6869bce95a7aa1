"""A cut that moves through a model, with the values there for all batches of the data."""

from __future__ import annotations

from collections.abc import Sequence

from spa.calibration import Calibration
from spa.executors.segments import Segments, placed
from spa.heap import Trim
from spa.runtime import Value, fetch, is_plain, place
from spa.shelf import Shelf

Values = dict[str, Value]
Window = list[Values]
"""Values at one place, per batch."""


class Front:
    """Runs a model over the data piece by piece, each piece once.

    Args:
        parts: the model; weights behind the cut may be exchanged at any time.
        data: samples.
        batch: samples per run.
        memory: bytes for the values of one cut and of what is asked for there; those above are mapped from disk.
        beside: another front that has not moved yet, over the same samples.
    """

    def __init__(
        self, parts: Segments, data: Calibration, batch: int, memory: int, beside: Front | None = None
    ) -> None:
        self.parts, self.memory, self._trim = parts, memory, Trim(memory)
        # two fronts over the same samples hold them once
        self.anchor: Window = [placed(b) for b in data.batches(batch)] if beside is None else beside.anchor

    def at(self, position: int, wanted: Sequence[str]) -> Window:
        """Move the cut before the node at `position`; the values of `wanted` for all batches.

        Raises:
            UsageError: they fit neither into the memory nor into the temporary folder.
        """
        live = list(dict.fromkeys([*self.parts.inputs, *self.parts.live(position)]))
        run = self.parts.runner([*live, *wanted], self.anchor[0])
        shelf = Shelf(self.memory)
        held: Window = []
        for before in self.anchor:
            held.append({name: _kept(shelf, value, before.get(name)) for name, value in run(before).items()})
            self._trim()
        self.anchor = [{name: values[name] for name in live} for values in held]
        return held


def _kept(shelf: Shelf, value: Value, before: Value | None) -> Value:
    """The value in memory if there is room; `before` is what was there by this name, maybe the very same."""
    if shelf.room(value.tensor_size_in_bytes()) or value is before or not is_plain(value):
        return value
    return place(shelf.store(fetch(value)))
