"""Writing to disk while more comes, so that there is little left to wait for at the end."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["begin_writing"]

_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin, and do not wait."""


def _found() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_call = _found()


def begin_writing(handle: int, offset: int, size: int) -> None:
    """Let the kernel begin to write these bytes of a file to disk. Only fsync tells whether and when they are there.

    Args:
        handle: of the open file.
        offset: of the first byte.
        size: bytes.
    """
    if _call is not None:
        _call(handle, offset, size, _WRITE)
