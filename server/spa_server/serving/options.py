"""How one model is served: the fields of its `config.yaml`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from spa.errors import UsageError
from spa.runtime import Provider

__all__ = ["ModelOptions", "parse_options"]

_MOST_SESSIONS = 256
_MOST_ROWS = 65536
_MOST_WAITING = 1_000_000


@dataclass(frozen=True)
class ModelOptions:
    """How one model is served."""

    provider: Provider = "auto"
    """`cuda` insists on the GPU, `cpu` avoids it, `auto` takes it if it works."""
    sessions: int = 1
    """ONNX Runtime sessions of each version; each runs one batch at a time, and holds the weights once."""
    threads: int = 0
    """Threads inside one operator; 0 divides the cores among the sessions."""
    max_batch: int = 1
    """Most rows in a run of several requests; 1 runs each request alone. A request that has more rows runs alone."""
    queue_delay_ms: float = 0.0
    """How long a request waits for others to join it while a session is idle."""
    max_queue: int = 256
    """Most requests that wait; one more is refused."""
    run_seconds: float = 600.0
    """Longest run; one that takes longer is stopped, and its requests fail."""
    check_batch: bool = True
    """Before requests are joined: prove on made-up inputs that a row's answer does not depend on other rows."""
    versions: Literal["latest", "all"] | tuple[str, ...] = "latest"
    """Which versions are loaded, besides those with a weight."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Version -> its share of the requests that name no version; without weights the latest one answers them."""


def parse_options(given: Mapping[Any, Any], where: str) -> ModelOptions:
    """The options in `given`, defaults for the rest.

    Raises: UsageError naming `where` and the option that is unknown or out of range.
    """
    known = [option.name for option in fields(ModelOptions)]
    for name in given:
        if name not in known:
            raise UsageError(f"{where}: there is no option {name!r}; known are {', '.join(known)}.")
    values: dict[str, Any] = dict(given)
    provider = values.get("provider", "auto")
    if provider not in get_args(Provider):
        raise UsageError(f"{where}: provider must be {', '.join(get_args(Provider))}, not {provider!r}.")
    _whole(values, "sessions", 1, _MOST_SESSIONS, where)
    _whole(values, "threads", 0, 1024, where)
    _whole(values, "max_batch", 1, _MOST_ROWS, where)
    _whole(values, "max_queue", 1, _MOST_WAITING, where)
    _real(values, "queue_delay_ms", 0.0, 10_000.0, where)
    _real(values, "run_seconds", 0.01, 1e6, where)
    if not isinstance(values.get("check_batch", True), bool):
        raise UsageError(f"{where}: check_batch must be true or false, not {values['check_batch']!r}.")
    if "versions" in values:
        values["versions"] = _versions(values["versions"], where)
    if "weights" in values:
        values["weights"] = _weights(values["weights"], where)
    return ModelOptions(**values)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(values: Mapping[str, Any], name: str, least: int, most: int, where: str) -> None:
    value = values.get(name, least)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{where}: {name} must be a whole number from {least} to {most}, not {value!r}.")


def _real(values: Mapping[str, Any], name: str, least: float, most: float, where: str) -> None:
    value = values.get(name, least)
    if not _number(value) or not least <= value <= most:
        raise UsageError(f"{where}: {name} must be a number from {least:g} to {most:g}, not {value!r}.")


def _versions(value: object, where: str) -> Literal["latest", "all"] | tuple[str, ...]:
    if value == "latest" or value == "all":
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str | int) for name in value):
        return tuple(str(name) for name in value)
    raise UsageError(f"{where}: versions must be latest, all, or a list of versions, not {value!r}.")


def _weights(value: object, where: str) -> dict[str, float]:
    if (
        not isinstance(value, Mapping)
        or not all(isinstance(name, str | int) and _number(share) and share >= 0 for name, share in value.items())
        or (value and not any(value.values()))
    ):
        raise UsageError(
            f"{where}: weights must give versions numbers of 0 or more, one of them above 0, not {value!r}."
        )
    return {str(name): float(share) for name, share in value.items()}
