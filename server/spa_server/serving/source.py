"""Where models come from: a protocol, and folders that follow it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from spa.errors import ModelError, UsageError
from spa_server.serving.errors import NotFound

__all__ = ["FolderSource", "ModelSource", "in_order"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


class ModelSource(Protocol):
    """Lists models and opens their files. Called from several threads; may block."""

    def models(self) -> Sequence[str]:
        """Names of all models."""

    def versions(self, model: str) -> Mapping[str, str]:
        """Version -> a mark that changes when its files do. Raises: NotFound if there is no such model."""

    def options(self, model: str) -> Mapping[Any, Any]:
        """What the model's configuration says, unchecked. Raises: NotFound; UsageError if it cannot be read."""

    def open(self, model: str, version: str) -> AbstractContextManager[Path]:
        """The ONNX file, with its external data beside it, for as long as the context lasts.

        Raises: NotFound if there is no such version; ModelError if it cannot be had.
        """


def in_order(versions: Sequence[str]) -> list[str]:
    """Oldest first: names by the alphabet, then numbers by their size."""
    return sorted(versions, key=lambda name: (name.isdecimal(), int(name) if name.isdecimal() else 0, name))


class FolderSource:
    """`FOLDER/NAME/VERSION/model.onnx`, and `FOLDER/NAME/config.yaml` if a model has options.

    Names and versions are letters, digits, `.`, `_` and `-`; other folders are passed over.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give one that holds NAME/VERSION/model.onnx.")
        self._folder = folder

    def models(self) -> Sequence[str]:
        """Names of folders that hold a version."""
        return [name for name in _folders(self._folder) if self._files(name)]

    def versions(self, model: str) -> Mapping[str, str]:
        """Version -> names, sizes and times of its files. Raises: NotFound."""
        return {version: _mark(file.parent) for version, file in self._known(model).items()}

    def options(self, model: str) -> Mapping[Any, Any]:
        """What config.yaml says, nothing without one. Raises: NotFound, UsageError."""
        self._known(model)
        return _read_yaml(self._folder / model / "config.yaml")

    @contextlib.contextmanager
    def open(self, model: str, version: str) -> Iterator[Path]:
        """The file itself. Raises: NotFound."""
        file = self._known(model).get(version)
        if file is None:
            raise NotFound(f"model {model!r} has no version {version!r}.")
        yield file

    def _files(self, model: str) -> dict[str, Path]:
        if not _NAME.fullmatch(model):
            return {}
        home = self._folder / model
        return {name: home / name / "model.onnx" for name in _folders(home) if (home / name / "model.onnx").is_file()}

    def _known(self, model: str) -> dict[str, Path]:
        files = self._files(model)
        if not files:
            raise NotFound(f"there is no model {model!r}.")
        return files


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and _NAME.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ModelError(f"{folder} cannot be listed ({error.strerror}): check its permissions.") from error


def _mark(folder: Path) -> str:
    with os.scandir(folder) as entries:
        states = sorted((entry.name, entry.stat()) for entry in entries)
    return repr([(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states])


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "not text"
        raise UsageError(f"{path} cannot be read as YAML: {reason}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold options such as `sessions: 2`, not {type(content).__name__}.")
    return content
