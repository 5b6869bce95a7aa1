"""Stage `ort`: ONNX Runtime's own format, for its mobile and minimal builds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from spa.edge.base import quiet
from spa.errors import UnsupportedModelError, UsageError
from spa.external import root_cause
from spa.graph import load
from spa.store import save

__all__ = ["to_ort"]


def to_ort(
    source: Path,
    target: Path,
    *,
    style: Literal["fixed", "runtime"] = "fixed",
    platform: Literal["any", "arm", "amd64"] = "any",
) -> dict[str, Any]:
    """Optimise a model with ONNX Runtime and write it as `.ort`.

    Args:
        source: ONNX file.
        target: file to write, named `*.ort`; the list of operators that a minimal build needs goes beside it, as
            `*.required_operators.config`.
        style: `fixed` applies all optimisations now; `runtime` leaves some to the device, which NNAPI and CoreML want.
        platform: `arm` and `amd64` allow what is fast there only; `any` runs everywhere.

    Raises:
        UsageError: the name does not end in `.ort`.
        UnsupportedModelError: ONNX Runtime cannot convert it.
    """
    if target.suffix.lower() != ".ort":
        raise UsageError(f"{target}: name it *.ort, by which ONNX Runtime knows its own format")
    from onnxruntime.tools import convert_onnx_models_to_ort as tool

    styles = {"fixed": tool.OptimizationStyle.Fixed, "runtime": tool.OptimizationStyle.Runtime}
    with tempfile.TemporaryDirectory(prefix=".spa-ort-", dir=target.parent) as name:
        folder = Path(name)
        model = folder / f"{target.stem}.onnx"
        save(load(source).model, model, external=False)
        try:
            with quiet():
                tool.convert_onnx_models_to_ort(
                    model,
                    optimization_styles=[styles[style]],
                    target_platform=None if platform == "any" else platform,
                )
        except Exception as error:  # ONNX Runtime's exceptions are private and share no base
            raise UnsupportedModelError(f"{source}: cannot be converted to .ort ({root_cause(error)})") from error
        made = next(iter(folder.glob("*.ort")))
        operators = next(iter(folder.glob("*.config")))
        os.replace(operators, operators_of(target))
        os.replace(made, target)
    return {"style": style, "platform": platform, "operators": operators_of(target).name}


def operators_of(target: Path) -> Path:
    """The list of operators beside a `.ort` file."""
    return target.with_name(f"{target.stem}.required_operators.config")
