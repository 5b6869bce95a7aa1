"""Names that callers choose, and what becomes of them on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from spa_server.errors import invalid

__all__ = ["check_display_name", "check_paths", "owner_folder"]


def owner_folder(owner: str) -> str:
    """A folder's name for an owner, whatever characters that has."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def check_display_name(name: str) -> str:
    """Raises: Refusal if it is too long, or cannot be printed."""
    if len(name) > 200 or not name.isprintable():
        raise invalid("display_name", "display_name: must be at most 200 printable characters")
    return name


def check_paths(paths: Sequence[str], most: int) -> None:
    """Paths must stay inside of their folder, and be files of which none is another's folder.

    Raises:
        Refusal: one does not.
    """
    if not 0 < len(paths) <= most:
        raise invalid("files", f"files: there must be 1 to {most}")
    for place, path in enumerate(paths):
        parts = path.split("/")
        bad = any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        if bad or len(path) > 500 or "\\" in path or ":" in path or not path.isprintable():
            raise invalid(
                f"files[{place}].path", f"files[{place}].path: {path!r} must be a relative path inside a folder"
            )
    folders = {path[:cut] for path in paths for cut in range(len(path)) if path[cut] == "/"}
    if len(set(paths)) < len(paths) or folders & set(paths):
        raise invalid("files", "files: a path comes twice, or is a file and a folder")
