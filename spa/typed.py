"""Values from JSON or YAML, read as an annotation says, and records (dataclasses) made of them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from spa.errors import UsageError

Record = TypeVar("Record")


def read_record(kind: type[Record], given: object, where: str) -> Record:
    """A dataclass of values from JSON or YAML; keys that are not given keep their defaults, nested ones are read alike.

    Args:
        kind: the dataclass.
        given: a mapping; `max-length` and `max_length` are the same key.
        where: how messages begin.

    Raises:
        UsageError: no mapping, an unknown key (the nearest one is suggested), a value of another type, a missing key.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: must be a mapping of names to values, not {given!r}")
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, _hints(kind)  # type: ignore[arg-type]  # a dataclass
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UsageError(f"{where}: unknown key {str(key)!r}{nearest(name, fields)}")
        if name in values:
            raise UsageError(f"{where}: key {str(key)!r} comes twice")
        values[name] = _value(value, hints[name], f"{where}: {name}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: key {name!r} is missing")
    return kind(**values)


def nearest(word: str, words: Mapping[str, Any]) -> str:
    """`; did you mean 'x'?`, or what there is."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; keys are {', '.join(words)}"


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(value: Any, kind: Any, where: str) -> Any:
    for member in members(kind):
        if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
            return read_record(typing.cast("type[Any]", member), value, where)
        if get_origin(member) is tuple and dataclasses.is_dataclass(get_args(member)[0]) and isinstance(value, list):
            return tuple(_value(item, get_args(member)[0], f"{where}[{k}]") for k, item in enumerate(value))
        fits, read = read_value(value, member)
        if fits:
            return read
    raise UsageError(f"{where} must be {described(kind)}, not {value!r}{yes_or_no(value, kind)}")


def members(kind: Any) -> list[Any]:
    """The alternatives of an annotation, plain ones first: a text is a text before it is a sequence."""
    if get_origin(kind) in (Union, types.UnionType):
        parts = [m for part in get_args(kind) for m in members(part)]
        return sorted(parts, key=_compound)
    return [kind]


def _compound(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is not None and origin is not Literal


def read_value(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a kind, and what it is there."""
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
        return isinstance(value, str), Path(value) if isinstance(value, str) and kind is Path else value
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(value, get_args(kind)[1])
    if origin is not None and issubclass(origin, Sequence):
        read = [_one_of(item, get_args(kind)[0]) for item in (value if isinstance(value, list | tuple) else [value])]
        items = [item for _, item in read]
        return all(good for good, _ in read), tuple(items) if origin is tuple else items
    return False, None


def _one_of(value: Any, kind: Any) -> tuple[bool, Any]:
    """As `read_value`, for a kind that may have alternatives."""
    return next((found for member in members(kind) if (found := read_value(value, member))[0]), (False, None))


def _number(value: Any) -> tuple[bool, Any]:
    """YAML 1.1 reads 1e-3 as a text."""
    try:
        return isinstance(value, str | int | float), float(value)
    except (TypeError, ValueError):
        return False, None


def _mapping(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, None
    items = {str(name): read_value(item, kind) for name, item in value.items()}
    return all(good for good, _ in items.values()), {name: item for name, (_, item) in items.items()}


def described(kind: Any) -> str:
    """What a value must be, in words."""
    words = dict.fromkeys(word for member in members(kind) if (word := _word(member)))
    return " or ".join(words) or "something else"


def yes_or_no(value: Any, kind: Any) -> str:
    """A hint where YAML made a truth value of a word."""
    if isinstance(value, bool) and not any(m is bool for m in members(kind)):
        return " (YAML reads yes, no, on and off as true and false: put the word in quotes)"
    return ""


def _word(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if dataclasses.is_dataclass(kind):
        return "a mapping of names to values"
    if origin is not None and not (kind in (Path, os.PathLike) or origin is os.PathLike):
        if issubclass(origin, Mapping):
            return f"a mapping of names to {_word(get_args(kind)[1])}"
        if issubclass(origin, Sequence):
            return f"a list of {_word(get_args(kind)[0])}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): ""}
    return plain.get(kind, "a path")
