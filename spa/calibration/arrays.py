"""Arrays as the user has them, checked against what the graph takes, and cast to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.calibration.data import Array, is_float, plural
from spa.errors import UsageError
from spa.signature import Dim, InputSpec

__all__ = ["LABELS", "as_labels", "fit", "named", "shape_text"]

LABELS = "labels"
"""The name of the array that holds no input but classes."""


def shape_text(shape: Sequence[Dim]) -> str:
    """`[n, 3, 32, 32]`."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def named(arrays: Mapping[str, Array], specs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    """The arrays by input name; the only array of a model with only one input may have any name.

    Raises: UsageError for a missing or an unknown array.
    """
    if len(arrays) == len(specs) == 1:
        return {specs[0].name: next(iter(arrays.values()))}
    wanted = [spec.name for spec in specs]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise UsageError(
            f"{where} lacks {_listed(missing)} (it has {_listed(arrays)}): give one array for each input of the model."
        )
    extra = [name for name in arrays if name not in wanted]
    if extra:
        raise UsageError(f"{where} has {_listed(extra)}, which is no input: the inputs are {_listed(wanted)}.")
    return {name: arrays[name] for name in wanted}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def fit(
    arrays: Mapping[str, Array], specs: Sequence[InputSpec], bounds: Mapping[str, int], where: str
) -> dict[str, Array]:
    """Arrays of the graph's types, one per input, all with the same number of samples (axis 0).

    Args:
        arrays: one per input (`named`).
        specs: the inputs.
        bounds: by input, one more than the largest index (`spa.signature.index_bounds`).
        where: how messages call the source.

    Raises: UsageError for a type of another kind, values out of range, another rank or size, or another number of
        samples.
    """
    out = {spec.name: _fit(arrays[spec.name], spec, bounds.get(spec.name), where) for spec in specs}
    (first, array), *others = out.items()
    for name, other in others:
        if len(other) != len(array):
            raise UsageError(
                f"{where} has {len(array)} samples in {first!r} but {len(other)} in {name!r}: "
                "the first axis of every array is the samples."
            )
    return out


def _fit(array: Array, spec: InputSpec, bound: int | None, where: str) -> Array:
    if array.dtype.kind == "V" and array.dtype.itemsize == spec.dtype.itemsize and array.dtype.names is None:
        array = array.view(spec.dtype)  # how numpy stores the types of ml_dtypes
    _check_shape(array, spec, where)
    if spec.dtype == object:
        if array.dtype.kind not in "OU":
            raise _wrong_type(array, spec, where)
        return array.astype(object)
    if array.dtype == object:
        raise UsageError(f"{where} has Python objects in {spec.name!r}: give plain numbers of one shape.")
    if is_float(spec.dtype) and array.dtype == np.uint8:
        raise UsageError(
            f"{where} has {spec.name!r} as uint8, but the model takes {spec.dtype}: if these are images, say with "
            "`preprocess` how they are normalised; otherwise store what the model gets."
        )
    if _kind(array.dtype) != _kind(spec.dtype):
        raise _wrong_type(array, spec, where)
    if _kind(spec.dtype) == "int" and array.size:
        _check_range(array, spec, bound, where)
    return _cast(array, spec.dtype)


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):  # what overflows is reported as not finite
        return array.astype(dtype, copy=False)


def _kind(dtype: np.dtype[Any]) -> str:
    if is_float(dtype):
        return "float"
    return {"b": "bool", "c": "complex", "i": "int", "u": "int"}.get(
        dtype.kind, "int" if "int" in dtype.name else "text"
    )


def _wrong_type(array: Array, spec: InputSpec, where: str) -> UsageError:
    return UsageError(f"{where} has {spec.name!r} as {array.dtype}, but the model takes {spec.dtype}: convert it.")


def _check_shape(array: Array, spec: InputSpec, where: str) -> None:
    """Axis 0 is the samples: any number."""
    if array.ndim == 0:
        raise UsageError(f"{where} has a single number in {spec.name!r}: the first axis of every array is the samples.")
    if spec.shape is None:
        return
    want = (None, *spec.shape[1:])
    if len(want) != array.ndim or any(isinstance(d, int) and d != s for d, s in zip(want, array.shape, strict=True)):
        raise UsageError(
            f"{where} has {spec.name!r} of shape {shape_text(array.shape)}, but the model takes "
            f"{shape_text(spec.shape)} (any number of samples along the first axis)."
        )


def _check_range(array: Array, spec: InputSpec, bound: int | None, where: str) -> None:
    low, high = int(array.min()), int(array.max())
    if bound is not None and (high >= bound or low < -bound):
        raise UsageError(
            f"{where} has {high if high >= bound else low} in {spec.name!r}, but the model looks it up in a table of "
            f"{bound}: the data belong to another vocabulary."
        )
    wide = _cast(array, spec.dtype).astype(array.dtype)
    if not np.array_equal(wide, array):
        raise UsageError(f"{where} has {low} to {high} in {spec.name!r}, which does not fit the model's {spec.dtype}.")


def as_labels(array: Array, samples: int, where: str) -> NDArray[np.int64]:
    """One class per sample; `[n, 1]` is taken as `[n]`.

    Raises: UsageError unless these are `samples` whole numbers.
    """
    flat = array.reshape(-1) if array.size == samples else array
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise UsageError(
            f"{where} has labels of type {array.dtype} and shape {shape_text(array.shape)}: "
            f"give one whole number for each of the {samples} samples."
        )
    if len(flat) != samples:
        raise UsageError(f"{where} has {plural(samples)} but {len(flat)} labels: give one label per sample.")
    return flat.astype(np.int64)
