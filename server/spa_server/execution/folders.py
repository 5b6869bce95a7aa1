"""Folders of one attempt at a job."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spa.jobs import FinetuneSpec, JobSpec, PruneSpec
from spa_server.blobs import Blobs
from spa_server.held import Held, StoredFile
from spa_server.names import owner_folder

__all__ = ["Folders", "placed", "prepare", "written"]


@dataclass(frozen=True)
class Folders:
    """Where things are for a worker."""

    attempt: Path
    """Of this attempt; removed after it."""
    work: Path
    """Of the job; removed when it has ended."""
    cache: Path
    """Of its owner; stays."""

    @property
    def output(self) -> Path:
        """For results."""
        return self.attempt / "out"

    @property
    def temporary(self) -> Path:
        """For everything else."""
        return self.attempt / "tmp"

    def remove(self, *, work: bool) -> None:
        """Remove what is not needed any more."""
        shutil.rmtree(self.attempt, ignore_errors=True)
        if work:
            shutil.rmtree(self.work.parent, ignore_errors=True)


def prepare(data: Path, job: Held) -> Folders:
    """Make them. Raises: OSError."""
    root = data / "jobs" / job.id
    folders = Folders(root / f"attempt-{job.attempt}", root / "work", data / "cache" / owner_folder(job.owner))
    shutil.rmtree(folders.attempt, ignore_errors=True)
    for folder in (folders.output, folders.temporary, folders.work, folders.cache):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folders


def placed(blobs: Blobs, job: Held, folders: Folders) -> dict[str, Path]:
    """Put the files that a spec names where the worker finds them: reference -> path. Raises: OSError."""
    out = {}
    shutil.rmtree(folders.attempt / "in", ignore_errors=True)
    for number, (reference, files) in enumerate(job.files.items()):
        folder = folders.attempt / "in" / str(number)
        folder.mkdir(parents=True)
        for file in files:
            blobs.place(file.sha256, folder / file.path)
        out[reference] = _meant(reference, files, folder)
    return out


def _meant(reference: str, files: Sequence[StoredFile], folder: Path) -> Path:
    """A model is its first file, a dataset its only file or the folder, a job the model that it wrote."""
    if reference.startswith("datasets/") and reference.count("/") == 1 and (len(files) != 1 or "/" in files[0].path):
        return folder
    return folder / files[0].path


def written(folders: Folders, spec: JobSpec) -> list[Path]:
    """Files that a worker left: the model first. Links and the like are no files."""
    found = []
    for root, names, files in os.walk(folders.output):
        names.sort()
        found += [Path(root, name) for name in sorted(files) if stat.S_ISREG(os.lstat(Path(root, name)).st_mode)]
    first = folders.output / spec.output_name if isinstance(spec, PruneSpec | FinetuneSpec) else None
    return sorted(found, key=lambda path: path != first)
