"""Measurements on disk, found again by model, data and request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.version import __version__

RULES = 7
"""Raised whenever measurements are taken in another way, so that old ones are not found."""
Arrays = Mapping[str, NDArray[Any]]
_COUNT = "_count"
"""How many arrays there are besides: a file that lost some is damaged."""


@dataclass(frozen=True)
class Cache:
    """A folder of `.npz` files; without a folder nothing is kept."""

    folder: Path | None = None
    model: str = ""
    """sha256 of the model."""

    def get(self, kind: str, data: str, request: Any) -> Arrays | None:
        """What was measured before; None if it was not, or if the file is damaged."""
        path = self._path(kind, data, request)
        if path is None or not path.is_file():
            return None
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
            return None
        count = found.pop(_COUNT, None)
        return found if count is not None and int(count) == len(found) else None

    def put(self, kind: str, data: str, request: Any, arrays: Arrays) -> None:
        """Keep a measurement; a folder that cannot be written is no reason to fail."""
        path = self._path(kind, data, request)
        if path is None:
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    np.savez(file, **arrays, **{_COUNT: np.array(len(arrays))})  # type: ignore[arg-type]  # numpy types its own option
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _path(self, kind: str, data: str, request: Any) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps([__version__, RULES, self.model, data, kind, request], sort_keys=True, default=str)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz"


def default_folder() -> Path:
    """`$SPA_CACHE`, or `spa` in the user's cache folder."""
    chosen = os.environ.get("SPA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spa"
