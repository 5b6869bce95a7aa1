"""Memory that a process and its children take."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CAN_SEE", "resident"]

CAN_SEE = Path("/proc/self/statm").is_file()
"""Whether this system tells; elsewhere only the kernel's own limits hold."""


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
