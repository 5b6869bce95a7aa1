"""Where the bytes are: a folder, or an object store by URL. A file is found by its sha256, and never changes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from spa.errors import UsageError

__all__ = ["PIECE", "Blobs", "digest_of"]

PIECE = 1 << 20
"""Bytes that are read at a time."""
_AHEAD = 4 << 20
"""Bytes that are fetched from an object store at a time; its clients would take ten times that for each reader."""
_OPTIONS = {"s3": {"max_concurrency": 2}}
"""Of clients of stores: parts of one file that are on their way, which are in memory, at the same time."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


class Blobs:
    """A content-addressed store."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: a folder, or what fsspec understands, such as s3://bucket/prefix.

        Raises:
            UsageError: the URL is wrong, or the package for it is missing.
        """
        # What other servers store is not in lists that this one remembers, and no other part of the process may share
        # a client whose settings were read before ours.
        options = {"use_listings_cache": False, "skip_instance_cache": True, **_OPTIONS.get(url.partition(":")[0], {})}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            hint = "; install spa-prune[s3]" if url.startswith("s3:") and isinstance(error, ImportError) else ""
            raise UsageError(f"blobs: {url!r} cannot be used ({error}){hint}") from error
        self.local = isinstance(self._fs, LocalFileSystem)
        if self.local:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            return
        try:
            self._probe()
        except OSError as error:
            raise UsageError(
                f"blobs: nothing can be stored at {url!r} ({_first(error)}); check the URL, that its bucket exists, "
                "and what its client reads from the environment, such as AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID"
            ) from error

    def put(self, file: Path, sha256: str) -> None:
        """Take a file, which is gone afterwards; all or nothing, and on disk when this returns.

        Raises:
            OSError: it cannot be stored.
        """
        target = self._path(sha256)
        if not self.local:
            self._ask(self._fs.put_file, str(file), target)
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
        path = self._path(sha256)
        if self.local:
            with open(path, "rb") as file:
                yield file
            return
        with self._ask(self._fs.open, path, "rb", block_size=_AHEAD) as remote:
            yield cast("BinaryIO", _Remote(remote, self._ask))

    def place(self, sha256: str, path: Path) -> None:
        """Put a copy, or where that is the same a link, at `path`. Raises: OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self._path(sha256)
        if not self.local:
            self._ask(self._fs.get_file, source, str(path))
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
            self._ask(self._fs.rm_file, self._path(sha256))

    def has(self, sha256: str) -> bool:
        """Whether it is there."""
        return bool(self._ask(self._fs.exists, self._path(sha256)))

    def every(self) -> list[str]:
        """Digests of all that is there."""
        names = (os.path.basename(path) for path in self._ask(self._fs.find, self._root))
        return sorted(name for name in names if _SHA256.fullmatch(name))

    def _probe(self) -> None:
        """Raises: OSError if nothing can be written."""
        path = f"{self._root}/probe-{secrets.token_hex(8)}"
        self._ask(self._fs.pipe_file, path, b"")
        self._ask(self._fs.rm_file, path)

    @staticmethod
    def _ask(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Raises: OSError, whatever the client of a store raises."""
        try:
            return call(*arguments, **options)
        except OSError:
            raise
        except Exception as error:  # each client has exceptions of its own
            raise OSError(errno.EIO, f"the store does not answer ({_first(error)})") from error

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


class _Remote:
    """A file of a store, as far as it is read from here."""

    def __init__(self, file: Any, ask: Callable[..., Any]) -> None:
        self._file, self._ask = file, ask

    def read(self, size: int = -1) -> bytes:
        """Raises: OSError."""
        data: bytes = self._ask(self._file.read, size)
        return data

    def seek(self, offset: int) -> int:
        """Nothing is fetched."""
        return int(self._file.seek(offset))


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def digest_of(path: Path) -> str:
    """sha256 of a file, as text. Raises: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
