"""Files of torch.export: what would be executed by being read is never loaded."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa.errors import ModelError, UnsupportedModelError
from spa.export.drivers.from_pt2 import _arithmetic, check, open_source
from spa.export.request import Request

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3)).eval()
    shapes = ({0: torch.export.Dim("rows")},)
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes), path)
    return path


def changed(
    good: Path, path: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None
) -> Path:
    """A copy of an archive with other contents."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return path


def edited(text: str, key: str, value: Any) -> bytes:
    """JSON with the first entry called `key` replaced."""
    body, done = json.loads(text), []

    def walk(item: Any) -> None:
        for k, v in item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ():
            if k == key and not done:
                item[k] = value
                done.append(k)
            else:
                walk(v)

    walk(body)
    assert done
    return json.dumps(body).encode()


class Evil:
    """Does something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import builtins; builtins.spa_was_executed = True",))


def test_a_plain_file_is_opened_and_run(good: Path) -> None:
    check(good)
    source = open_source(Request("from_pt2", str(good)))
    (name,) = source.examples
    assert source.axes == {name: {0: "batch"}}
    assert source.run(source.examples)[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("use_pickle", True, "Python objects"),
        ("path_name", "opaque_obj_0", "Python objects"),
        ("target", "torch.hub.load", "calls 'torch.hub.load'"),
        ("expr_str", "__import__('os').getcwd()", "no arithmetic"),
    ],
)
def test_what_would_be_executed_is_refused(good: Path, tmp_path: Path, key: str, value: Any, text: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        text = data.decode("utf-8", errors="ignore")
        return edited(text, key, value) if name.endswith(".json") and f'"{key}"' in text else data

    with pytest.raises(UnsupportedModelError, match=text):
        check(changed(good, tmp_path / "bad.pt2", change))


def test_pickles_are_refused_unread(good: Path, tmp_path: Path) -> None:
    import builtins

    stream = io.BytesIO()
    torch.save((Evil(),), stream)
    evil = stream.getvalue()
    samples = changed(good, tmp_path / "a.pt2", lambda n, d: evil if "sample_inputs" in n else d)
    weights = changed(good, tmp_path / "b.pt2", lambda n, d: d, {"model/data/weights/model.pt": pickle.dumps(Evil())})
    compiled = changed(good, tmp_path / "c.pt2", lambda n, d: d, {"model/data/aotinductor/model/a.so": b""})
    for path in (samples, weights, compiled):
        with pytest.raises(UnsupportedModelError):
            open_source(Request("from_pt2", str(path)))
    assert not hasattr(builtins, "spa_was_executed")


def test_old_and_damaged_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "5.1")
    with pytest.raises(UnsupportedModelError, match="old format"):
        check(tmp_path / "old.pt2")
    (tmp_path / "damaged.pt2").write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match=r"not a file of torch.export.save"):
        check(tmp_path / "damaged.pt2")


@pytest.mark.parametrize(
    "text", ["s77", "2*s0 + 1", "Max(1, s0//2)", "Symbol('s77', positive=True, integer=True)", "Eq(s0, 3)"]
)
def test_sizes_are_arithmetic(text: str) -> None:
    assert _arithmetic(text)


@pytest.mark.parametrize(
    "text",
    ["eval('1')", "().__class__", "sympify('x')", "S('x.y')", "lambda: 1", "[x for x in y]", "a[0]", "f'{x}'", "a;b"],
)
def test_code_is_no_arithmetic(text: str) -> None:
    assert not _arithmetic(text)
