"""The weights of implants: from the kernel they replace, or fit to what it gave on samples."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spa.implant.candidates import Holder
from spa.implant.rewrite import Kernel
from spa.least_squares import refit
from spa.measured import Measured
from spa.sites import Site, constant_of

Weights = Literal["auto", "fit", "sum", "centre", "zero"]
WEIGHTS: tuple[Weights, ...] = ("auto", "fit", "sum", "centre", "zero")
LARGEST = 10.0
"""By which outputs are scaled at most."""
DAMPING = 1e-3
"""Of the ridge towards the middle of the kernel, relative to the mean variance of the inputs."""


def kernel_of(holder: Holder, rows: NDArray[np.int64], how: Weights, measured: Measured | None) -> Kernel:
    """Weights and biases of the implants that replace some outputs of a convolution.

    Args:
        holder: the convolution.
        rows: its outputs, in ascending order.
        how: `centre`: the middle of the kernel. `sum`: all its taps added up, which is right where the input does not
            change under the kernel. `zero`: none, to be trained (HAP's code). `fit`: least squares on the samples,
            W_1 = W C_:S (C_SS)^-1 for the covariance C of the patches and their middle S, scaled so that each output
            has the variance of what it replaces (regression loses some, and activations and norms behind it expect
            it), with the bias b + W mu - W_1 mu_S that gives it the mean.
        measured: moments of the patches, for `fit`.

    Raises:
        UsageError: there are too few samples.
    """
    site = holder.site
    whole = site.weights[0][rows]
    bias = _bias(site)[rows]
    middle = whole[:, holder.middle]
    if how == "zero":
        return Kernel(np.zeros_like(middle), bias)
    if how == "sum":
        return Kernel(whole.reshape(len(rows), site.taps, site.channels).sum(axis=1), bias)
    if how == "centre" or measured is None:
        return Kernel(middle, bias)
    joint = measured.joint(site)
    covariance, mean = joint.covariance[0], joint.mean_x[0]
    cross = whole @ covariance[:, holder.middle]
    inner = covariance[holder.middle, holder.middle]
    new = refit(inner, cross, middle, DAMPING)
    have, want = (np.einsum("md,de,me->m", w, c, w) for w, c in ((new, inner), (whole, covariance)))
    new *= np.sqrt(np.minimum(want / np.maximum(have, 1e-30), LARGEST**2))[:, None]
    return Kernel(new, bias + whole @ mean - new @ mean[holder.middle])


def _bias(site: Site) -> NDArray[np.float64]:
    """Of a convolution, also where others read the same numbers, [outputs]."""
    value = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    tensor = None if value is None else constant_of(value)
    return np.zeros(site.rows) if tensor is None else np.asarray(tensor.numpy().astype(np.float64).reshape(-1))
