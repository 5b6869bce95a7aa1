"""Files on their way in: written as they come, checked when they are whole, and gone on with after a break."""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc

from spa_server.blobs import Blobs
from spa_server.database import Database, contents
from spa_server.disk import Appender
from spa_server.errors import Refusal, exhausted, invalid
from spa_server.names import owner_folder
from spa_server.varints import Buffer

__all__ = ["Incoming", "Uploads", "check_sha256"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_sha256(text: str, field: str = "sha256") -> str:
    """Raises: Refusal if the text is no sha256."""
    if not _SHA256.fullmatch(text):
        raise invalid(field, f"{field}: must be 64 lower-case hexadecimal digits")
    return text


class Uploads:
    """What has come in so far, in a folder of this server."""

    def __init__(self, database: Database, blobs: Blobs, folder: Path, limit: int, quota: int) -> None:
        """
        Args:
            database: knows which contents are stored.
            blobs: where whole files go.
            folder: for parts.
            limit: bytes of one file.
            quota: bytes of all files of one owner; 0 for no limit.
        """
        self._database, self._blobs, self._folder = database, blobs, folder
        self._limit, self._quota = limit, quota
        self._open: set[Path] = set()

    def offset(self, owner: str, sha256: str) -> tuple[int, bool]:
        """Bytes that are there, and whether that is all of them. Raises: Refusal."""
        if contents.has(self._database, owner, check_sha256(sha256)):
            return 0, True
        part = self._part(owner, sha256)
        return (part.stat().st_size if part.is_file() else 0), False

    @contextlib.contextmanager
    def receive(self, owner: str, sha256: str, size: int, offset: int) -> Iterator[Incoming]:
        """A file that is written from `offset` on; what was written stays when this is left early.

        Raises:
            Refusal: it is too large, somebody is sending it already, or it goes on at another place.
        """
        check_sha256(sha256)
        if not 0 <= size <= self._limit:
            raise invalid(
                "header.size", f"header.size: {size} must be between 0 and {self._limit} bytes on this server"
            )
        part = self._part(owner, sha256)
        if part in self._open:
            raise Refusal(grpc.StatusCode.ABORTED, "busy", "this file is being sent already; wait for that", retry=1.0)
        self._open.add(part)
        try:
            self._check_quota(owner, part, size)
            part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with Appender(part) as file:
                if file.size > size:
                    file.clear()
                have = file.size
                if offset != have:
                    raise Refusal(
                        grpc.StatusCode.OUT_OF_RANGE,
                        "offset",
                        f"header.offset: {offset} is not where this goes on; {have} bytes are here",
                        offset=str(have),
                    )
                yield Incoming(self, file, part, owner, sha256, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise exhausted("disk-full", "the server's disk is full; come again later", 60.0) from error
            raise
        finally:
            self._open.discard(part)

    def store(self, owner: str, sha256: str, part: Path) -> None:
        """Take a whole file that was checked."""
        if not contents.announce(self._database, sha256, part.stat().st_size) or not self._blobs.has(sha256):
            self._blobs.put(part, sha256)
        contents.confirm(self._database, owner, sha256)
        part.unlink(missing_ok=True)

    def clean(self, age: float) -> int:
        """Forget parts that nobody has added to for `age` seconds; how many."""
        count = 0
        for part in self._folder.glob("*/*.part"):
            with contextlib.suppress(FileNotFoundError):
                if part not in self._open and part.stat().st_mtime < time.time() - age:
                    part.unlink()
                    count += 1
        return count

    def _check_quota(self, owner: str, part: Path, size: int) -> None:
        if not self._quota:
            return
        with self._database.read() as connection:
            used = contents.used(connection, owner)
        underway = sum(p.stat().st_size for p in part.parent.glob("*.part") if p != part)
        if used + underway + size > self._quota:
            message = (
                f"{size} bytes more than the {used + underway} that you have are above your quota of {self._quota}"
            )
            raise exhausted("bytes", f"{message}; delete models, datasets or jobs", 3600.0)

    def _part(self, owner: str, sha256: str) -> Path:
        return self._folder / owner_folder(owner) / f"{sha256}.part"


class Incoming:
    """One file on its way. Its methods block; they are called one after the other."""

    def __init__(self, uploads: Uploads, file: Appender, part: Path, owner: str, sha256: str, size: int) -> None:
        self._uploads, self._part, self._owner, self._sha256, self._size = uploads, part, owner, sha256, size
        self._file = file

    def write(self, pieces: Iterable[Buffer]) -> None:
        """Add bytes. Raises: Refusal if there are more than was said."""
        for data in pieces:
            if self._file.size + len(data) > self._size:
                raise invalid("data", f"data: more than the {self._size} bytes that the header said")
            self._file.write(data)

    def finish(self) -> None:
        """All bytes are there: check and store them. Raises: Refusal if they are not, or are other ones."""
        self._file.flush()
        if self._file.size < self._size:
            message = f"{self._file.size} of {self._size} bytes came; go on where GetUpload says"
            raise Refusal(grpc.StatusCode.ABORTED, "incomplete", message, offset=str(self._file.size))
        if (digest := self._file.digest()) != self._sha256:
            self._part.unlink(missing_ok=True)
            message = f"the bytes have sha256 {digest} instead of what the header said; send them again"
            raise Refusal(grpc.StatusCode.DATA_LOSS, "digest", message)
        self._uploads.store(self._owner, self._sha256, self._part)
