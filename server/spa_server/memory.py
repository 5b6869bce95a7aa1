"""Memory: what a process and its children take, and what a server keeps of what it has freed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["CAN_SEE", "keep_freed", "resident"]

CAN_SEE = Path("/proc/self/statm").is_file()
"""Whether this system tells; elsewhere only the kernel's own limits hold."""


_MALLOC = {-3: 32 << 20, -1: 128 << 20, -2: 16 << 20}
"""glibc's M_MMAP_THRESHOLD (the largest that it takes), M_TRIM_THRESHOLD and M_TOP_PAD, in bytes."""


def keep_freed() -> None:
    """Do not give memory back to the kernel with each message.

    Otherwise a tensor of a megabyte is 250 new pages, several times for each request, and getting them takes longer
    than all else that is done with it. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, size in _MALLOC.items():
            mallopt(name, size)


def resident(pid: int) -> int:
    """Resident bytes of a process and of all that it started; 0 if it is gone."""
    page, total, queue, seen = os.sysconf("SC_PAGE_SIZE"), 0, [pid], set[int]()
    while queue:
        one = queue.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            fields = Path(f"/proc/{one}/statm").read_text(encoding="ascii").split()
            # Pages of files that are mapped (weights) can be dropped by the kernel at any time: they do not count.
            total += max(int(fields[1]) - int(fields[2]), 0) * page
            for task in os.listdir(f"/proc/{one}/task"):
                queue += map(int, Path(f"/proc/{one}/task/{task}/children").read_text(encoding="ascii").split())
        except (OSError, ValueError, IndexError):  # gone while it was looked at
            continue
    return total
