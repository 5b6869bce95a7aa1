"""What was implanted, in the terms of the input file: `spa apply` and `spa verify` take it as they take a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spa.errors import PlanError
from spa.plan import Plan, Removal

_VERSION = 1
_KEY = "implant_version"
"""No plan has it, and no record has a plan's `version`: neither is taken for the other."""


@dataclass(frozen=True)
class Place:
    """Channels of one convolution that became 1 x 1."""

    output: str
    """Name of the convolution's output."""
    channels: tuple[int, ...]
    """In ascending order."""


@dataclass(frozen=True)
class Record:
    """Which channels became implants, which slices left, and how that was decided."""

    sha256: str
    """Of the model file it belongs to."""
    implants: tuple[Place, ...]
    removed: tuple[Removal, ...] = ()
    """As in a plan."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    producer: str = ""

    @property
    def plan(self) -> Plan:
        """The removals alone."""
        return Plan(self.sha256, self.removed, (), self.settings, self.producer)

    def to_json(self) -> str:
        """The record as JSON text, stable for equal records."""
        body = asdict(self)
        body[_KEY], body["model"] = _VERSION, {"sha256": body.pop("sha256")}
        keys = (_KEY, "producer", "model", "settings", "implants", "removed")
        return json.dumps({k: body[k] for k in keys}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "record") -> Record:
        """Read a record back. Raises: PlanError if the text is none; the message says what is wrong in `name`."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{name} is not JSON ({error}); {_EXPECTED}") from None
        if not isinstance(body, dict) or not isinstance(body.get(_KEY), int):
            raise PlanError(f"{name} is no record of implants; {_EXPECTED}")
        if body[_KEY] != _VERSION:
            raise PlanError(f"{name} has version {body[_KEY]}, expected {_VERSION}; make it anew")
        plan = Plan.from_json(json.dumps({**body, "version": 1}), name)
        try:
            places = tuple(
                Place(str(p["output"]), tuple(sorted({int(c) for c in p["channels"]}))) for p in body["implants"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{name} is not valid ({type(error).__name__}: {error}); {_EXPECTED}") from None
        return Record(plan.sha256, places, plan.removed, plan.settings, plan.producer)


_EXPECTED = "expected a file written by `spa implant --record`"


def read(path: str | os.PathLike[str]) -> Record:
    """Read a record file. Raises: PlanError if it is missing, unreadable or no record."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read {path}: {error}") from None
    return Record.from_json(text, str(path))


def is_record(path: Path) -> bool:
    """Whether a file is a record of implants; one that cannot be read is none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and _KEY in body
