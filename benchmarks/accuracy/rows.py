"""What the suites give: one row per network, data, tool, method, target and seed; and what is made of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS, PEER, PUBLISHED = "spa", "torch-pruning", "published"


@dataclass(frozen=True)
class Row:
    """One measured (or published) figure."""

    suite: str
    network: str
    data: str
    tool: str
    method: str
    target: str
    """As asked: `macs=0.5`, `units=0.95`."""
    seed: int
    dense: float
    """The same figure of the network before pruning, on the same data."""
    value: float | None
    """Top-1 in percent, 100 x Spearman, or perplexity; None with an error."""
    reached: float | None = None
    """Share of the MACs that is left."""
    examples: int = 0
    error: str = ""
    screening: bool = False
    """Measured on part of the data only, to choose what is measured on all."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Key = tuple[str, str, str, str]
"""Suite, network, data, target."""


def key_of(row: Row) -> Key:
    return row.suite, row.network, row.data, row.target


@dataclass(frozen=True)
class Mean:
    """A method's figures over the seeds."""

    method: str
    value: float
    spread: float
    """Standard deviation over seeds; 0 for one."""
    dense: float
    reached: float | None
    seeds: int

    @property
    def drop(self) -> float:
        return self.dense - self.value


def means(rows: Iterable[Row], tool: str, key: Key) -> list[Mean]:
    """Of one tool at one target, each method's mean over seeds; screening and failures left out."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        if row.tool == tool and key_of(row) == key and row.value is not None and not row.screening:
            by_method.setdefault(row.method, []).append(row)
    return [_mean(method, found) for method, found in by_method.items()]


def _mean(method: str, rows: Sequence[Row]) -> Mean:
    values = [row.value for row in rows if row.value is not None]
    reached = [row.reached for row in rows if row.reached is not None]
    return Mean(
        method,
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else 0.0,
        statistics.fmean(row.dense for row in rows),
        statistics.fmean(reached) if reached else None,
        len(values),
    )


def best(found: Sequence[Mean], lower_is_better: bool = False) -> Mean | None:
    """The method with the best mean; only methods measured with as many seeds as any are in the running."""
    if not found:
        return None
    most = max(m.seeds for m in found)
    running = [m for m in found if m.seeds == most]
    return min(running, key=lambda m: m.value) if lower_is_better else max(running, key=lambda m: m.value)


def demanded(suite: str, target: str) -> float | None:
    """The share of the best peer's drop that ours may have at most."""
    share = float(target.partition("=")[2])
    if suite == "cifar":
        return 0.5 if share >= 0.65 else 0.25
    return 0.5 if suite == "imagenet" else None


@dataclass(frozen=True)
class Comparison:
    """Ours next to the best of the peer's methods at one target."""

    key: Key
    ours: Mean | None
    peer: Mean | None

    @property
    def ratio(self) -> float | None:
        """Of the drops; None where one is missing or the peer lost nothing."""
        if self.ours is None or self.peer is None or self.peer.drop <= 0:
            return None
        return self.ours.drop / self.peer.drop

    @property
    def demanded(self) -> float | None:
        return demanded(self.key[0], self.key[3])

    @property
    def met(self) -> bool | None:
        if self.ratio is None or self.demanded is None:
            return None
        return self.ratio <= self.demanded


def comparisons(rows: Sequence[Row], headline: dict[str, str]) -> list[Comparison]:
    """One per target, in the order of the rows; `headline` names our method per suite (it is not chosen by result)."""
    result = []
    for key in dict.fromkeys(key_of(row) for row in rows if row.tool in (OURS, PEER)):
        ours = next((m for m in means(rows, OURS, key) if m.method == headline.get(key[0])), None)
        result.append(Comparison(key, ours, best(means(rows, PEER, key))))
    return result
