"""What one version did since it was loaded: counts and nanoseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

__all__ = ["Duration", "Runs", "Statistics"]


@dataclass
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """It happened `count` times more and took `ns` nanoseconds together."""
        self.count += count
        self.ns += ns


@dataclass
class Runs:
    """Runs of one number of rows."""

    join: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    split: Duration = field(default_factory=Duration)

    def add(self, join: int, run: int, split: int, count: int = 1) -> None:
        """One more run; its three parts took so many nanoseconds, `count` times counted."""
        self.join.add(join * count, count)
        self.run.add(run * count, count)
        self.split.add(split * count, count)


@dataclass
class Statistics:
    """All of it; written to by the event loop only."""

    success: Duration = field(default_factory=Duration)
    """From arrival to answer."""
    fail: Duration = field(default_factory=Duration)
    """Refused, late, cancelled or failed."""
    queue: Duration = field(default_factory=Duration)
    """Waiting for a session and for others to join."""
    requests: Runs = field(default_factory=Runs)
    """The parts of the runs, once for each request in them."""
    by_rows: dict[int, Runs] = field(default_factory=dict)
    """Rows of a run -> its parts."""
    rows: int = 0
    """Of answered requests."""
    runs: int = 0
    """Of the runtime."""
    last_ms: int = 0
    """Milliseconds since 1970 of the latest run."""

    def ran(self, rows: int, requests: int, join: int, run: int, split: int) -> None:
        """The runtime ran once for `requests` requests of `rows` rows together."""
        self.runs += 1
        self.last_ms = time.time_ns() // 1_000_000
        self.requests.add(join, run, split, requests)
        self.by_rows.setdefault(rows, Runs()).add(join, run, split)
