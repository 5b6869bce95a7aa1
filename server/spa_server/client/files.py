"""Which files belong together."""

from __future__ import annotations

import os
from pathlib import Path

from spa.errors import UsageError

__all__ = ["files_below", "files_of_model"]


def files_of_model(path: Path) -> list[tuple[str, Path]]:
    """An ONNX file and its external data: (path that the model uses, file), the ONNX file first.

    Raises:
        ModelError: it cannot be read, or its external data are missing or outside of its folder.
    """
    import onnx_ir as ir

    from spa.graph import load

    graph = load(path)
    if not graph.external:
        return [(path.name, path)]
    names = dict.fromkeys(
        os.fspath(value.const_value.location)
        for part in ir.load(path).graphs()
        for value in part.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    )
    return [(path.name, path), *((name.replace(os.sep, "/"), path.parent / name) for name in names)]


def files_below(path: Path) -> list[tuple[str, Path]]:
    """A file, or all files of a folder: (path within it, file).

    Raises:
        UsageError: there is nothing.
    """
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise UsageError(f"{path}: does not exist")
    found = sorted(file for file in path.rglob("*") if file.is_file())
    if not found:
        raise UsageError(f"{path}: is an empty folder")
    # A folder of one file is told from a file by its path.
    below = path.parent if len(found) == 1 else path
    return [(file.relative_to(below).as_posix(), file) for file in found]
