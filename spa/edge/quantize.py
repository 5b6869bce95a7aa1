"""Stage `quantize`: INT8 by ONNX Runtime's own static quantiser, on the samples that pruning reads.

Ranges are taken once; then the model may be quantised many times, to find nodes that are better left alone.
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018.
"""

from __future__ import annotations

import platform as machine
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from spa.edge.base import quiet, read, write
from spa.edge.fidelity import Array, Samples
from spa.edge.names import matching, name_nodes
from spa.edge.opset import converted
from spa.errors import UnsupportedModelError
from spa.external import root_cause

__all__ = ["PLATFORMS", "Method", "Ops", "Platform", "Quantizer"]

Platform = Literal["auto", "x86", "x86-vnni", "arm", "gpu"]
Method = Literal["minmax", "entropy", "percentile"]
Ops = Literal["auto", "linear", "all"]

_PER_CHANNEL_SINCE = 13
"""Opset from which QuantizeLinear and DequantizeLinear have an axis."""
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights that integer kernels speed up."""
_WEIGHTS_AT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
"""Products with weights, and tables: which input holds them."""
_FRAGILE = (
    "BatchNormalization",
    "CumSum",
    "EmbedLayerNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Softmax",
    "TopK",
)
"""Statistics, exponentials and order: one scale for a whole tensor loses what they are about, and no integer kernel
makes up for it."""


@dataclass(frozen=True)
class Types:
    """What a platform's integer kernels like."""

    unsigned: bool
    """Activations as uint8 with a zero point (else int8)."""
    symmetric: bool
    """The zero point of activations is 0."""
    reduced: bool
    """Weights in 7 bits: without VNNI, sums of two 8-bit products overflow 16 bits."""


PLATFORMS = {
    "x86": Types(unsigned=True, symmetric=False, reduced=True),
    "x86-vnni": Types(unsigned=True, symmetric=False, reduced=False),
    "arm": Types(unsigned=False, symmetric=False, reduced=False),
    "gpu": Types(unsigned=False, symmetric=True, reduced=False),
}
"""As ONNX Runtime's guide recommends them ("Quantize ONNX models", and `quantize_static`)."""


def this_machine() -> Platform:
    """The platform of the processor at hand."""
    if machine.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return "arm"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "x86"
    return "x86-vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "x86"


@dataclass(frozen=True)
class Settings:
    """How a model is quantised."""

    platform: Platform = "auto"
    method: Method = "minmax"
    per_channel: bool = True
    ops: Ops = "auto"
    exclude: Sequence[str] = ()

    @property
    def chosen(self) -> Platform:
        """The platform, `auto` resolved."""
        return this_machine() if self.platform == "auto" else self.platform


