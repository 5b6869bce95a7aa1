"""A job as whoever runs it knows it. Nothing here needs the database: nodes of a cluster have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spa.jobs import JobSpec

__all__ = ["Held", "StoredFile"]


@dataclass(frozen=True)
class StoredFile:
    """A file of a model, a dataset or a job."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Held:
    """A job that a server runs."""

    id: str
    owner: str
    spec: JobSpec
    attempt: int
    holder: str
    files: Mapping[str, tuple[StoredFile, ...]]
    """Files of each reference of the spec."""
