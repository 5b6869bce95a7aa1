"""Where a job finds what its spec names, and where it leaves what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spa.errors import UsageError


@dataclass(frozen=True)
class Store:
    """Files of one job."""

    files: Mapping[str, Path]
    """What the references of the spec stand for."""
    output: Path
    """Existing folder for results."""
    work: Path
    """Existing folder that a second attempt at the job finds again: checkpoints, measurements so far."""
    cache: Path | None = None
    """Folder of measurements that other jobs find, too; see `spa.cache`."""

    def path(self, reference: str) -> Path:
        """The file or folder that a reference stands for.

        Raises:
            UsageError: there is none.
        """
        if reference not in self.files:
            raise UsageError(f"{reference}: is not among the files of this job")
        return self.files[reference]