class Quantizer:
    """A model with measured ranges, ready to be quantised.

    Raises:
        UsageError: a pattern of `exclude` matches nothing.
        UnsupportedModelError: ONNX Runtime cannot prepare or calibrate the model, or nothing in it can be quantised.
    """

    def __init__(self, source: Path, folder: Path, on: Samples, settings: Settings) -> None:
        self.source, self.folder, self.settings = source, folder, settings
        proto = read(source)
        _refuse(proto, source)
        opset = next(o for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        if opset.version < _PER_CHANNEL_SINCE:
            proto = converted(proto, _PER_CHANNEL_SINCE, str(source))
        self.ready, self.ranges = folder / "ready.onnx", folder / "ranges.json"
        self._prepare(proto)
        graph = onnx.load(self.ready)
        self.types = self._types(graph)
        self.excluded = matching(graph, settings.exclude, "exclude")
        linear = set(self.types) <= set(_WEIGHTS_AT)
        self.between = _between_activations(graph) if linear else []
        self.names = [n.name for n in graph.graph.node if n.op_type in self.types and n.name not in self.between]
        if not any(node.op_type in LINEAR for node in graph.graph.node if node.name not in self.excluded):
            raise UnsupportedModelError(
                f"{source}: has no convolution or matrix product that could be quantised; leave the stage out"
            )
        self._calibrate(on)

    def _prepare(self, proto: onnx.ModelProto) -> None:
        """Fold norms into convolutions and constants into weights, as the quantiser expects it."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        raw = self.folder / "raw.onnx"
        write(proto, raw)
        try:
            with quiet():
                quant_pre_process(str(raw), str(self.ready), skip_symbolic_shape=True)
        except Exception as error:  # ONNX Runtime's exceptions are private and share no base
            raise self._failed(error) from error
        done = onnx.load(self.ready)
        name_nodes(done)
        onnx.save(done, self.ready)

    def _types(self, model: onnx.ModelProto) -> list[str]:
        """Types of operators to quantise."""
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        ops = self.settings.ops
        present = {node.op_type for node in model.graph.node}
        if ops == "linear" or (ops == "auto" and _attends(model)):
            return sorted(present & set(_WEIGHTS_AT))
        known = {*QDQRegistry, *QLinearOpsRegistry}
        return sorted(present & known - (set(_FRAGILE) if ops == "auto" else set()))

    def _calibrate(self, on: Samples) -> None:
        """Ranges of all tensors, one batch at a time: the collectors would hold all activations of all samples."""
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.calibrate import save_tensors_data

        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        options = {"symmetric": PLATFORMS[self.settings.chosen].symmetric}
        try:
            with quiet():
                calibrator = create_calibrator(
                    self.ready,
                    self.types,
                    augmented_model_path=str(self.folder / "augmented.onnx"),
                    calibrate_method=methods[self.settings.method],
                    extra_options=options,
                )
                for batch in on.data.batches(on.batch):
                    calibrator.collect_data(_Reader(iter([batch])))
                save_tensors_data(calibrator.compute_data(), self.ranges)
        except Exception as error:  # see _prepare
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source}: cannot be quantised ({root_cause(error)})")

    def candidates(self) -> list[str]:
        """Nodes that would be quantised and might be left alone instead, in the graph's order."""
        return [name for name in self.names if name not in self.excluded]

    def write(self, target: Path, *, only: Sequence[str] = (), without: Sequence[str] = ()) -> None:
        """Quantise in QDQ format and write.

        Args:
            target: file to write.
            only: quantise only these nodes; all if empty.
            without: leave these alone, besides those that the settings exclude.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        kinds = PLATFORMS[self.settings.chosen]
        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            made = Path(name) / "quantised.onnx"
            # its own copies: the quantiser writes beside the model, and into the cache if it does not like it
            ranges = Path(shutil.copy(self.ranges, name))
            try:
                with quiet():
                    quantize_static(
                        str(self.ready),
                        str(made),
                        calibration_cache_path=ranges,
                        quant_format=QuantFormat.QDQ,
                        op_types_to_quantize=self.types,
                        per_channel=self.settings.per_channel,
                        reduce_range=kinds.reduced,
                        activation_type=QuantType.QUInt8 if kinds.unsigned else QuantType.QInt8,
                        weight_type=QuantType.QInt8,
                        nodes_to_quantize=list(only),
                        nodes_to_exclude=[*self.excluded, *self.between, *without],
                        calibrate_method=methods[self.settings.method],
                        extra_options={"ActivationSymmetric": kinds.symmetric},
                    )
            except Exception as error:  # see _prepare
                raise self._failed(error) from error
            write(onnx.load(made), target)

    def detail(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """What was done, for the record."""
        left = [*self.excluded, *without]
        return {
            "platform": self.settings.chosen,
            "method": self.settings.method,
            "per_channel": self.settings.per_channel,
            "operators": self.types,
            "quantised": len([name for name in self.names if name not in left]),
            "excluded": left,
        }


class _Reader:
    """Batches as the calibrator asks for them."""

    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self.batches


def _refuse(proto: onnx.ModelProto, source: Path) -> None:
    """Raise UnsupportedModelError for a model whose numbers are coarse already."""
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul") for node in proto.graph.node):
        raise UnsupportedModelError(f"{source}: is quantised already; quantise the model it was made of")
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer):
        raise UnsupportedModelError(f"{source}: is in float16 already; quantise first, and convert the rest afterwards")


def _between_activations(model: onnx.ModelProto) -> list[str]:
    """Nodes of the types of `_WEIGHTS_AT` that have no weights: they hold few of the multiplications of a transformer
    and much of its error, and the quantiser's own option for this is not read when it writes QDQ."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _WEIGHTS_AT and node.input[_WEIGHTS_AT[node.op_type]] not in constants
    ]


def _attends(model: onnx.ModelProto) -> bool:
    """Whether the model is a transformer: there is attention, or a norm over features.

    Its residual stream has a few channels far larger than the rest, and one scale for all of them rounds the others
    away (Dettmers et al., LLM.int8(), 2022): only the products with weights are quantised.
    """
    read_on = {name for node in model.graph.node for name in node.input if name}
    return any(
        node.op_type in ("LayerNormalization", "SkipLayerNormalization", "Attention", "MultiHeadAttention")
        or (node.op_type == "Softmax" and node.output[0] in read_on)
        for node in model.graph.node
    )
