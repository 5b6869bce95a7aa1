"""What a page about one run shows, as plain data: it survives JSON, and the page is drawn from it alone."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from spa.budget.widths import Optimality
from spa.errors import UsageError
from spa.latency.query import LatencyReport
from spa.pipeline import Change
from spa.plain import plain
from spa.study import Fit
from spa.verify import Verification

VERSION = 1


@dataclass(frozen=True)
class Width:
    """How many units a group had and has."""

    name: str
    kind: str
    before: int
    after: int
    exact: bool
    parameters: int
    """Weights that touch the group, before."""
    note: str
    """Why it was left alone; empty if it was not, or for no other reason than that it matters."""


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to prune one group alone."""

    name: str
    kind: str
    units: int
    removed: tuple[int, ...]
    """How many units leave, ascending."""
    errors: tuple[float, ...]
    """Error of the model's outputs then, relative to their variance."""
    chosen: int
    """Units that did leave, of this group, in the end."""


@dataclass(frozen=True)
class FrontierPoint:
    """One model of a family."""

    label: str
    cost: float
    """In the unit that `Frontier` names; less is better."""
    quality: float
    chosen: bool = False
    """Whether it is the model this page is about."""


@dataclass(frozen=True)
class Frontier:
    """Models between which the user may choose."""

    cost: str
    """What is on the horizontal axis, such as `MACs (M)` or `latency (ms)`."""
    quality: str
    """What is on the vertical axis, such as `top-1 accuracy (%)`."""
    higher_is_better: bool
    """Of the quality."""
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True)
class Timing:
    """Wall time of one run of a model, in milliseconds."""

    median_ms: float
    p10_ms: float | None
    """One run in ten is faster; None if that was not kept."""
    p90_ms: float | None
    """Nine runs in ten are faster."""


@dataclass(frozen=True)
class OperatorTime:
    """Time spent in one type of operator, or in one node, during one run; None where a model has none of it."""

    name: str
    operator: str
    before_ms: float | None
    after_ms: float | None


@dataclass(frozen=True)
class Speed:
    """Measured latency, dense and pruned."""

    before: Timing
    after: Timing
    speedup: float
    """Median over the rounds of (time before) / (time after)."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end of it."""
    confidence: float
    verdict: Literal["faster", "slower", "no measurable difference"]
    provider: str
    batch: int
    threads: int
    runtime: str
    device: str
    rounds: int | None
    """That were timed; None if that was not kept."""
    operators: tuple[OperatorTime, ...] = ()
    """Per type of operator."""
    nodes: tuple[OperatorTime, ...] = ()
    """Per node as the runtime executes it, slowest first."""


@dataclass(frozen=True)
class Cause:
    """One reason why axes of weights cannot be pruned."""

    reason: str
    operator: str
    axes: int
    """Axes of weights that are frozen for it."""
    parameters: int
    """Of these weights, the part along frozen positions."""
    examples: tuple[str, ...]
    """Some of the weights, those with most parameters first."""


@dataclass(frozen=True)
class Page:
    """Everything a page about one run shows."""

    model: str
    output: str
    macs: Change
    parameters: Change
    bytes: Change
    groups: int
    """Groups that lost units."""
    removed_units: int
    method: str
    align: int | str
    widths: tuple[Width, ...]
    """Every group, in the order of the network."""
    causes: tuple[Cause, ...]
    """Of frozen axes, most parameters first."""
    prunable_parameters: int
    verify: Verification | None
    fit: Fit | None
    optimality: Optimality | None
    sensitivity: tuple[Sensitivity, ...] = ()
    frontier: Frontier | None = None
    speed: Speed | None = None
    target: LatencyReport | None = None
    """How a target on latency was met; None if there was none."""
    unmeasured: str = ""
    """Why there is no `speed`."""
    command: str = ""
    """That made the result, quoted for a POSIX shell."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the plan."""
    versions: Mapping[str, str] = field(default_factory=dict)
    sha256_before: str = ""
    sha256_after: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """As plain dicts, lists, strings and numbers; NaN and infinities become None."""
        body: dict[str, Any] = plain(dataclasses.asdict(self))
        return body

    @staticmethod
    def from_json(body: Any, name: str = "the report") -> Page:
        """Read it back.

        Raises:
            UsageError: `body` is not what `to_json` gives; the message says where, in `name`.
        """
        if not isinstance(body, Mapping) or body.get("version") != VERSION:
            raise UsageError(f"{name} is not the data of a report of version {VERSION}; make it anew")
        page: Page = _read(Page, body, name)
        return page


def _read(kind: Any, body: Any, where: str) -> Any:
    """`body` as an instance of the type `kind`."""
    arguments = get_args(kind)
    origin = get_origin(kind)
    if kind is Any:
        return body
    if origin in (typing.Union, types.UnionType):
        return _read_one_of(arguments, body, where)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, body, where)
    if origin is Literal and body in arguments:
        return body
    if origin is tuple and isinstance(body, list):
        return tuple(_read(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(body))
    if origin in (Mapping, dict) and isinstance(body, Mapping):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in body.items()}
    if kind is float and (body is None or (isinstance(body, (int, float)) and not isinstance(body, bool))):
        return math.nan if body is None else float(body)
    if isinstance(kind, type) and type(body) is kind:
        return body
    raise UsageError(f"{where}: {type(body).__name__} is not what a report has there; make it anew")


def _read_one_of(kinds: Sequence[Any], body: Any, where: str) -> Any:
    if body is None and types.NoneType in kinds:
        return None
    problem = UsageError(f"{where}: not what a report has there; make it anew")
    for kind in kinds:
        try:
            return _read(kind, body, where)
        except UsageError as error:
            problem = error
    raise problem


def _read_fields(kind: Any, body: Any, where: str) -> Any:
    if not isinstance(body, Mapping):
        raise UsageError(f"{where}: {type(body).__name__} is not what a report has there; make it anew")
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in body:
            values[f.name] = _read(hints[f.name], body[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: {f.name} is missing; make it anew")
    return kind(**values)
