"""What does not fit into memory comes back from disk, number for number."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from spa.errors import UsageError
from spa.shelf import Shelf


def test_arrays_beyond_the_limit_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arrays = [np.random.default_rng(k).normal(size=(10, 10)) for k in range(5)]
    shelf = Shelf(2 * arrays[0].nbytes)
    kept = [shelf.keep(a) for a in arrays]
    for k, (a, b) in enumerate(zip(arrays, kept, strict=True)):
        np.testing.assert_array_equal(a, b)
        assert (a is b) == (k < 2)
        assert b.flags.writeable == (k < 2)
    assert len(list(tmp_path.rglob("*.npy"))) == 3
    del kept, shelf
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UsageError, match=r"No space left on device.*TMPDIR"):
        Shelf(0).keep(np.zeros(3))
