"""Stage `float16`: weights and arithmetic in half precision, by ONNX Runtime's converter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from spa.edge.base import quiet, read, write
from spa.edge.names import matching, name_nodes
from spa.errors import UnsupportedModelError
from spa.external import root_cause

__all__ = ["to_float16"]

_RECURRENT = ("GRU", "LSTM", "RNN")
"""ONNX Runtime 1.31 has no float16 kernels for them on the CPU, and ends the process when it optimises around one."""
_SCALES_IN_HALF = 19
"""Opset from which QuantizeLinear and DequantizeLinear take scales in float16."""


def to_float16(source: Path, target: Path, *, keep: Sequence[str] = (), half_io: bool = False) -> dict[str, Any]:
    """Convert a model's float32 to float16.

    Operators that float16 does not suit (Range, CumSum, TopK, NonMaxSuppression ...: the converter's own list) stay in
    float32 between casts. Weights beyond the range of float16 are clipped to it.

    Args:
        source: ONNX file.
        target: file to write.
        keep: shell patterns of names or types of nodes that stay in float32.
        half_io: whether inputs and outputs become float16, too.

    Raises:
        UsageError: a pattern matches no node.
        UnsupportedModelError: the converter fails.
    """
    proto = read(source)
    name_nodes(proto)
    kept = matching(proto, keep, "keep")
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *_RECURRENT]
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _SCALES_IN_HALF:
        blocked += ["QuantizeLinear", "DequantizeLinear"]
    try:
        with quiet():
            done = float16.convert_float_to_float16(
                proto, keep_io_types=not half_io, op_block_list=blocked, node_block_list=kept, disable_shape_infer=True
            )
    except Exception as error:  # the converter raises what it likes
        raise UnsupportedModelError(f"{source}: cannot be converted to float16 ({root_cause(error)})") from error
    _merge_casts(done.graph)
    write(done, target)
    return {"kept": kept, "half_io": half_io}


def _merge_casts(graph: onnx.GraphProto) -> None:
    """The converter declares a cast once per use of a tensor by a node that stays in float32: one is enough."""
    declared: set[str] = set()
    kept = []
    for node in graph.node:
        if node.op_type == "Cast" and node.output[0] in declared:
            continue
        declared.update(node.output)
        kept.append(node)
    if len(kept) < len(graph.node):
        copies = onnx.GraphProto(node=kept)
        del graph.node[:]
        graph.node.extend(copies.node)
