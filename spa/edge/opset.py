"""Stage `opset`: another version of the operators, mostly an older one, for runtimes that stop early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import checker, version_converter
from onnx.helper import find_min_ir_version_for  # noqa: TID251  (only its table of versions is read)

from spa.edge.base import quiet, read, write
from spa.edge.lowering import lowered
from spa.errors import UnsupportedModelError, UsageError
from spa.external import root_cause

__all__ = ["converted", "to_opset"]

OLDEST = 7
"""What the converter goes down to."""


def to_opset(source: Path, target: Path, *, version: int) -> dict[str, Any]:
    """Convert the operators of the default domain to another opset, mostly an older one.

    The IR version goes down with it, to that of the release the opset came with: a runtime of that time refuses newer
    ones. Functions are inlined first. onnx's checker, with type inference, must accept what comes out.

    Args:
        source: ONNX file.
        target: file to write.
        version: of the default domain.

    Raises:
        UsageError: a version that does not exist.
        UnsupportedModelError: an operator has no counterpart there.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= version <= newest:
        raise UsageError(f"version: opset {version} does not exist for this converter; choose {OLDEST} to {newest}")
    proto = read(source)
    before, ir_before = _opset(proto), proto.ir_version
    done = converted(proto, version, str(source))
    _lower_ir(done)
    try:
        checker.check_model(done, full_check=True)
    except Exception as error:  # it has several exceptions of its own, and inference raises more
        raise _refused(str(source), version, error) from error
    write(done, target)
    return {"opset": [before, version], "ir_version": [ir_before, done.ir_version]}


def converted(proto: onnx.ModelProto, version: int, label: str) -> onnx.ModelProto:
    """The same model in another opset; the IR version stays.

    Down by `spa.edge.lowering`, up by onnx's converter.

    Raises:
        UnsupportedModelError: an operator has no counterpart there.
    """
    if _opset(proto) == version:
        return proto
    if _opset(proto) > version:
        return lowered(proto, version, label)
    try:
        with quiet():
            done = version_converter.convert_version(proto, version)
    except Exception as error:  # C++ errors come as several types
        raise _refused(label, version, error) from error
    given = {info.name: info for info in (*proto.graph.input, *proto.graph.output)}
    for info in (*done.graph.input, *done.graph.output):
        if info.name in given:  # names of open axes are lost on the way
            info.CopyFrom(given[info.name])
    done.metadata_props.extend(p for p in proto.metadata_props if p.key not in {q.key for q in done.metadata_props})
    return done


def _refused(label: str, version: int, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(f"{label}: cannot be converted to opset {version} ({root_cause(error)})")


def _opset(proto: onnx.ModelProto) -> int:
    return int(next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")))


def _lower_ir(proto: onnx.ModelProto) -> None:
    """The IR version of the opset's release, if that is lower; 4 at least, where initializers need not be inputs."""
    least = find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    proto.ir_version = min(proto.ir_version, max(4, least))
