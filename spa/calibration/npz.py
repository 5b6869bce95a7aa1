"""Samples from a file of arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spa.calibration.arrays import LABELS, as_labels, fit, named
from spa.calibration.data import Array, Calibration, assemble, fixed_batch, select, spread
from spa.calibration.images import from_arrays
from spa.calibration.preprocess import Preprocessing
from spa.errors import UsageError
from spa.feeds import read_npz
from spa.signature import InputSpec

__all__ = ["load_npz"]


def load_npz(
    path: Path,
    specs: Sequence[InputSpec],
    bounds: Mapping[str, int],
    *,
    samples: int | None,
    seed: int,
    description: str | os.PathLike[str] | Preprocessing | None,
    sizes: Mapping[str, int],
) -> Calibration:
    """One array per input, by name or by `in:` and the name, first axis samples; `labels` if there are any.

    Arrays named `out:...` are left out. With a `description` the uint8 array of a floating-point image input is taken
    as images, `[n, h, w, c]` or `[n, c, h, w]`.

    Raises: UsageError, see `spa.calibration.arrays` and `assemble`.
    """
    where = str(path)
    arrays = read_npz(path)
    inputs = {spec.name for spec in specs}
    given = {k.removeprefix("in:"): a for k, a in arrays.items() if not k.startswith("out:")}
    classes = given.pop(LABELS) if LABELS in given and LABELS not in inputs and len(given) > 1 else None
    matched = named(given, specs, where)
    labels = None
    if classes is not None:
        first = next(iter(matched.values()))
        labels = as_labels(classes, len(first) if first.ndim else 1, where)
    if description is not None:
        matched = _images(matched, specs, description, sizes, samples, seed, where)
        if labels is not None:
            labels = labels[spread(len(labels), samples, seed)]
        samples = None
    buckets, labels = select([fit(matched, specs, bounds, where)], labels, samples, seed)
    return assemble(f"npz {path.name}", where, buckets, labels, fixed_batch(specs))


def _images(
    arrays: Mapping[str, Array],
    specs: Sequence[InputSpec],
    description: str | os.PathLike[str] | Preprocessing,
    sizes: Mapping[str, int],
    samples: int | None,
    seed: int,
    where: str,
) -> dict[str, Array]:
    """The chosen samples, with uint8 images as the model takes them."""
    counts = {len(array) for array in arrays.values() if array.ndim}
    if len(counts) > 1:
        return dict(arrays)  # `fit` says it
    chosen = spread(counts.pop() if counts else 0, samples, seed)
    out, done = {}, False
    for spec in specs:
        array = arrays[spec.name]
        array = array[chosen] if array.ndim else array
        if array.dtype == np.uint8 and spec.dtype != np.uint8:
            array, done = from_arrays(array, description, spec, sizes, where), True
        out[spec.name] = array
    if not done:
        raise UsageError(f"{where} has no uint8 images for a floating-point input: leave out `preprocess`.")
    return out
