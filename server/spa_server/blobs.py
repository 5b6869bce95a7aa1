"""Where the bytes are: a folder, or an object store by URL. A file is found by its sha256, and never changes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from spa.errors import UsageError

__all__ = ["PIECE", "Blobs", "digest_of"]

PIECE = 1 << 20
"""Bytes that are read at a time."""


class Blobs:
    """A content-addressed store."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: a folder, or what fsspec understands, such as s3://bucket/prefix.

        Raises:
            UsageError: the URL is wrong, or the package for it is missing.
        """
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"blobs: {url!r} cannot be used ({error})") from error
        self.local = isinstance(self._fs, LocalFileSystem)
        if self.local:
            os.makedirs(self._root, mode=0o700, exist_ok=True)

    def put(self, file: Path, sha256: str) -> None:
        """Take a file, which is gone afterwards; all or nothing, and on disk when this returns.

        Raises:
            OSError: it cannot be stored.
        """
        target = self._path(sha256)
        if not self.local:
            self._fs.put_file(str(file), target)
            file.unlink()
            return
        Path(target).parent.mkdir(mode=0o700, exist_ok=True)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        file.chmod(0o400)
        try:
            os.replace(file, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy_in(file, target)
        self._settle(target)

    def _copy_in(self, file: Path, target: str) -> None:
        temporary = f"{target}.{secrets.token_hex(8)}.tmp"
        try:
            shutil.copyfile(file, temporary)
            with open(temporary, "rb") as opened:
                os.fsync(opened.fileno())
            os.chmod(temporary, 0o400)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        file.unlink()

    @staticmethod
    def _settle(target: str) -> None:
        """A name is on disk when its folder is."""
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[BinaryIO]:
        """Its bytes, from anywhere. Raises: FileNotFoundError, OSError."""
        with self._fs.open(self._path(sha256), "rb") as file:
            yield cast("BinaryIO", file)

    def place(self, sha256: str, path: Path) -> None:
        """Put a copy, or where that is the same a link, at `path`. Raises: OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self._path(sha256)
        if not self.local:
            self._fs.get_file(source, str(path))
            return
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            shutil.copyfile(source, path)

    def remove(self, sha256: str) -> None:
        """Get rid of it, if it is there. Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(sha256))

    def has(self, sha256: str) -> bool:
        """Whether it is there."""
        return bool(self._fs.exists(self._path(sha256)))

    def every(self) -> list[str]:
        """Digests of all that is there."""
        return sorted(os.path.basename(path) for path in self._fs.find(self._root))

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


def digest_of(path: Path) -> str:
    """sha256 of a file, as text. Raises: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
