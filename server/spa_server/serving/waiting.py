"""Requests that wait for a session, grouped by what may run together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from spa_server.serving.codec import Array

__all__ = ["Key", "Request", "RequestQueue"]

Key: TypeAlias = tuple[Any, ...] | None
"""Requests with the same key may run together; None runs alone."""


@dataclass(eq=False)
class Request:
    """One accepted request."""

    feeds: dict[str, Array]
    outputs: tuple[str, ...]
    rows: int
    """Size of axis 0; 1 where requests are not joined."""
    key: Key
    answer: asyncio.Future[dict[str, Array]]
    arrived: float
    """On the event loop's clock."""
    timer: asyncio.TimerHandle | None = None
    """Fires when its time is over."""
    beside: Sequence[Request] = ()
    """The batch that it runs in."""
    stop: Callable[[], None] | None = None
    """Ends the run of that batch."""
    number: int = field(default=-1)
    """Order of arrival; given by the queue."""


_MOST_PATIENCE = 64
"""Batches that come as expected, at most, before it is tried whether more would come."""


class Expected:
    """How many rows are worth waiting for: as many as came lately, and now and then more, to see whether they come.

    Callers that wait for their answers before they ask again are soon counted so, and nobody waits for what does not
    come, but for one batch in `_MOST_PATIENCE`.
    """

    def __init__(self, most: int) -> None:
        self._most = self.rows = most
        self._trying = True
        self._came = 0
        self._patience = 1

    def learn(self, rows: int, *, came: bool) -> None:
        """A batch had so many rows; whether the expected ones `came`, or the time was over before."""
        if not came:
            self._patience = min(2 * self._patience, _MOST_PATIENCE) if self._trying else self._patience
            self.rows, self._trying, self._came = max(rows, 1), False, 0
            return
        self._patience = 1 if self._trying else self._patience
        self.rows, self._came = max(self.rows, rows), self._came + 1
        self._trying = self._came >= self._patience
        if self._trying:
            self.rows, self._came = min(self.rows + 1 + self.rows // 4, self._most), 0


class RequestQueue:
    """First come, first served, except that a request may join an earlier one of its key."""

    def __init__(self, most_rows: int, delay: float) -> None:
        self._most_rows, self._delay = most_rows, delay
        self._expected = Expected(most_rows)
        self._groups: dict[Key, dict[int, Request]] = {}
        self._rows: dict[Key, int] = {}
        self._alone: dict[int, Request] = {}
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: Request) -> None:
        """Let a request wait."""
        request.number, self._next = self._next, self._next + 1
        self._count += 1
        if request.key is None:
            self._alone[request.number] = request
        else:
            self._groups.setdefault(request.key, {})[request.number] = request
            self._rows[request.key] = self._rows.get(request.key, 0) + request.rows

    def remove(self, request: Request) -> bool:
        """Let a request wait no more; False if it does not."""
        waiting = self._alone if request.key is None else self._groups.get(request.key, {})
        if waiting.pop(request.number, None) is None:
            return False
        self._count -= 1
        if request.key is not None:
            self._rows[request.key] -= request.rows
            if not waiting:
                del self._groups[request.key], self._rows[request.key]
        return True

    def take(self, now: float) -> list[Request]:
        """The next batch, removed from the queue; empty if none is due yet."""
        for _, key, first in sorted(self._heads(), key=lambda head: head[0]):
            if key is None:
                self.remove(first)
                return [first]
            came = self._rows[key] >= self._expected.rows
            if came or now >= first.arrived + self._delay:
                batch = self._batch(key)
                if self._delay:
                    self._expected.learn(sum(request.rows for request in batch), came=came)
                return batch
        return []

    def due(self) -> float | None:
        """When a batch is due at the latest; None if nothing waits."""
        return min((first.arrived + self._delay for _, _, first in self._heads()), default=None)

    def _heads(self) -> Iterable[tuple[int, Key, Request]]:
        """The oldest request of each group, and the oldest that runs alone."""
        if self._alone:
            first = next(iter(self._alone.values()))
            yield first.number, None, first
        for key, group in self._groups.items():
            first = next(iter(group.values()))
            yield first.number, key, first

    def _batch(self, key: Key) -> list[Request]:
        """As many of a group as fit, oldest first; none is overtaken because it is large."""
        batch: list[Request] = []
        rows = 0
        for request in list(self._groups[key].values()):
            if batch and rows + request.rows > self._most_rows:
                break
            batch.append(request)
            rows += request.rows
        for request in batch:
            self.remove(request)
        return batch
