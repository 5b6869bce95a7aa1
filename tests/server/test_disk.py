"""Files that are written past the kernel's cache: the same bytes and digest, however they come and where it ends."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spa_server import disk
from spa_server.disk import Appender

BUFFER = 1 << 14


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of four blocks."""
    monkeypatch.setattr(disk, "_BUFFER", BUFFER)


SIZES = st.one_of(st.integers(0, 3 * BUFFER), st.sampled_from([0, 1, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(SIZES, max_size=4), min_size=1, max_size=4), st.integers(0, 99))
def test_what_is_added_is_there(tmp_path: Path, sessions: list[list[int]], seed: int) -> None:
    """In several pieces, and in several openings of the file."""
    rng, path, want = np.random.default_rng(seed), tmp_path / "file", b""
    path.unlink(missing_ok=True)
    for sizes in sessions:
        with Appender(path) as file:
            for size in sizes:
                piece = rng.bytes(size)
                file.write(piece)
                want += piece
                assert file.size == len(want)
            file.flush()
            assert path.read_bytes() == want
            assert file.digest() == hashlib.sha256(want).hexdigest()
        assert path.read_bytes() == want


def test_writing_goes_on_after_a_look(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * BUFFER)
    with Appender(tmp_path / "file") as file:
        for start in range(0, len(data), 5000):
            file.write(data[start : start + 5000])
            file.flush()
            assert file.digest() == hashlib.sha256(data[: start + 5000]).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(70_000))
    with Appender(path) as file:
        file.clear()
        file.write(b"other")
        assert file.digest() == hashlib.sha256(b"other").hexdigest()
    assert path.read_bytes() == b"other"


def test_a_new_file_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        Appender(tmp_path / "file", new=True)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_bytes_before_an_error_stay(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100

    def interrupted() -> None:
        with Appender(tmp_path / "file") as file:
            file.write(data)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes on this system")
@pytest.mark.parametrize("when", ["opened", "written"])
def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Those in memory refuse the flag, others refuse the write."""
    import fcntl

    real, refused = fcntl.fcntl, []

    def switch(handle: int, what: int, flags: int = 0) -> int:
        if when == "opened" and what == fcntl.F_SETFL and flags & os.O_DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "no")
        return real(handle, what, flags)

    write = os.pwrite

    def put(handle: int, data: Any, offset: int) -> int:
        if when == "written" and real(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no")
        return write(handle, data, offset)

    monkeypatch.setattr(fcntl, "fcntl", switch)
    monkeypatch.setattr(os, "pwrite", put)
    data = np.random.default_rng(1).bytes(3 * BUFFER + 7)
    with Appender(tmp_path / "file") as file:
        file.write(data)
        assert file.digest() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data
    assert len(refused) <= 1  # it is not tried again


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(handle: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", put)
    with pytest.raises(OSError, match="full"), Appender(tmp_path / "file") as file:
        file.write(bytes(2 * BUFFER))
