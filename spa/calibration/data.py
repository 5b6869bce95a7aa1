"""Calibration samples and what every form of them must satisfy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import UsageError
from spa.signature import InputSpec

__all__ = ["Array", "Calibration", "assemble", "fixed_batch", "is_float", "plural", "select", "spread"]

Array = NDArray[Any]
_BLOCK = 1 << 22  # elements whose finiteness is checked at once


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration samples of one model, handed out in batches."""

    name: str
    """How reports call it: `npz calib.npz`, `images folder/`, `text calib.jsonl`, `arrays`, `noise`, `bn-matched`."""
    digest: str
    """sha256 (hex) over the samples as the model gets them, in order, with their names, types, shapes and labels; of a
    part (`split`), over the digest of the whole and which samples these are."""
    samples: int
    """How many there are, over all buckets."""
    feeds: tuple[Mapping[str, Array], ...]
    """Buckets: the arrays of one bucket (by input name) have the same first axis, the samples; other axes differ from
    bucket to bucket only (text: one bucket per token length)."""
    labels: NDArray[np.int64] | None = None
    """One class per sample, in the order of samples over buckets."""
    fixed: int | None = None
    """The batch size, where the graph fixes it."""
    note: str = ""
    """What is worth knowing about how the samples came about; may be empty."""

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """At most `size` samples each, never from two buckets, in order.

        Where the graph fixes the batch size, each batch has exactly that size whatever `size` is, and an incomplete
        rest is left out (`load_calibration` and `split` leave none).

        Raises: UsageError if `size` is below 1.
        """
        if size < 1:
            raise UsageError(f"a batch must have 1 sample or more, not {size}.")
        step = self.fixed or size
        for bucket in self.feeds:
            count = _count(bucket)
            stop = count - count % step if self.fixed else count
            for start in range(0, stop, step):
                yield {name: array[start : min(start + step, stop)] for name, array in bucket.items()}

    def split(self, held: int) -> tuple[Calibration, Calibration]:
        """Samples to fit on, and `held` others to measure on, spread evenly over all of them.

        The same call gives the same samples. With a fixed batch size whole batches are held out: at least `held`
        samples.

        Raises: UsageError unless samples are left on both sides.
        """
        step = self.fixed or 1
        units, wanted = self.samples // step, -(-held // step)
        if not 0 < wanted < units:
            raise UsageError(
                f"cannot hold out {held} of {plural(self.samples)}"
                + (f" in batches of {step}" if step > 1 else "")
                + ": choose a number that leaves samples on both sides."
            )
        chosen = np.zeros(units, dtype=np.bool_)
        chosen[((np.arange(wanted) + 0.5) * units / wanted).astype(np.int64)] = True
        mask = np.repeat(chosen, step)
        return self._part(~mask, "fit"), self._part(mask, "held out")

    def _part(self, mask: NDArray[np.bool_], what: str) -> Calibration:
        buckets, start = [], 0
        for bucket in self.feeds:
            part = mask[start : start + _count(bucket)]
            start += len(part)
            if part.any():
                buckets.append({name: array[part] for name, array in bucket.items()})
        labels = None if self.labels is None else self.labels[mask]
        digest = hashlib.sha256(f"{self.digest} {mask.tobytes().hex()}".encode()).hexdigest()
        name = f"{self.name} ({what})"
        return Calibration(name, digest, int(mask.sum()), tuple(buckets), labels, self.fixed, self.note)


def _count(bucket: Mapping[str, Array]) -> int:
    return len(next(iter(bucket.values())))


def plural(samples: int) -> str:
    """`1 sample`, `2 samples`."""
    return f"{samples} sample" + "s" * (samples != 1)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is a floating-point type, those of `ml_dtypes` included."""
    return dtype.kind == "f" or "float" in dtype.name


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the graph fixes, if it does.

    Raises: UsageError if the inputs have no common axis of samples.
    """
    sizes: dict[int, str] = {}
    for spec in specs:
        if spec.shape is not None and not spec.shape:
            raise UsageError(
                f"input {spec.name!r} is a scalar, without an axis of samples: "
                "make it a constant of the graph to calibrate."
            )
        if spec.shape and isinstance(spec.shape[0], int):
            sizes.setdefault(spec.shape[0], spec.name)
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise UsageError(
            f"inputs {first!r} and {second!r} have fixed first axes of {a} and {b}, so that there is no common axis of "
            "samples: export the model with an open batch axis."
        )
    return next(iter(sizes), None)


