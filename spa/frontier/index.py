"""A family of models on disk: what each costs, how good it is, and the plan that makes it.

    DIR/frontier.json      the index: what was asked, what was found
    DIR/plans/0.600.json   one plan per point, as of `spa prune --plan`
    DIR/frontier.html      a page about the family

The index is replaced as a whole after each point, so that a run that was killed goes on from the last one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spa.cost import Metric
from spa.errors import OutputError, PlanError
from spa.metrics import Drop

VERSION = 1
NAME = "frontier.json"
PAGE = "frontier.html"
PLANS = "plans"


@dataclass(frozen=True)
class Point:
    """One model of a family."""

    index: int
    """From 0, by ascending share."""
    share: float
    """What was asked of the cost that is minimised, as a share of the original's."""
    costs: Mapping[str, float]
    """Of the cut as planned: `macs`, `parameters`, `bytes`, and `latency` in milliseconds as the table has it."""
    drop: Drop
    """Of the metric, on held-out samples."""
    plan: str
    """File, relative to the folder."""
    draft: bool
    """Whether the weights were those of the closed form, where the method goes on from there."""
    front: bool = True
    """Whether no other point is as cheap and as good, and better in one of the two."""
    measured_ms: float | None = None
    """Latency of one run, measured; None where it was not."""

    def cost(self, metric: Metric) -> float:
        """What the model costs: latency as it was measured, where it was.

        Raises:
            KeyError: the family does not know that cost.
        """
        return self.measured_ms if metric == "latency" and self.measured_ms is not None else self.costs[metric]


@dataclass(frozen=True)
class Family:
    """Models between which the user may choose."""

    folder: Path
    model: str
    """File, or empty for a model that was given otherwise."""
    sha256: str
    """Of the model."""
    metric: str
    higher_is_better: bool
    minimised: str
    """`macs`, `params`, `size` or `latency`."""
    original: Mapping[str, float]
    """Costs of the dense model."""
    before: float
    """The dense model's metric."""
    method: str
    calibration: Mapping[str, Any]
    """`source`, `name`, `samples`, `sha256` (of all samples) and `held`, `held_sha256`, `held_samples`."""
    options: Mapping[str, Any]
    """Of the query, as `spa.prune` has them; those that are the default are left out."""
    request: str
    """Digest of everything that decides about the points."""
    shares: tuple[float, ...]
    """That were asked for."""
    points: tuple[Point, ...] = ()
    """By ascending cost."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Shares that cannot be reached, with the reason."""
    version: int = VERSION

    @property
    def complete(self) -> bool:
        """Whether every share was tried."""
        return {f"{s:g}" for s in self.shares} <= {f"{p.share:g}" for p in self.points} | set(self.skipped)

    @property
    def front(self) -> tuple[Point, ...]:
        """Points that no other beats, by ascending cost: the metric gets better along it."""
        return tuple(p for p in self.points if p.front)

    def to_json(self) -> dict[str, Any]:
        """As the index has it, and `spa frontier --json` prints it."""
        body = asdict(self)
        body["folder"] = str(self.folder)
        return {**body, "complete": self.complete}

    def write(self) -> None:
        """Replace the index.

        Raises:
            OutputError: the folder cannot be written.
        """
        body = self.to_json()
        del body["folder"]  # it may be moved
        write(self.folder / NAME, json.dumps(body, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file as a whole; its folder is made if it is missing.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); check the folder's permissions and free space"
        ) from error


def read(folder: Path) -> Family:
    """Read a family back.

    Raises:
        PlanError: the folder holds none, or its index is damaged or of another version.
    """
    path = folder / NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{folder}: holds no frontier; make one with `spa frontier MODEL -o {folder}`") from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read ({error}); make the frontier anew in an empty folder") from None
    if not isinstance(body, dict) or body.get("version") != VERSION:
        raise PlanError(f"{path}: is no frontier of version {VERSION}; make it anew in an empty folder")
    body.pop("complete", None)
    try:
        points = tuple(Point(**{**p, "drop": Drop(**p["drop"])}) for p in body.pop("points"))
        shares = tuple(float(s) for s in body.pop("shares"))
        return Family(folder=folder, shares=shares, points=points, **body)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: is damaged ({error}); make the frontier anew in an empty folder") from None
