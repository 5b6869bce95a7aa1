"""What a driver is asked for, and what `--input` means. Read by the framework's own Python: no packages but numpy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spa.errors import UsageError

__all__ = ["BATCH", "DTYPES", "Exporter", "Input", "Request", "parse_input"]

Exporter = Literal["auto", "dynamo", "torchscript"]

BATCH = "batch"
"""Name of the open first axis."""
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Input:
    """One input of a model."""

    name: str
    """Its name in the ONNX file."""
    shape: tuple[int | str, ...]
    """A size, or the name of an open axis, for each axis."""
    dtype: str = "float32"
    """Numpy's name of its type."""


@dataclass(frozen=True)
class Request:
    """An export."""

    driver: str
    """Module of `spa.export.drivers`."""
    source: str
    """What it opens: a path, or `package.module:name`."""
    inputs: tuple[Input, ...] = ()
    """Inputs, in the source's order, where the source does not say them itself."""
    exporter: Exporter = "auto"
    """Which of torch's two exporters."""
    opset: int | None = None
    """ONNX opset; None for the driver's choice."""
    static_batch: bool = False
    """Keep the first axis as it is."""
    seed: int = 0
    """Of example inputs."""

    def to_json(self) -> dict[str, Any]:
        """For `of`."""
        return asdict(self)

    @staticmethod
    def of(body: Mapping[str, Any]) -> Request:
        """From what `to_json` gave."""
        inputs = tuple(Input(i["name"], tuple(i["shape"]), i["dtype"]) for i in body["inputs"])
        return Request(**{**body, "inputs": inputs})


def parse_input(text: str) -> Input:
    """`NAME=1x3x224x224`, `NAME=batch,3,224,224`, and a type after a colon.

    Raises:
        UsageError: the text is not of this form.
    """
    match = re.fullmatch(r"([^=\s]+)=([^:]*)(?::(\w+))?", text.strip())
    if match is None:
        raise UsageError(f"--input: cannot read {text!r}; {_FORM}")
    name, sizes, dtype = match[1], match[2].strip(), match[3] or "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--input {name}: unknown type {dtype!r}; types are {', '.join(DTYPES)}")
    return Input(name, _shape(name, sizes), dtype)


_FORM = "write NAME=1x3x224x224, NAME=batch,3,224,224 or NAME=batch,sequence:int64"


def _shape(name: str, sizes: str) -> tuple[int | str, ...]:
    shape: list[int | str] = []
    for part in re.split(r"," if "," in sizes or not sizes[:1].isdecimal() else "x", sizes) if sizes else ():
        size = part.strip()
        if size.isdecimal() and int(size) > 0:
            shape.append(int(size))
        elif size.isidentifier():
            shape.append(size)
        else:
            raise UsageError(f"--input {name}: cannot read the size {size!r}; {_FORM}")
    return tuple(shape)


def check_names(inputs: Sequence[Input]) -> None:
    """Raise UsageError if two inputs have one name."""
    names = [i.name for i in inputs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input {name}: was given twice; give each input once")
