"""Normalisations."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from spa.errors import UsageError
from spa.interpreter.base import Kernel, Node, Unsupported, axis_of, operator
from spa.interpreter.types import FLOATS


@operator("BatchNormalization")
def _batch_norm(node: Node) -> Kernel:
    """Stored statistics in eval mode; in train mode those of the batch, which also move the stored ones.

    A model that itself asks for training (`training_mode`) gets ONNX's own rule, with the biased variance.
    """
    eps, momentum = float(node.attr("epsilon", 1e-5)), float(node.attr("momentum", 0.9))
    state = node.state
    if node.version >= 14 and node.attr("training_mode", 0):

        def always(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
            axes = [0, *range(2, x.dim())]
            y = F.batch_norm(x, None, None, scale.to(x.dtype), bias.to(x.dtype), True, 0.0, eps)
            now, spread = x.mean(axes), x.var(axes, unbiased=False)
            return (
                y,
                mean * momentum + now.to(mean.dtype) * (1 - momentum),
                var * momentum + spread.to(var.dtype) * (1 - momentum),
            )

        return always
    own = node.stored(3), node.stored(4)
    shared, stored, computed = False in own, own == (True, True), None in own
    name = node.ir.name or ""

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if x.dtype != mean.dtype:  # mixed precision: in the type of the statistics
            return run(x.to(mean.dtype), scale, bias, mean, var).to(x.dtype)
        if scale.dtype != mean.dtype:
            scale, bias = scale.to(mean.dtype), bias.to(mean.dtype)
        if state.training and shared:
            raise UsageError(
                f"the statistics of BatchNormalization '{name}' are shared with other nodes and cannot be trained; "
                "call spa.interpreter.untie on the model first."
            )
        if computed and (mean.requires_grad or var.requires_grad):
            shape = (1, -1, *[1] * (x.dim() - 2))
            factor = scale * torch.rsqrt(var + eps)
            return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
        if not state.training or not stored:
            return F.batch_norm(x, mean.detach(), var.detach(), scale, bias, False, 0.0, eps)
        if not state.update:
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, scale, bias, True, 1 - momentum, eps)

    return run


def computed_in(node: Node, attribute: str = "stash_type") -> torch.dtype | None:
    """The type in which a norm is computed if that is another one than its input's."""
    kind = ir.DataType(node.attr(attribute, 1))
    if kind not in FLOATS:
        raise Unsupported(f"{attribute} {kind.name}")
    dtype = node.dtype()
    return None if dtype is None or dtype == kind or kind != ir.DataType.FLOAT else torch.float32


@operator("LayerNormalization")
def layer_norm(node: Node) -> Kernel:
    """Over the axes from `axis` on; also gives mean and inverse standard deviation where they are asked for."""
    axis, eps = int(node.attr("axis", -1)), float(node.attr("epsilon", 1e-5))
    computed_in(node)
    if node.outputs == 1:

        def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
            shape = x.shape[axis:]
            if scale.shape == shape and scale.dtype == x.dtype and (bias is None or bias.shape == shape):
                return F.layer_norm(x, shape, scale, bias, eps)
            y = F.layer_norm(x, shape, None, None, eps) * scale
            return (y if bias is None else y + bias).to(x.dtype)

        return run

    def full(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        axes = list(range(axis_of(axis, x.dim()), x.dim()))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = wide.mean(axes, keepdim=True)
        inverse = torch.rsqrt((wide - mean).square().mean(axes, keepdim=True) + eps)
        y = ((wide - mean) * inverse).to(x.dtype) * scale
        return (y if bias is None else y + bias, mean, inverse)

    return full


def rms_norm(x: Tensor, axis: int, eps: float) -> Tensor:
    """`x` over the root of its mean square, computed in float32 at least."""
    axes = list(range(axis_of(axis, x.dim()), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)).to(x.dtype)


@operator("RMSNormalization")
def _rms_norm(node: Node) -> Kernel:
    axis, eps = int(node.attr("axis", -1)), float(node.attr("epsilon", 1e-5))
    return lambda x, scale: (rms_norm(x, axis, eps) * scale).to(scale.dtype)


@operator("SimplifiedLayerNormalization")
def _simplified(node: Node) -> Kernel:
    axis, eps = int(node.attr("axis", -1)), float(node.attr("epsilon", 1e-5))

    def run(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y = rms_norm(x, axis, eps) * scale
        if node.outputs == 1:
            return (y,)
        return y, torch.rsqrt(x.square().mean(list(range(axis_of(axis, x.dim()), x.dim())), keepdim=True) + eps)

    return run


@operator("InstanceNormalization")
def _instance_norm(node: Node) -> Kernel:
    eps = float(node.attr("epsilon", 1e-5))

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if math.prod(x.shape[2:]) > 1:
            return F.instance_norm(x, None, None, scale.to(x.dtype), bias.to(x.dtype), True, 0.0, eps)
        return torch.zeros_like(x) + bias.reshape(-1, *[1] * (x.dim() - 2))  # torch refuses single values

    return run


@operator("GroupNormalization", since=18)
def _group_norm_old(node: Node) -> Kernel:
    """Scale and bias per group, before opset 21."""
    groups, eps = int(node.attr("num_groups")), float(node.attr("epsilon", 1e-5))

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        each = x.shape[1] // groups
        return F.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), eps)

    return run


@operator("GroupNormalization", since=21)
def _group_norm(node: Node) -> Kernel:
    groups, eps = int(node.attr("num_groups")), float(node.attr("epsilon", 1e-5))
    return lambda x, scale, bias: F.group_norm(x, groups, scale, bias, eps)


@operator("LpNormalization")
def _lp_norm(node: Node) -> Kernel:
    axis, p = int(node.attr("axis", -1)), int(node.attr("p", 2))

    def run(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))

    return run


@operator("MeanVarianceNormalization")
def _mean_variance(node: Node) -> Kernel:
    axes = list(node.attr("axes") or [0, 2, 3])

    def run(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)

    return run


@operator("LRN")
def _lrn(node: Node) -> Kernel:
    size = int(node.attr("size"))
    alpha, beta, bias = (float(node.attr(n, d)) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))

    def run(x: Tensor) -> Tensor:
        squares = x.square().movedim(1, -1)
        before = (size - 1) // 2
        wide = F.pad(squares, [before, size - 1 - before])
        return x / (bias + alpha / size * wide.unfold(-1, size, 1).sum(-1).movedim(-1, 1)).pow(beta)

    return run
