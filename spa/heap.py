"""Memory that nobody uses any more is given back: what the C library holds, and pages of mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RELEASE_EVERY = 0.005  # seconds


class _MallInfo(ctypes.Structure):
    """What glibc says about its heaps (mallinfo2(3))."""

    _fields_ = (("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t))


@functools.cache
def _glibc() -> Any:
    try:
        found = ctypes.CDLL(None)
        found.mallinfo2.restype, found.malloc_trim.argtypes = _MallInfo, [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return found


class Trim:
    """Gives memory that nobody uses back to the system whenever it is more than `most` bytes.

    glibc keeps freed blocks of up to 32 MB, which is what activations that come and go leave behind. Asking how much
    that is takes milliseconds where heaps are fragmented: it is asked as often as costs a twentieth of the time. Other
    C libraries are left alone.
    """

    def __init__(self, most: int) -> None:
        self.most, self._next = most, 0.0

    def __call__(self) -> None:
        """Look, unless it was looked at lately."""
        glibc = _glibc()
        start = time.perf_counter()
        if glibc is None or start < self._next:
            return
        if glibc.mallinfo2().fordblks > self.most:
            glibc.malloc_trim(0)
        end = time.perf_counter()
        self._next = end + 19 * (end - start)


@contextlib.contextmanager
def released(folder: Path) -> Iterator[None]:
    """Let go of mapped pages of the files in `folder` soon after they were read (on Linux; elsewhere nothing happens).

    For use around the runs of an open session: ONNX Runtime keeps the files of external data mapped, so that in the
    end every page it has read counts as this process's memory.
    """
    if sys.platform != "linux":
        yield
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = threading.Event()
    ranges = _clean_ranges(folder.resolve())  # found once: a model that runs writes to none of its weights

    def release() -> None:
        while not done.wait(_RELEASE_EVERY):
            for start, length in ranges:
                advise(start, length, mmap.MADV_DONTNEED)

    thread = threading.Thread(target=release, name="spa-release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _clean_ranges(folder: Path) -> list[tuple[int, int]]:
    """Where files of `folder` are mapped without a page that was written to (that one would be lost)."""
    found: list[tuple[int, int]] = []
    inside = False
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            words = line.split(maxsplit=5)
            if b"-" in words[0]:
                low, high = (int(word, 16) for word in words[0].split(b"-"))
                inside = len(words) > 5 and words[5].startswith(os.fsencode(folder) + b"/")
                if inside:
                    found.append((low, high - low))
            elif inside and words[0] == b"Anonymous:" and words[1] != b"0":
                found.pop()
                inside = False
    return found
