"""Samples in the order in which they are trained on; a pure function of seed and epoch, so that a run can go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.calibration import Calibration
from spa.calibration.data import Array, is_float
from spa.errors import UsageError
from spa.train.settings import Settings

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Samples that are run together."""

    feeds: Mapping[str, Array]
    labels: Labels | None
    size: int


def held_out(data: Calibration, share: float) -> tuple[Calibration, Calibration | None]:
    """Samples to train on, and others to measure on (None if `share` is 0).

    Raises: UsageError if too few are left on either side.
    """
    if share == 0:
        return data, None
    try:
        return data.split(max(1, round(data.samples * share)))
    except UsageError as error:
        raise UsageError(f"--held-out {share:g}: {error}") from None


def batches(data: Calibration, size: int) -> Iterator[Batch]:
    """All samples, in their own order."""
    step, start = data.fixed or size, 0
    for bucket in data.feeds:
        count = len(next(iter(bucket.values())))
        for first in range(0, count, step):
            stop = min(first + step, count)
            labels = None if data.labels is None else data.labels[start + first : start + stop]
            yield Batch({n: a[first:stop] for n, a in bucket.items()}, labels, stop - first)
        start += count


def order(data: Calibration, settings: Settings, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(bucket, rows of it) of every batch of an epoch, shuffled by seed and epoch.

    A rest that is incomplete where the graph fixes the batch size is left out, and so is a rest of one sample, which
    has no variance, unless it is all there is.
    """
    rng = np.random.default_rng([settings.seed, epoch, 0])
    step, out = data.fixed or settings.batch, []
    for k, bucket in enumerate(data.feeds):
        rows = rng.permutation(len(next(iter(bucket.values()))))
        parts = [rows[i : i + step] for i in range(0, len(rows), step)]
        least = step if data.fixed else min(2, step)
        out += [(k, part) for part in parts if len(part) >= least or (len(parts) == 1 and not data.fixed)]
    return [out[i] for i in rng.permutation(len(out))]


def taken(data: Calibration, settings: Settings, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch, augmented."""
    starts = np.concatenate([[0], np.cumsum([len(next(iter(b.values()))) for b in data.feeds])])
    rng = np.random.default_rng([settings.seed, epoch, 1])
    for k, rows in order(data, settings, epoch):
        feeds: dict[str, Array] = {name: array[rows] for name, array in data.feeds[k].items()}
        if settings.augment is not None:
            feeds = _flipped_and_cropped(feeds, rng)
        labels = None if data.labels is None else data.labels[starts[k] + rows]
        yield Batch(feeds, labels, len(rows))


def check_augment(data: Calibration, settings: Settings) -> None:
    """Raises: UsageError where there is no image to augment."""
    if settings.augment is not None and not any(_is_image(a) for a in data.feeds[0].values()):
        raise UsageError(f"--augment {settings.augment} is for images [n, c, h, w], but no input is one: leave it out.")


def _is_image(array: Array) -> bool:
    return array.ndim == 4 and is_float(array.dtype) and min(array.shape[2:]) > 1


def _flipped_and_cropped(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Every image mirrored or not, and moved by up to an eighth of its size; the border is its mirror image."""
    count = len(next(iter(feeds.values())))
    flip, moves = rng.random(count) < 0.5, rng.random((2, count))
    return {n: _moved(a, flip, moves) if _is_image(a) else a for n, a in feeds.items()}


def _moved(images: Array, flip: NDArray[np.bool_], moves: NDArray[np.float64]) -> Array:
    height, width = images.shape[2:]
    far = max(1, height // 8), max(1, width // 8)
    padded = np.pad(images, ((0, 0), (0, 0), (far[0], far[0]), (far[1], far[1])), mode="reflect")
    tops, lefts = ((m * (2 * f + 1)).astype(np.int64) for m, f in zip(moves, far, strict=True))
    out = np.empty_like(images)
    for k, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        image = padded[k, :, top : top + height, left : left + width]
        out[k] = image[:, :, ::-1] if flip[k] else image
    return out
