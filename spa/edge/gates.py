"""Gates: what a stage must reach, in the user's words, and whether it did."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spa.budget.targets import parse_target
from spa.errors import UsageError

__all__ = ["GATES", "Check", "Gate", "nearest", "parse_gates", "passed"]

Sense = Literal["<=", ">="]


@dataclass(frozen=True)
class Kind:
    """What can be asked of a stage."""

    sense: Sense
    text: str
    """What is compared, for the documentation and for messages."""


GATES: Mapping[str, Kind] = {
    "max_error": Kind("<=", "largest difference of an output, relative to the largest magnitude in that output"),
    "error": Kind("<=", "squared difference of the outputs relative to their variance over the samples"),
    "agreement": Kind(">=", "share of decisions (largest score) that are the same"),
    "accuracy": Kind(">=", "share of labels that are met"),
    "accuracy_drop": Kind("<=", "accuracy before the stage less accuracy after it"),
    "metric": Kind(">=", "value of the user's own metric"),
    "metric_drop": Kind("<=", "the user's own metric before the stage less that after it"),
    "size": Kind("<=", "bytes of the file with its external data: 2MB, or a share of the stage's input: 30%"),
    "latency": Kind("<=", "median milliseconds of one run (stage bench)"),
    "speedup": Kind(">=", "times as fast as the recipe's model (stage bench)"),
}
_FORM = re.compile(r"\s*([a-z_-]+)\s*(<=|>=|=)\s*(\S.*?)\s*")
_SHARES = {"agreement", "accuracy"}


@dataclass(frozen=True)
class Gate:
    """One condition."""

    name: str
    """Key of `GATES`."""
    limit: float
    """In the units of the gate; of `size` a share if `relative`."""
    text: str
    """As the user wrote it, normalised: `agreement >= 0.98`."""
    relative: bool = False
    """Whether `limit` is a share of the input's size."""

    def bound(self, input_bytes: int) -> float:
        """The limit itself, for a stage whose input has so many bytes."""
        return self.limit * input_bytes if self.relative else self.limit


@dataclass(frozen=True)
class Check:
    """One condition and what was found."""

    gate: str
    """As the user wrote it."""
    value: float
    """What was measured."""
    limit: float
    passed: bool


def passed(gate: Gate, value: float, input_bytes: int) -> Check:
    """Compare; what is not a number has not passed."""
    limit = gate.bound(input_bytes)
    good = value <= limit if GATES[gate.name].sense == "<=" else value >= limit
    return Check(gate.text, value, limit, good and not math.isnan(value))


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no word is near."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_gates(given: Mapping[str, Any] | Sequence[str] | str | None, where: str = "--gate") -> tuple[Gate, ...]:
    """Gates from `name: limit`, or from texts such as `agreement >= 0.98`, `size=2MB`.

    Args:
        given: a mapping, a text or several.
        where: how messages begin.

    Raises:
        UsageError: a gate is unknown, has the wrong sense, or a limit that cannot be read.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        pairs = [(str(name), "=", limit) for name, limit in given.items()]
    else:
        pairs = [_split(text, where) for text in ([given] if isinstance(given, str) else given)]
    return tuple(_gate(name.replace("-", "_"), sense, limit, where) for name, sense, limit in pairs)


def _split(text: object, where: str) -> tuple[str, str, Any]:
    match = _FORM.fullmatch(str(text))
    if match is None:
        raise UsageError(f"{where}: cannot read {str(text)!r}; write for example agreement=0.98 or size=2MB")
    return match[1], match[2], match[3]


def _gate(name: str, sense: str, limit: Any, where: str) -> Gate:
    if name not in GATES:
        raise UsageError(f"{where}: unknown gate {name!r}{nearest(name, list(GATES)) or '; gates are ' + _names()}")
    kind = GATES[name]
    if sense not in ("=", kind.sense):
        raise UsageError(f"{where}: {name} is {_sense(kind)}: write {name} {kind.sense} {limit}")
    shown = f"{name} {kind.sense} {limit}"
    if name == "size":
        try:
            target = parse_target(f"size={limit}")
        except UsageError as error:
            raise UsageError(f"{where}: cannot read size {str(limit)!r}; write for example 2MB or 30%") from error
        return Gate(name, target.limit, shown, target.relative)
    text = str(limit).strip()
    number = text.removesuffix("ms").strip() if name == "latency" else text.removesuffix("%").strip()
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"{where}: {name} is {str(limit)!r}, which is not a number") from error
    if not math.isfinite(value) or isinstance(limit, bool):
        raise UsageError(f"{where}: {name} is {str(limit)!r}, which is not a number")
    if name in _SHARES and not 0 <= value <= 1:
        raise UsageError(f"{where}: {name} is a share: {str(limit)!r} must be between 0 and 1, or a percentage")
    return Gate(name, value, shown)


def _sense(kind: Kind) -> str:
    return "an upper limit" if kind.sense == "<=" else "a lower limit"


def _names() -> str:
    return ", ".join(GATES)
