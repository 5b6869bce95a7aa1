"""A table of operators: how long each took, at which sizes, on which device; and what models are made of them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import OutputError, UsageError
from spa.latency.surface import Surface

FORMAT = 1


@dataclass(frozen=True)
class Key:
    """Where and how a table was measured: times of different keys are never mixed."""

    device: str
    """The processor's name."""
    runtime: str
    provider: str
    threads: int
    """As asked for; 0: ONNX Runtime's choice."""
    cores: int
    batch: int
    dtype: str
    """Of the model's first input."""

    def differs(self, other: Key) -> str:
        """The first difference in words, empty if there is none."""
        for name, mine in asdict(self).items():
            if mine != getattr(other, name):
                return f"{name} {mine!r} instead of {getattr(other, name)!r}"
        return ""


@dataclass(frozen=True)
class Operator:
    """Samples of one operator: everything about it is fixed but some sizes."""

    sizes: tuple[tuple[int, ...], ...]
    """Per sample: the sizes that vary."""
    microseconds: tuple[float, ...]
    """Median over all operators that had these sizes."""
    counts: tuple[int, ...]
    """How many there were."""

    @cached_property
    def surface(self) -> Surface:
        """Microseconds as a function of the sizes that vary."""
        return Surface(np.array(self.sizes, dtype=np.int64).reshape(len(self.sizes), -1), np.array(self.microseconds))

    def joined(self, other: Operator) -> Operator:
        """With the samples of another measurement: where sizes are equal, the mean by count."""
        found = {s: (us, n) for s, us, n in zip(self.sizes, self.microseconds, self.counts, strict=True)}
        for s, us, n in zip(other.sizes, other.microseconds, other.counts, strict=True):
            old, m = found.get(s, (us, 0))
            found[s] = ((old * m + us * n) / (m + n), m + n)
        ordered = sorted(found.items())
        return Operator(tuple(s for s, _ in ordered), tuple(v[0] for _, v in ordered), tuple(v[1] for _, v in ordered))


@dataclass(frozen=True)
class Slot:
    """An operator's place in a model, or several places that always have the same sizes."""

    operator: str
    """Signature, as in `Table.operators`."""
    sizes: tuple[tuple[int, ...], ...]
    """Per size that varies: its values in all configurations."""
    count: int


@dataclass(frozen=True)
class Profile:
    """What one model is made of."""

    name: str
    configurations: tuple[Mapping[str, int], ...]
    """Units kept per group that lost any; the first is the dense model."""
    milliseconds: tuple[float, ...]
    """Of the whole model without profiler, per configuration."""
    slots: tuple[Slot, ...]
    alignments: Mapping[int, tuple[float, float]]
    """Alignment -> (milliseconds, MACs) of a model whose widths have it, and no better one."""


@dataclass(frozen=True)
class Table:
    """All that was measured under one key."""

    key: Key
    operators: Mapping[str, Operator] = field(default_factory=dict)
    models: Mapping[str, Profile] = field(default_factory=dict)
    """sha256 of the model file -> profile."""

    def joined(self, other: Table) -> Table:
        """With another measurement under the same key.

        Raises:
            UsageError: the keys differ.
        """
        if self.key != other.key:
            raise UsageError(
                f"the latency table was measured with {self.key.differs(other.key)}: write to another file"
            )
        operators = dict(self.operators)
        for name, operator in other.operators.items():
            operators[name] = operators[name].joined(operator) if name in operators else operator
        return replace(self, operators=operators, models={**self.models, **other.models})

    def to_json(self) -> str:
        """As it is stored."""
        body = {"format": FORMAT, "key": asdict(self.key)}
        body["operators"] = {name: asdict(o) for name, o in sorted(self.operators.items())}
        body["models"] = {sha: asdict(m) for sha, m in sorted(self.models.items())}
        return json.dumps(body, separators=(",", ":")) + "\n"

    def write(self, path: Path) -> None:
        """Write the table, all or nothing.

        Raises:
            OutputError: it cannot be written.
        """
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror}); check the folder's permissions"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def read(path: Path) -> Table:
    """Read a table.

    Raises:
        UsageError: the file is missing or is not a table.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.get("format") != FORMAT or "operators" not in body:
            raise UsageError(f"{path} is not a latency table of format {FORMAT}; make it with `spa profile`")
        operators = {
            str(name): Operator(_rows(o["sizes"]), tuple(map(float, o["microseconds"])), tuple(map(int, o["counts"])))
            for name, o in body["operators"].items()
        }
        return Table(Key(**body["key"]), operators, {sha: _profile(m) for sha, m in body["models"].items()})
    except OSError as error:
        raise UsageError(f"{path}: the latency table cannot be read ({error.strerror}); check the path") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a valid latency table ({type(error).__name__}: {error}); make it anew"
        ) from None


def _rows(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in rows)


def _profile(body: Mapping[str, Any]) -> Profile:
    return Profile(
        str(body["name"]),
        tuple({str(g): int(w) for g, w in c.items()} for c in body["configurations"]),
        tuple(map(float, body["milliseconds"])),
        tuple(Slot(str(s["operator"]), _rows(s["sizes"]), int(s["count"])) for s in body["slots"]),
        {int(k): (float(v[0]), float(v[1])) for k, v in body["alignments"].items()},
    )
