"""Samples from Python: arrays, feeds, and what a data loader gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.calibration.arrays import LABELS, as_labels, fit, named
from spa.calibration.data import Array, Calibration, assemble, fixed_batch, select
from spa.errors import UsageError
from spa.signature import InputSpec

__all__ = ["load_stream"]

_WHERE = "the calibration data"


def load_stream(
    source: object, specs: Sequence[InputSpec], bounds: Mapping[str, int], *, samples: int | None, seed: int
) -> Calibration:
    """Batches with a leading axis of samples: all of them are read, and those of the same shapes make one bucket.

    Args:
        source: an array, a mapping from input name to array (and perhaps from `labels`), or an iterable of arrays, of
            such mappings, or of pairs of either and labels.
        specs: the model's inputs.
        bounds: see `fit`.
        samples: at most so many, evenly spread.
        seed: of that choice.

    Raises: UsageError, see `spa.calibration.arrays` and `assemble`.
    """
    parts: dict[tuple[Any, ...], list[tuple[dict[str, Array], NDArray[np.int64] | None]]] = {}
    for k, item in enumerate(_items(source)):
        where = _WHERE if _whole(source) else f"batch {k} of the calibration data"
        feeds, labels = _item(item, specs, bounds, where)
        key = tuple(array.shape[1:] for array in feeds.values())
        parts.setdefault(key, []).append((feeds, labels))
    labelled = {labels is not None for part in parts.values() for _, labels in part}
    if len(labelled) > 1:
        raise UsageError(f"{_WHERE} has batches with labels and batches without: give labels with all of them or none.")
    buckets = [
        {spec.name: np.concatenate([feeds[spec.name] for feeds, _ in part]) for spec in specs}
        for part in parts.values()
    ]
    classes = [labels for part in parts.values() for _, labels in part if labels is not None]
    chosen, kept = select(buckets, np.concatenate(classes) if classes else None, samples, seed)
    return assemble("arrays", _WHERE, chosen, kept, fixed_batch(specs))


def _whole(source: object) -> bool:
    return isinstance(source, Mapping) or hasattr(source, "__array__")


def _items(source: object) -> Iterable[object]:
    if _whole(source):
        return (source,)
    if not isinstance(source, Iterable):
        raise UsageError(
            f"calibration data cannot be of type {type(source).__name__}: give a path, arrays, or batches."
        )
    return source


def _item(
    item: object, specs: Sequence[InputSpec], bounds: Mapping[str, int], where: str
) -> tuple[dict[str, Array], NDArray[np.int64] | None]:
    """One batch, with its labels."""
    labels: object = None
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise UsageError(
                f"{where} is a {type(item).__name__} of {len(item)}: give an array, a dict, or a pair with labels."
            )
        item, labels = item
    if isinstance(item, Mapping):
        arrays = {str(name): _array(value, where) for name, value in item.items()}
        if labels is None and LABELS not in {spec.name for spec in specs}:
            labels = arrays.pop(LABELS, None)
    else:
        array = _array(item, where)
        if len(specs) != 1:
            names = ", ".join(repr(spec.name) for spec in specs)
            raise UsageError(f"{where} is one array, but the model has {len(specs)} inputs: give dicts with {names}.")
        arrays = {specs[0].name: array}
    feeds = fit(named(arrays, specs, where), specs, bounds, where)
    count = len(next(iter(feeds.values())))
    if labels is None:
        return feeds, None
    return feeds, as_labels(np.atleast_1d(_array(labels, where)), count, where)


def _array(value: object, where: str) -> Array:
    """`value` in numpy; tensors of other libraries are taken off their device first."""
    for step in ("detach", "cpu"):
        method = getattr(value, step, None)
        value = method() if callable(method) else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{where} holds a {type(value).__name__} that is no array of one shape.") from error
    if array.dtype == object and not all(isinstance(entry, str) for entry in array.reshape(-1)):
        raise UsageError(f"{where} holds Python objects ({type(value).__name__}): give arrays of plain numbers.")
    return array
