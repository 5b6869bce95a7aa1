"""The plan: the contract between choosing and cutting.

A plan names, in the terms of the *input* file, which slices of which initializers leave. `spa apply` needs nothing
else, and an outside checker that zeroes exactly these slices in the original model gets the pruned model's outputs
(exact scope). Tensor-valued `Constant` nodes count as initializers under the name of their output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spa.errors import PlanError

VERSION = 1


@dataclass(frozen=True)
class Consumer:
    """One use of an initializer."""

    output: str
    """Name of the first output of the consuming node."""
    input: int
    """Input slot of that node."""


@dataclass(frozen=True)
class Removal:
    """Slices of one initializer along one axis."""

    initializer: str
    consumers: tuple[Consumer, ...] | None
    """The uses that are meant, None for all."""
    axis: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class GroupRecord:
    """What happened to one group; for people, not needed to apply the plan."""

    name: str
    kind: str
    units: int
    removed: tuple[int, ...]
    exact: bool


@dataclass(frozen=True)
class Plan:
    """Which slices leave, and how that was decided."""

    sha256: str
    """Of the model file the plan belongs to."""
    removed: tuple[Removal, ...]
    groups: tuple[GroupRecord, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Targets, criterion, scope, seed ...: how the plan came about."""
    producer: str = ""
    version: int = VERSION

    @property
    def compensated(self) -> bool:
        """Whether weights were changed after the cut, as the settings have it."""
        changes = (self.settings.get(key, "none") for key in ("compensate", "recalibrate"))
        return self.settings.get("calibration") is not None and any(change != "none" for change in changes)

    def to_json(self) -> str:
        """The plan as JSON text, stable for equal plans."""
        body = asdict(self)
        body["model"] = {"sha256": body.pop("sha256")}
        keys = ("version", "producer", "model", "settings", "groups", "removed")
        return json.dumps({k: body[k] for k in keys}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "plan") -> Plan:
        """Read a plan back.

        Raises:
            PlanError: the text is not a plan of this version; the message says what is wrong in `name`.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{name} is not JSON ({error}); expected a plan written by `spa prune --plan`") from None
        if not isinstance(body, dict) or not isinstance(body.get("version"), int):
            raise PlanError(f"{name} is not a plan: it has no version; expected a plan written by `spa prune --plan`")
        if body["version"] != VERSION:
            raise PlanError(f"{name} has plan version {body['version']}, expected {VERSION}; make it anew")
        try:
            return Plan(
                str(body["model"]["sha256"]),
                tuple(_removal(r) for r in body["removed"]),
                tuple(_group(g) for g in body.get("groups", ())),
                dict(body.get("settings", {})),
                str(body.get("producer", "")),
                body["version"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{name} is not a valid plan ({type(error).__name__}: {error}); make it anew") from None


def _removal(body: Mapping[str, Any]) -> Removal:
    consumers = body["consumers"]
    return Removal(
        str(body["initializer"]),
        None if consumers is None else tuple(Consumer(str(c["output"]), int(c["input"])) for c in consumers),
        int(body["axis"]),
        tuple(int(i) for i in body["indices"]),
    )


def _group(body: Mapping[str, Any]) -> GroupRecord:
    removed = tuple(int(i) for i in body["removed"])
    return GroupRecord(str(body["name"]), str(body["kind"]), int(body["units"]), removed, bool(body["exact"]))


def read(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: the file is missing, unreadable or not a plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from None
    return Plan.from_json(text, str(path))
