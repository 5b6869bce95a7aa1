"""What a model's batch normalisation remembers of its training data, and what made-up data give instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.calibration.data import Array
from spa.calibration.noise import opened
from spa.runtime import Session, run

__all__ = ["Norm", "Taps", "deviation", "norms", "tapped"]

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Norm:
    """One BatchNormalization node with constant statistics."""

    value: str
    """Its input."""
    mean: Vector
    std: Vector
    scale: Vector
    """The deviation with the node's epsilon: what differences are measured in. A dead channel has no deviation."""


def norms(model: ir.Model) -> list[Norm]:
    """The BatchNormalization nodes of the main graph, in order, that read something computed from an input."""
    depends = {id(value) for value in model.graph.inputs if not value.is_initializer()}
    found: list[Norm] = []
    seen: set[str] = set()
    for node in model.graph:
        if any(value is not None and id(value) in depends for value in node.inputs):
            depends.update(id(value) for value in node.outputs)
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or len(node.inputs) < 5:
            continue
        value, mean, variance = node.inputs[0], *(_constant(v) for v in node.inputs[3:5])
        training = node.attributes.get("training_mode")
        if value is None or not value.name or id(value) not in depends or mean is None or variance is None:
            continue
        if value.name in seen or (training is not None and training.as_int()):
            continue
        epsilon = node.attributes.get("epsilon")
        seen.add(value.name)
        variance = np.maximum(variance, 0)
        scale = np.sqrt(variance + max(1e-5 if epsilon is None else epsilon.as_float(), 1e-12))
        found.append(Norm(value.name, mean, np.sqrt(variance), scale))
    return found


def _constant(value: ir.Value | None) -> Vector | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy()).astype(np.float64).reshape(-1)


@dataclass(frozen=True)
class Taps:
    """A session that gives for each norm and sample the mean and the mean square of each channel, nothing else."""

    session: Session
    norms: Sequence[Norm]
    batch: int | None
    """Samples per run where the graph fixes them."""

    def moments(self, feeds: Mapping[str, Array], size: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """For each norm mean and mean square `[samples, channels]`; `size` samples are run at a time.

        Raises: RuntimeFailure if the model does not run.
        """
        count, step = len(next(iter(feeds.values()))), self.batch or size
        rows: list[list[Array]] = [[] for _ in range(2 * len(self.norms))]
        for start in range(0, count, step):
            out = run(self.session, {name: array[start : start + step] for name, array in feeds.items()})
            for k, array in enumerate(out.values()):
                rows[k].append(array)
        joined = [np.concatenate(parts) for parts in rows]
        return list(zip(joined[::2], joined[1::2], strict=True))


@contextmanager
def tapped(model: ir.Model, found: Sequence[Norm], batch: int | None) -> Iterator[Taps]:
    """`model` with reductions at the inputs of its norms as its only outputs: no activation leaves the runtime."""
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs} | {v.name: v for v in copy.graph.inputs}
    shape = _initializer(copy, "spa_tap_shape", np.array([0, 0, -1], np.int64))
    axes = _initializer(copy, "spa_tap_axes", np.array([2], np.int64))
    outputs: list[ir.Value] = []
    opset = copy.graph.opset_imports.get("", copy.graph.opset_imports.get("ai.onnx", 18))
    for k, norm in enumerate(found):
        flat = _node(copy, "Reshape", [values[norm.value], shape], f"spa_tap_{k}_flat")
        plain = _node(copy, "Cast", [flat], f"spa_tap_{k}_float", to=int(ir.DataType.FLOAT))
        square = _node(copy, "Mul", [plain, plain], f"spa_tap_{k}_square")
        for what, value in (("mean", plain), ("power", square)):
            name = f"spa_tap_{k}_{what}"
            if opset >= 18:
                reduced = _node(copy, "ReduceMean", [value, axes], name, keepdims=0)
            else:
                reduced = _node(copy, "ReduceMean", [value], name, keepdims=0, axes=[2])
            reduced.type = ir.TensorType(ir.DataType.FLOAT)
            outputs.append(reduced)
    copy.graph.outputs[:] = outputs
    with opened(copy) as session:
        yield Taps(session, found, batch)


def _initializer(model: ir.Model, name: str, array: NDArray[np.int64]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _node(model: ir.Model, op: str, inputs: Sequence[ir.Value], name: str, **attributes: int | list[int]) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    node.name, node.outputs[0].name = name, name
    model.graph.append(node)
    return node.outputs[0]


def deviation(found: Sequence[Norm], means: Sequence[Array], powers: Sequence[Array]) -> float:
    """How far pooled statistics are from the stored ones.

    Args:
        found: the norms.
        means: per norm the mean of each channel over all samples.
        powers: the mean square.

    Returns: sum over norms of the mean over channels of `((m - mu)^2 + (s - sigma)^2) / sigma^2`, with
    the node's epsilon in the denominator.
    """
    total = 0.0
    for norm, mean, power in zip(found, means, powers, strict=True):
        mean, power = mean.astype(np.float64), power.astype(np.float64)
        std = np.sqrt(np.maximum(power - mean**2, 0))
        total += float(np.mean(((mean - norm.mean) ** 2 + (std - norm.std) ** 2) / norm.scale**2))
    return total
