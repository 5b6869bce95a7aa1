"""Targets in the user's words: macs=0.6, macs=2.0G, params=50%, size=10MB, latency=5ms, top1-drop=0.01."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spa.cost import Metric
from spa.errors import UsageError
from spa.metrics import METRICS

_METRICS: dict[str, Metric] = {
    "macs": "macs",
    "params": "parameters",
    "parameters": "parameters",
    "size": "bytes",
    "bytes": "bytes",
    "latency": "latency",
    "units": "units",
}
COSTS: dict[str, Metric] = {"macs": "macs", "params": "parameters", "size": "bytes", "latency": "latency"}
"""What a model may be made smallest in, by the name that options have for it."""
_DROP = "-drop"
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


@dataclass(frozen=True)
class Goal:
    """A metric that may get worse by at most so much: the smallest model is wanted that keeps to it."""

    metric: str
    """Name in `spa.metrics.METRICS`, or `metric`: the one that was chosen, or fits."""
    limit: float
    percent: bool
    """Whether it was written as a percentage: of the dense model's value where the metric is no share itself."""
    text: str
    """As the user wrote it."""


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
            f"cannot read target {text!r}; write for example macs=0.6, macs=2.0G, params=50%, size=10MB, latency=5ms "
            "or top1-drop=0.01"
        )
    number = float(match[1])
    relative = unit == "%" or (unit == "" and number <= 1)
    if metric == "latency" and unit == "" and not relative:
        raise UsageError(f"target {text!r} needs a unit; write for example latency=5ms, or latency=0.6 for a fraction")
    limit = number / 100 if unit == "%" else number * units[unit]
    if limit <= 0 or (relative and limit > 1):
        raise UsageError(f"target {text!r} must lie above 0 and, as a fraction, at most 1 (100%)")
    return Target(metric, limit, relative, text.strip())


def parse_goal(text: str) -> Goal | None:
    """`top1-drop=0.01` and the like; None for a target of another kind.

    Raises:
        UsageError: the metric is unknown, or what follows is no number from 0 on.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.lower().endswith(_DROP):
        return None
    metric = name.lower().removesuffix(_DROP)
    if metric not in {*METRICS, "metric"}:
        raise UsageError(f"unknown metric {metric!r} in target {text!r}; metrics are {', '.join(METRICS)}, or metric")
    match = _VALUE.fullmatch(value)
    if match is None or match[2] not in ("", "%"):
        raise UsageError(f"cannot read target {text!r}; write for example {metric}-drop=0.01 or {metric}-drop=1%")
    percent = match[2] == "%"
    return Goal(metric, float(match[1]) / (100 if percent else 1), percent, text.strip())


def parse_request(texts: str | Sequence[str]) -> tuple[tuple[Target, ...], Goal | None]:
    """Limits on costs, and at most one on a metric; given one by one or separated by commas.

    Raises:
        UsageError: one of them is not a target, there are several on metrics, or there is none at all.
    """
    parts = [t for part in ([texts] if isinstance(texts, str) else texts) for t in part.split(",") if t.strip()]
    goals = {t: goal for t in parts if (goal := parse_goal(t)) is not None}
    rest = [t for t in parts if t not in goals]
    if len(goals) > 1:
        raise UsageError(f"only one metric can be a target, not {' and '.join(goals)}: choose one")
    if goals and not rest:
        return (), next(iter(goals.values()))
    return parse_targets(rest), next(iter(goals.values()), None)


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
