"""Arrays that are kept for later: in memory up to a limit, the others in a temporary folder."""

from __future__ import annotations

import mmap
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spa.errors import UsageError

Kind = TypeVar("Kind", bound=np.generic)


def on_disk(array: NDArray[Any]) -> bool:
    """Whether an array's numbers are those of a mapped file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


@dataclass(eq=False)
class Shelf:
    """Keeps arrays; those on disk are mapped, so that they take memory only while they are looked at."""

    limit: int
    """Bytes of memory."""
    taken: int = 0
    _folder: Path | None = field(default=None, repr=False)
    _files: int = 0

    def keep(self, array: NDArray[Kind]) -> NDArray[Kind]:
        """The same numbers, not to be changed.

        Raises:
            UsageError: the temporary folder cannot take them.
        """
        return array if on_disk(array) or self.room(array.nbytes) else self.store(array)

    def room(self, size: int) -> bool:
        """Whether `size` bytes more are within the limit; they count from now on if so."""
        fits = self.taken + size <= self.limit
        self.taken += size if fits else 0
        return fits

    def store(self, array: NDArray[Kind]) -> NDArray[Kind]:
        """The same numbers, mapped from disk.

        Raises:
            UsageError: the temporary folder cannot take them.
        """
        try:
            return self._stored(array)
        except OSError as error:
            raise UsageError(
                f"arrays of {array.nbytes / 1e6:.0f} MB fit neither into --memory nor into the temporary folder "
                f"({error.strerror or error}): give more memory, or point TMPDIR to a larger disk"
            ) from error

    def _stored(self, array: NDArray[Any]) -> NDArray[Any]:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="spa-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{self._files}.npy"
        self._files += 1
        np.save(path, array)
        return np.asarray(np.load(path, mmap_mode="r"))
