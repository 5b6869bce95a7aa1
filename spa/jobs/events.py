"""What a running job says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class StageEvent:
    """How far a stage is; see `spa.progress`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class MetricEvent:
    """Numbers that training reports after an epoch."""

    epoch: int
    values: Mapping[str, float]
    """Such as `loss`, `accuracy`, `nll`, `distance`; only what was measured."""


Event: TypeAlias = StageEvent | MetricEvent
Emit: TypeAlias = Callable[[Event], None]
Cancelled: TypeAlias = Callable[[], bool]
"""Whether the job should stop; asked whenever it says how far it is."""


class JobCancelled(BaseException):
    """The job was asked to stop. No `Exception`: what it passes through must not take it for a failure of its own."""
