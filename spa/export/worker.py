"""The side of an export that has the framework: one JSON object per line, in and out, and arrays in .npz files.

It runs in the framework's own Python, which need not have this package or any of its dependencies but numpy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from spa.errors import RuntimeFailure, SpaError
from spa.export.drivers.base import Opened, first_line
from spa.export.request import Request


def main() -> None:
    """Answer until the other side closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # frameworks and the user's own code print
    source: Opened | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "export":
                source = _opened(Request.of(asked["request"]))
                body = _exported(source, Path(asked["path"]), Path(asked["examples"]))
            else:
                assert source is not None
                body = _ran(source, Path(asked["feeds"]), Path(asked["outputs"]))
        except SpaError as error:
            body = {"error": {"code": error.code, "message": str(error)}}
        except (SystemExit, Exception) as error:  # frameworks raise anything, and Paddle's exporter exits
            traceback.print_exc()
            message = f"the framework failed ({first_line(error)}); --verbose shows what it printed"
            body = {"error": {"code": RuntimeFailure.code, "message": message}}
        _answer(answers, body)


def _answer(answers: TextIO, body: Mapping[str, Any]) -> None:
    answers.write(json.dumps(body) + "\n")
    answers.flush()


def _opened(request: Request) -> Opened:
    driver = importlib.import_module(f"spa.export.drivers.{request.driver}")
    found: Opened = driver.open_source(request)
    return found


def _exported(source: Opened, path: Path, examples: Path) -> dict[str, Any]:
    source.export(path)
    names = list(source.examples)
    np.savez(examples, allow_pickle=False, **{str(k): source.examples[name] for k, name in enumerate(names)})
    axes = {name: {str(k): symbol for k, symbol in found.items()} for name, found in source.axes.items()}
    return {"exporter": source.exporter, "examples": names, "axes": axes, "outputs": list(source.outputs)}


def _ran(source: Opened, feeds: Path, outputs: Path) -> dict[str, Any]:
    with np.load(feeds, allow_pickle=False) as stored:
        names = json.loads(str(stored["names"]))
        given = {name: stored[str(k)] for k, name in enumerate(names)}
    found = [_plain(y) for y in source.run(given)]
    np.savez(outputs, allow_pickle=False, **{str(k): y for k, y in enumerate(found)})
    return {"outputs": len(found)}


def _plain(array: Any) -> Any:
    """Types that numpy cannot store (bfloat16) become float32."""
    array = np.asarray(array)
    return array if array.dtype.kind in "fiubc" else array.astype(np.float32)
