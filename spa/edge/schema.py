"""Options of a stage, read off the function that runs it: names, types, choices; one sentence where one is wrong."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from spa.edge.gates import nearest
from spa.errors import UsageError
from spa.typed import described, members, read_value, yes_or_no

__all__ = ["Option", "fill", "options_of"]

_ALIASES = {"Source": str | os.PathLike[str]}
"""What a recipe may give where Python may give a model in memory, too."""
_WORDS = ("none", "noise", "bn")
"""What `calibration` and `data` may be besides a path."""


@dataclass(frozen=True)
class Option:
    """One key of a stage."""

    name: str
    kind: Any
    """Its annotation."""
    required: bool
    path: bool
    """A path, relative to the recipe."""


def options_of(function: Callable[..., Any], without: Sequence[str]) -> dict[str, Option]:
    """The keyword parameters of a function, by name, except for some."""
    out = {}
    for name, parameter in inspect.signature(function, locals=_ALIASES, eval_str=True).parameters.items():
        if name in without or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind = parameter.annotation
        named = any(member in (Path, os.PathLike) or get_origin(member) is os.PathLike for member in members(kind))
        out[name] = Option(name, kind, parameter.default is inspect.Parameter.empty, named)
    return out


def fill(given: Mapping[str, Any], options: Mapping[str, Option], where: str, folder: Path) -> dict[str, Any]:
    """Values of the types that the function takes, paths made relative to `folder`.

    Args:
        given: as the recipe has them; `max-length` and `max_length` are the same.
        options: what there is.
        where: how messages begin.
        folder: the recipe's.

    Raises:
        UsageError: an unknown key (the nearest one is suggested), a value of another type, or a missing key.
    """
    out: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in options:
            hint = nearest(name, list(options)) or f"; keys are {', '.join(options)}"
            raise UsageError(f"{where}: unknown key {str(key)!r}{hint}")
        if name in out:
            raise UsageError(f"{where}: key {str(key)!r} comes twice")
        out[name] = _value(value, options[name], where, folder)
    missing = [o.name for o in options.values() if o.required and o.name not in out]
    if missing:
        raise UsageError(f"{where}: key {missing[0]!r} is missing")
    return out


def _value(value: Any, option: Option, where: str, folder: Path) -> Any:
    for member in members(option.kind):
        fits, read = read_value(value, member)
        if fits:
            return _placed(read, option, where, folder)
    hint = yes_or_no(value, option.kind)
    raise UsageError(f"{where}: {option.name} must be {described(option.kind)}, not {value!r}{hint}")


def _placed(value: Any, option: Option, where: str, folder: Path) -> Any:
    """Paths count from the recipe's folder, and must exist where they are read."""
    if not isinstance(value, str | os.PathLike):
        return value
    if option.name == "preprocess":  # a name, key=value pairs, or a file
        return str(folder / value) if (folder / value).is_file() else value
    if not option.path and option.name not in ("calibration", "data", "evaluation"):
        return value
    if not option.path and value in _WORDS:
        return value
    path = folder / value
    if option.name not in ("cache", "checkpoint", "output", "work", "result") and not path.exists():
        raise UsageError(f"{where}: {option.name}: {path} does not exist")
    return path
