"""Large files, written past the kernel's cache where that is possible.

Copying into that cache takes as much processor time as sending, and the end of a file then waits until the disk has
caught up. Whole buffers go to the disk directly (O_DIRECT, Linux), while another thread takes their digest; what is
left of one at the end does not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from spa_server.varints import Buffer

__all__ = ["Appender"]

_BUFFER = 4 << 20
_BLOCK = 4096
"""What positions and sizes of direct writes are multiples of."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class Appender:
    """Adds bytes to the end of a file. A context manager: left in any way, the file has all bytes that were added."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """Open or make the file; `new`: it must not be there. Raises: OSError."""
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o666)
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER))  # begins at a page, as direct writes want
        self._direct = bool(_DIRECT)
        self._thread = ThreadPoolExecutor(1)  # it is started when there is something to do
        self._begin(os.fstat(self._handle).st_size)

    def _begin(self, size: int) -> None:
        self._hash = hashlib.sha256()
        for start in range(0, size, _BUFFER):
            self._hash.update(os.pread(self._handle, _BUFFER, start))
        self._start = size // _BLOCK * _BLOCK
        """Where the buffer belongs in the file."""
        self._filled = self._hashed = size - self._start
        """Bytes of the buffer that are used, and that the digest knows."""
        self._buffer[: self._filled] = os.pread(self._handle, self._filled, self._start)
        self._fresh = False
        """Whether bytes are held that the file does not have."""

    @property
    def size(self) -> int:
        """Bytes of the file, those that are still held included."""
        return self._start + self._filled

    def write(self, data: Buffer) -> None:
        """Add bytes. Raises: OSError."""
        rest = memoryview(data)
        while rest:
            part = rest[: _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._fresh = True
            rest = rest[len(part) :]
            if self._filled == _BUFFER:
                hashing = self._thread.submit(self._hash.update, self._buffer[self._hashed :])
                try:
                    self._put()
                finally:
                    hashing.result()
                self._start, self._filled, self._hashed, self._fresh = self._start + _BUFFER, 0, 0, False

    def flush(self) -> None:
        """Put what is held into the file, for others to see; only fsync makes it last. Raises: OSError."""
        if self._fresh:
            _write(self._handle, self._buffer[: self._filled], self._start)
            self._fresh = False

    def digest(self) -> str:
        """sha256 of the whole file."""
        self._hash.update(self._buffer[self._hashed : self._filled])
        self._hashed = self._filled
        return self._hash.hexdigest()

    def clear(self) -> None:
        """Begin again with an empty file. Raises: OSError."""
        os.ftruncate(self._handle, 0)
        self._begin(0)

    def _put(self) -> None:
        """Write the whole buffer."""
        if self._direct and self._switch(on=True):
            try:
                _write(self._handle, self._buffer, self._start)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False  # this file system wants more than blocks
            finally:
                self._switch(on=False)
        _write(self._handle, self._buffer, self._start)

    def _switch(self, *, on: bool) -> bool:
        """Whether the file is written to directly from now on, as asked for."""
        import fcntl  # on systems with O_DIRECT

        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
        except OSError:  # file systems in memory have nothing to be direct to
            self._direct = False
        return self._direct

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                self.flush()
        finally:
            self._thread.shutdown()
            os.close(self._handle)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
