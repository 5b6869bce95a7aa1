"""What was measured is found again, and only then; damaged files are as good as none."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spa
import spa.executors.collect
import spa.measured
import spa.sensitivity
from spa.cache import Cache, default_folder
from tests.net import Net

Array = np.ndarray
DATA = {"x": np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)}


def model(seed: float = 1.0) -> onnx.ModelProto:
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 8), "a", 8, 32))
    x = net("Relu", net.gemm(x, "b", 32, 24))
    net.weights["b.bias"] *= np.float32(seed)
    net.named(net.gemm(x, "c", 24, 5), "y")
    return net.model(y=("n", 5))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often activations were measured."""
    seen: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(spa.measured, "covariances")
    counted(spa.measured, "profiles")
    counted(spa.sensitivity.Trials, "error")
    return seen


def pruned(
    folder: Path | None, target: str = "macs=0.7", data: dict[str, Array] = DATA, **more: Any
) -> onnx.ModelProto:
    more = {"method": "obspa", "source": model()} | more
    result = spa.prune(more.pop("source"), target=target, calibration=data, cache=folder, **more)
    assert isinstance(result.model, onnx.ModelProto)
    return result.model


def test_another_target_measures_nothing(tmp_path: Path, passes: Counter[str]) -> None:
    pruned(tmp_path)
    first = Counter(passes)
    assert first["covariances"] >= 1
    assert first["error"] >= 1
    again = pruned(tmp_path, "macs=0.5")
    assert passes == first
    assert again.SerializeToString() == pruned(None, "macs=0.5").SerializeToString()
    assert passes != first  # without a folder nothing is kept


@pytest.mark.parametrize("method", ["flap", "ob2c", "minitron-width", "cfsp", "amp", "vbp", "obspa-paper"])
def test_every_method_uses_it(tmp_path: Path, passes: Counter[str], method: str) -> None:
    pruned(tmp_path, method=method)
    first = Counter(passes)
    assert sum(first.values()) >= 1
    pruned(tmp_path, "macs=0.5", method=method)
    assert passes == first


def test_methods_share_measurements(tmp_path: Path, passes: Counter[str]) -> None:
    pruned(tmp_path, method="flap")
    pruned(tmp_path, method="minitron-width")
    assert passes["profiles"] == 1
    pruned(tmp_path, method="ob2c")
    assert passes["covariances"] == 1


def test_other_data_and_other_models_are_measured_anew(tmp_path: Path, passes: Counter[str]) -> None:
    pruned(tmp_path, method="ob2c")
    for k, more in enumerate((
        {"data": {"x": DATA["x"] * 2}},
        {"data": {"x": DATA["x"][:60]}},
        {"source": model(2.0)},
    )):  # fmt: skip
        pruned(tmp_path, method="ob2c", **more)  # type: ignore[arg-type]  # options of several types
        assert passes["covariances"] == k + 2
    pruned(tmp_path, method="ob2c", batch=7)  # no matter
    assert passes["covariances"] == 4


def test_damaged_files_are_ignored(tmp_path: Path, passes: Counter[str]) -> None:
    want = pruned(tmp_path).SerializeToString()
    first = Counter(passes)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert pruned(tmp_path).SerializeToString() == want
    assert passes == first + first
    assert pruned(tmp_path).SerializeToString() == want  # written again
    assert passes == first + first


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes that are flipped, cut off or replaced: what is found is what was put, or nothing."""
    cache = Cache(tmp_path_factory.mktemp("cache"), "m")
    arrays = {"a": np.arange(30.0).reshape(5, 6), "b": np.array(7)}
    cache.put("kind", "d", ["request"], arrays)
    assert cache.folder is not None
    (path,) = cache.folder.iterdir()
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "junk"]))
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
            raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw = bytearray(data.draw(st.binary(max_size=200)))
    path.write_bytes(bytes(raw))
    found = cache.get("kind", "d", ["request"])
    if found is not None:
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


def test_odd_damage(tmp_path: Path) -> None:
    """Flags that say the archive is encrypted or compressed otherwise, and a directory that lists fewer files."""
    cache = Cache(tmp_path, "m")
    cache.put("kind", "d", [], {"a": np.ones(3), "b": np.ones(2)})
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    directory = raw.index(b"PK\x01\x02")
    for at, value in ((6, 1), (directory + 8, 1), (6, 32), (8, 9), (directory + 10, 8), (len(raw) - 12, 1)):
        changed = bytearray(raw)
        changed[at] = value
        path.write_bytes(bytes(changed))
        found = cache.get("kind", "d", [])
        assert found is None or set(found) == {"a", "b"}
    np.savez(path, a=np.ones(3))
    assert cache.get("kind", "d", []) is None


def test_keys() -> None:
    cache = Cache(Path("/nowhere"), "m")
    request = ["a", "b"]
    paths = {
        cache._path("kind", "d", request),
        cache._path("other", "d", request),
        cache._path("kind", "e", request),
        cache._path("kind", "d", ["a"]),
        cache._path("kind", "d", ["ab"]),
        Cache(Path("/nowhere"), "n")._path("kind", "d", request),
    }
    assert len(paths) == 6
    assert cache._path("kind", "d", request) == Cache(Path("/nowhere"), "m")._path("kind", "d", ("a", "b"))


def test_no_folder_keeps_nothing() -> None:
    Cache().put("kind", "d", [], {"a": np.ones(2)})
    assert Cache().get("kind", "d", []) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Measured all the same: a file where the folder should be, or a folder without rights."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    pruned(blocked, method="ob2c")
    assert blocked.read_text() == "no folder"
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        pruned(closed, method="ob2c")


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    pruned(tmp_path)
    assert all(p.suffix == ".npz" and not p.name.startswith(".") for p in tmp_path.iterdir())
    kinds = {p.name.split("-")[0] for p in tmp_path.iterdir()}
    assert kinds - {"profiles"} == {"moments", "sensitivity", "scores", "outputs"}


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CACHE", "/somewhere/else")
    assert default_folder() == Path("/somewhere/else")
    monkeypatch.delenv("SPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/spa")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "spa"
