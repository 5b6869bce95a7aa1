"""Options of a stage, read off the function that runs it: names, types, choices; one sentence where one is wrong."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from spa.edge.gates import nearest
from spa.errors import UsageError

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
        named = any(member in (Path, os.PathLike) or get_origin(member) is os.PathLike for member in _members(kind))
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
    for member in _members(option.kind):
        fits, read = _read(value, member)
        if fits:
            return _placed(read, option, where, folder)
    hint = ""
    if isinstance(value, bool) and not any(m is bool for m in _members(option.kind)):
        hint = " (YAML reads yes, no, on and off as true and false: put the word in quotes)"
    raise UsageError(f"{where}: {option.name} must be {_described(option.kind)}, not {value!r}{hint}")


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


def _members(kind: Any) -> list[Any]:
    """The alternatives of an annotation, plain ones first: a text is a text before it is a sequence."""
    if get_origin(kind) in (Union, types.UnionType):
        parts = [m for part in get_args(kind) for m in _members(part)]
        return sorted(parts, key=_compound)
    return [kind]


def _compound(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is not None and origin is not Literal


def _read(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value of YAML is of a kind, and what it is there."""
    origin = get_origin(kind)
    if kind is Any:
        return True, value
    if origin is Literal:
        return (value in get_args(kind) and not isinstance(value, bool)), value
    if kind is bool:
        return isinstance(value, bool), value
    if value is None:
        return kind is types.NoneType, None
    if isinstance(value, bool):
        return False, None
    if kind is int:
        return isinstance(value, int), value
    if kind is float:
        return _number(value)
    if kind is str:
        return isinstance(value, str | int | float), str(value)
    if kind in (Path, os.PathLike) or origin is os.PathLike:
        return isinstance(value, str), value
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(value, get_args(kind)[1])
    if origin is not None and issubclass(origin, Sequence):
        items = [_read(item, get_args(kind)[0]) for item in (value if isinstance(value, list) else [value])]
        return all(good for good, _ in items), [item for _, item in items]
    return False, None


def _number(value: Any) -> tuple[bool, Any]:
    """YAML 1.1 reads 1e-3 as a text."""
    try:
        return isinstance(value, str | int | float), float(value)
    except (TypeError, ValueError):
        return False, None


def _mapping(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, None
    items = {str(name): _read(item, kind) for name, item in value.items()}
    return all(good for good, _ in items.values()), {name: item for name, (_, item) in items.items()}


def _described(kind: Any) -> str:
    words = dict.fromkeys(word for member in _members(kind) if (word := _word(member)))
    return " or ".join(words) or "something else"


def _word(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if origin is not None and not (kind in (Path, os.PathLike) or origin is os.PathLike):
        if issubclass(origin, Mapping):
            return f"a mapping of names to {_word(get_args(kind)[1])}"
        if issubclass(origin, Sequence):
            return f"a list of {_word(get_args(kind)[0])}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): ""}
    return plain.get(kind, "a path")