def spread(total: int, samples: int | None, seed: int) -> NDArray[np.int64]:
    """Positions of at most `samples` of `total` items: one from each of `samples` equal stretches, in order.

    Raises: UsageError if `samples` is below 1.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be 1 or more, not {samples}.")
    if samples is None or samples >= total:
        return np.arange(total, dtype=np.int64)
    jitter = np.random.default_rng([seed & 0xFFFFFFFF, total]).random(samples)
    edges = np.arange(samples + 1, dtype=np.int64) * total // samples  # whole numbers, so that no item comes twice
    return edges[:-1] + (jitter * np.diff(edges)).astype(np.int64)


def select(
    buckets: Sequence[Mapping[str, Array]], labels: NDArray[np.int64] | None, samples: int | None, seed: int
) -> tuple[list[dict[str, Array]], NDArray[np.int64] | None]:
    """At most `samples` of all samples, spread evenly (`spread`)."""
    total = sum(_count(bucket) for bucket in buckets)
    chosen = spread(total, samples, seed)
    if len(chosen) == total:
        return [dict(bucket) for bucket in buckets], labels
    out, start = [], 0
    for bucket in buckets:
        mine = chosen[(chosen >= start) & (chosen < start + _count(bucket))] - start
        start += _count(bucket)
        if len(mine):
            out.append({name: array[mine] for name, array in bucket.items()})
    return out, None if labels is None else labels[chosen]


def assemble(
    name: str,
    where: str,
    buckets: Sequence[Mapping[str, Array]],
    labels: NDArray[np.int64] | None,
    fixed: int | None,
    note: str = "",
) -> Calibration:
    """Samples that are worth calibrating on; an incomplete batch at the end of a bucket is left out.

    Args:
        name: how reports call them.
        where: how messages call them.
        buckets: see `Calibration.feeds`; types and shapes are those of the graph already.
        labels: one per sample.
        fixed: the batch size that the graph fixes.
        note: kept.

    Raises: UsageError for no samples, for values that are not finite, and if all samples are the same.
    """
    if not sum(_count(bucket) for bucket in buckets):
        raise UsageError(f"{where} has no samples: calibration needs at least one.")
    for bucket in buckets:
        for key, array in bucket.items():
            _check_finite(where, key, array)
    if fixed is not None and fixed > 1:
        buckets, labels = _whole(buckets, labels, fixed)
        if not buckets:
            raise UsageError(f"{where} has too few samples: the model takes {fixed} of the same shape at a time.")
    samples = sum(_count(bucket) for bucket in buckets)
    if samples > 1 and len(buckets) == 1 and all(_same(array) for array in buckets[0].values()):
        raise UsageError(
            f"all {samples} samples of {where} are identical, so that nothing can be learned: give real data."
        )
    kept = tuple({key: np.ascontiguousarray(array) for key, array in bucket.items()} for bucket in buckets)
    return Calibration(name, _digest(kept, labels, fixed), samples, kept, labels, fixed, note)


def _whole(
    buckets: Sequence[Mapping[str, Array]], labels: NDArray[np.int64] | None, fixed: int
) -> tuple[list[Mapping[str, Array]], NDArray[np.int64] | None]:
    """Whole batches only."""
    out: list[Mapping[str, Array]] = []
    kept: list[NDArray[np.int64]] = []
    start = 0
    for bucket in buckets:
        count = _count(bucket)
        whole = count - count % fixed
        if whole:
            out.append({name: array[:whole] for name, array in bucket.items()})
            if labels is not None:
                kept.append(labels[start : start + whole])
        start += count
    return out, np.concatenate(kept) if kept else None


def _check_finite(where: str, name: str, array: Array) -> None:
    if not is_float(array.dtype):
        return
    step = max(_BLOCK // max(array[:1].size, 1), 1)
    for start in range(0, len(array), step):
        block = array[start : start + step]
        good = np.isfinite(block if block.dtype.kind == "f" else block.astype(np.float32))
        if not good.all():
            bad = start + int(np.argmin(good.reshape(len(block), -1).all(axis=1)))
            raise UsageError(f"{where} has NaN or infinity in {name!r}, first in sample {bad}: remove such samples.")


def _same(array: Array) -> bool:
    return all(bool((array[k] == array[0]).all()) for k in range(1, len(array)))


def _digest(buckets: Sequence[Mapping[str, Array]], labels: NDArray[np.int64] | None, fixed: int | None) -> str:
    """sha256 over everything the model gets to see."""
    state = hashlib.sha256(f"calibration 1 {len(buckets)} {fixed}".encode())
    for bucket in buckets:
        for name in sorted(bucket):
            _update(state, name, bucket[name])
    if labels is not None:
        _update(state, "labels", labels)
    return state.hexdigest()


def _update(state: Any, name: str, array: Array) -> None:
    state.update(f"|{name!r} {array.dtype.name} {array.shape}|".encode())
    if array.dtype == object:
        state.update(repr(array.tolist()).encode())
    else:
        state.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"")
