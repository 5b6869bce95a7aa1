"""Work as data: a spec says what to do, `run` does it, on this machine or in a server's worker."""

from spa.jobs.events import Cancelled, Emit, Event, JobCancelled, MetricEvent, StageEvent
from spa.jobs.run import run
from spa.jobs.spec import (
    KINDS,
    BenchmarkSpec,
    FinetuneSpec,
    FrontierSpec,
    InspectSpec,
    JobSpec,
    ProfileSpec,
    PruneSpec,
    read,
    references,
    to_json,
)
from spa.jobs.store import Store

__all__ = [
    "KINDS",
    "BenchmarkSpec",
    "Cancelled",
    "Emit",
    "Event",
    "FinetuneSpec",
    "FrontierSpec",
    "InspectSpec",
    "JobCancelled",
    "JobSpec",
    "MetricEvent",
    "ProfileSpec",
    "PruneSpec",
    "StageEvent",
    "Store",
    "read",
    "references",
    "run",
    "to_json",
]
