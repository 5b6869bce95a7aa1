"""Names of Python for what an ONNX graph calls by any text, and numbers as Python writes them."""

from __future__ import annotations

import builtins
import keyword
import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_BUSY = frozenset(
    [
        *dir(nn.Module()), *dir(builtins), *keyword.kwlist, *keyword.softkwlist, "torch", "nn", "F", "Tensor", "math",
        "functools", "itertools", "np", "Path", "Net", "load", "save", "device",
    ]
)  # fmt: skip
_ANONYMOUS = re.compile(r"(onnx::)?[A-Za-z]*_?\d+|val_\d+|_v_\d+")
"""Names that exporters count instead of giving: `onnx::MatMul_1234`, `val_12`, `345`."""
_TORCH = {id(f): f"{where}.{name}" for module, where in ((torch, "torch"), (nn.functional, "F"))
          for name, f in vars(module).items() if callable(f) and not name.startswith("_") and not isinstance(f, type)
         }  # fmt: skip


def snake(operator: str) -> str:
    """`ReduceMean` as `reduce_mean`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", operator).lower()


def identifier(text: str) -> str:
    """`/layer1/layer1.0/conv1` as `layer1_layer1_0_conv1`; empty if nothing is left."""
    found = re.sub(r"_+", "_", re.sub(r"\W", "_", text, flags=re.ASCII)).strip("_")
    return f"_{found}" if found[:1].isdigit() else found


def given(text: str | None) -> str:
    """A name that somebody has chosen, else nothing."""
    return "" if not text or _ANONYMOUS.fullmatch(text) else text


class Names:
    """Identifiers that are used once."""

    def __init__(self, *busy: str) -> None:
        self._taken = set(_BUSY) | set(busy)

    def new(self, wanted: str) -> str:
        """`wanted`, or with a number behind it."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def torch_name(function: Any) -> str | None:
    """`torch.relu` for that function, None for what torch does not offer by a name."""
    return _TORCH.get(id(function))


class NoLiteral(Exception):
    """A value that cannot be written down."""


def number(x: float | int | bool) -> str:
    """A number; floats as short as their float32 allows, negative ones in brackets."""
    if isinstance(x, bool | int):
        text = repr(x)
    elif math.isfinite(x):
        short = repr(float(str(np.float32(x))))
        text = short if abs(float(short) - x) <= 1e-7 * abs(x) else repr(x)
    else:
        text = "math.nan" if math.isnan(x) else "math.inf" if x > 0 else "-math.inf"
    return f"({text})" if text.startswith("-") else text


def exact(x: Any) -> str:
    """A number of a tensor, to the last bit of its type."""
    if isinstance(x, float) and not math.isfinite(x):
        return number(x).strip("()")
    return repr(x)


def literal(value: Any) -> str:
    """Python for a value that kernels keep: numbers, texts, types, and collections of them. Raises: NoLiteral."""
    if value is None or type(value) in (bool, int, str):  # no enumerations
        return repr(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    raise NoLiteral(type(value).__name__)


def tensor_text(x: Tensor, device: str = "") -> str:
    """`torch.tensor(...)` for a small tensor; `device` is an expression."""
    kind = {torch.float32: "", torch.int64: "", torch.bool: ""}.get(x.dtype, f", dtype={x.dtype}")
    if not x.numel() or not x.dim():
        kind = f", dtype={x.dtype}" if not x.numel() else kind
    body = _nested(x.tolist())
    return f"torch.tensor({body}{kind}{f', device={device}' if device else ''})"


def _nested(value: Any) -> str:
    return f"[{', '.join(map(_nested, value))}]" if isinstance(value, list) else exact(value)
