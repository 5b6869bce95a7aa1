"""What nobody needs any more is removed, now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from pathlib import Path

from spa_server.blobs import Blobs
from spa_server.config import Config, seconds
from spa_server.database import Database, contents, jobs, queue
from spa_server.uploads import Uploads

__all__ = ["clean", "keep_clean"]

_log = logging.getLogger("spa_server.cleaning")
_GRACE = 3600.0
"""Seconds that storing one file may take: younger contents that nobody has yet are left alone."""


async def keep_clean(config: Config, database: Database, blobs: Blobs, uploads: Uploads) -> None:
    """Clean again and again, until cancelled."""
    while True:
        try:
            await asyncio.to_thread(clean, config, database, blobs, uploads)
        except Exception as error:  # the next time may do
            _log.error("could not clean up (%s)", error)
        await asyncio.sleep(seconds(config.retention.every))


def clean(config: Config, database: Database, blobs: Blobs, uploads: Uploads) -> None:
    """Remove old jobs, uploads of which nothing was made, contents that nobody has, and folders without a job."""
    keep = config.retention
    old = jobs.remove_old(database, seconds(keep.jobs)) if seconds(keep.jobs) else 0
    unused = seconds(keep.uploads)
    parts = uploads.clean(unused) if unused else 0
    gone = contents.sweep(database, blobs.remove, unused, min(_GRACE, unused or _GRACE))
    if seconds(keep.cache):
        _clean_cache(config.data / "cache", time.time() - seconds(keep.cache))
    folders = _leftovers(config.data / "jobs", queue.live(database))
    if old or parts or gone or folders:
        _log.info("removed: %d jobs, %d parts of uploads, %d contents, %d folders", old, parts, gone, folders)


def _clean_cache(folder: Path, before: float) -> None:
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            if max(path.stat().st_mtime, path.stat().st_atime) < before:
                path.unlink()


def _leftovers(folder: Path, live: set[str]) -> int:
    """Folders of jobs that have ended, or were taken over by another server: left when a server died."""
    found = [path for path in folder.iterdir() if path.name not in live] if folder.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)
