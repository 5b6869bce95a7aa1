"""Memory that the C library holds and nobody uses."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any


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
