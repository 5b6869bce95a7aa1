"""What the server writes down: one JSON object per line, without tokens and without the contents of anything."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spa.errors import OutputError

__all__ = ["Audit", "start"]


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body)


def start(*, verbose: bool = False) -> None:
    """Write the log of this package to standard error, and warnings of others; everything if `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("spa_server").setLevel(logging.DEBUG if verbose else logging.INFO)


class Audit:
    """Who did what: a file that only grows."""

    def __init__(self, path: Path) -> None:
        """Raises: OutputError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8")
            path.chmod(0o600)
        except OSError as error:
            raise OutputError(f"{path}: the audit log cannot be written ({error.strerror})") from error
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log = logging.getLogger("spa_server_audit")
        self._log.propagate = False
        self._log.setLevel(logging.INFO)
        self._log.handlers[:] = [handler]

    def write(self, **fields: Any) -> None:
        """Add a line; fields that are None are left out."""
        body: Mapping[str, Any] = {"time": _utc(time.time()), **fields}
        self._log.info(json.dumps({name: value for name, value in body.items() if value is not None}))

    def close(self) -> None:
        """Close the file."""
        for handler in self._log.handlers:
            handler.close()
        self._log.handlers[:] = []


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
