"""Targets in the user's words: macs=0.6, macs=2.0G, params=50%, size=10MB, latency=5ms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spa.cost import Metric
from spa.errors import UsageError

_METRICS: dict[str, Metric] = {
    "macs": "macs",
    "params": "parameters",
    "parameters": "parameters",
    "size": "bytes",
    "bytes": "bytes",
    "latency": "latency",
    "units": "units",
}
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "b": 1.0}
_UNITS |= {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3}
_SECONDS = {"ms": 1.0, "s": 1e3, "us": 1e-3}
_VALUE = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(%|[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """At most `limit` of a metric: a fraction of the original, or an absolute number (MACs, parameters, bytes,
    milliseconds)."""

    metric: Metric
    limit: float
    relative: bool
    text: str
    """As the user wrote it."""

    def bound(self, original: float) -> float:
        """The absolute limit for a model whose metric is `original`."""
        return self.limit * original if self.relative else self.limit


def parse_target(text: str) -> Target:
    """Parse one target.

    A number up to 1, or a percentage, is a fraction of the original; anything else is absolute.

    Raises:
        UsageError: the text is not a target.
    """
    name, equals, value = text.partition("=")
    metric = _METRICS.get(name.strip().lower())
    match = _VALUE.fullmatch(value.strip())
    units = _SECONDS | {"": 1.0} if metric == "latency" else _UNITS
    if not equals or metric is None or match is None or (unit := match[2].lower()) not in {*units, "%"}:
        raise UsageError(
            f"cannot read target {text!r}; write for example macs=0.6, macs=2.0G, params=50%, size=10MB or latency=5ms"
        )
    number = float(match[1])
    relative = unit == "%" or (unit == "" and number <= 1)
    if metric == "latency" and unit == "" and not relative:
        raise UsageError(f"target {text!r} needs a unit; write for example latency=5ms, or latency=0.6 for a fraction")
    limit = number / 100 if unit == "%" else number * units[unit]
    if limit <= 0 or (relative and limit > 1):
        raise UsageError(f"target {text!r} must lie above 0 and, as a fraction, at most 1 (100%)")
    return Target(metric, limit, relative, text.strip())


def parse_targets(texts: str | Sequence[str]) -> tuple[Target, ...]:
    """Parse several targets, given one by one or separated by commas.

    Raises:
        UsageError: one of them is not a target, or there is none.
    """
    parts = [texts] if isinstance(texts, str) else list(texts)
    out = tuple(parse_target(t) for part in parts for t in part.split(",") if t.strip())
    if not out:
        raise UsageError("no target given; write for example --target macs=0.6")
    return out
