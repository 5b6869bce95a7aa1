"""Samples without data: noise of the right types and shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from spa.calibration.data import Array, Calibration, assemble, fixed_batch, is_float
from spa.errors import RuntimeFailure, UsageError
from spa.feeds import ATTEMPTS, make_feeds
from spa.runtime import Session, open_session, run
from spa.signature import InputSpec, index_bounds, inputs_of

__all__ = ["SAMPLES", "Maker", "load_noise", "opened"]

SAMPLES = 256
"""How many samples are made up by default."""
_INSIDE = 1_500_000_000
"""Above this many bytes of weights a model is handed to the runtime in a file: protobuf ends at 2 GiB."""


@contextmanager
def opened(model: ir.Model) -> Iterator[Session]:
    """The model in ONNX Runtime, on the CPU; it is not changed.

    Raises: RuntimeFailure if ONNX Runtime refuses it.
    """
    copy = model.clone()
    tensors = [v.const_value for g in copy.graphs() for v in g.initializers.values() if v.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) < _INSIDE:
        ir.external_data.load_to_model(copy)
        yield open_session(ir.to_proto(copy).SerializeToString(), provider="cpu")
        return
    with tempfile.TemporaryDirectory(prefix="spa-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "model.onnx")
        ir.save(copy, path, external_data="model.onnx.data")
        yield open_session(path, provider="cpu")


class Maker:
    """Makes up any number of samples, as `spa.feeds` would, of shapes on which the model runs."""

    def __init__(self, model: ir.Model, seed: int, dims: Mapping[str, int] | None) -> None:
        """Find a guess that runs, if anything is open to guess.

        Raises: UsageError for inputs without an axis of samples or wrong `dims`; RuntimeFailure if no guess runs.
        """
        self.specs: Sequence[InputSpec] = inputs_of(model)
        self.fixed = fixed_batch(self.specs)
        self._bounds = index_bounds(model)
        self._seed, self._dims = seed, dict(dims or {})
        self._attempt = 0
        axes = [dim for spec in self.specs for dim in (spec.shape or (None, None))[1:]]
        if not all(isinstance(dim, int) for dim in axes):
            self._attempt = self._runs(model)

    def feeds(self, samples: int) -> dict[str, Array]:
        """Standard normal floats, random indices, masks that keep everything; `samples` along axis 0."""
        return self._make(samples, self._attempt)

    def _make(self, samples: int, attempt: int) -> dict[str, Array]:
        batch: dict[str, int] = {}
        for spec in self.specs:
            if spec.shape and not isinstance(spec.shape[0], int):
                batch[spec.shape[0] or f"{spec.name}:0"] = samples
        # a batch size that the graph fixes is no obstacle to more samples: they are handed out in such batches
        open_ = [
            InputSpec(s.name, s.dtype, (f"{s.name}:0", *s.shape[1:])) if self.fixed and s.shape else s
            for s in self.specs
        ]
        batch |= {f"{spec.name}:0": samples for spec in open_ if self.fixed and spec.shape}
        feeds = make_feeds(open_, seed=self._seed, dims={**self._dims, **batch}, bounds=self._bounds, attempt=attempt)
        for name, array in feeds.items():
            if len(array) != samples:
                raise UsageError(
                    f"input {name!r} has {len(array)} rows for {samples} samples, so that its first axis is not "
                    "the samples: give data as batches of feeds."
                )
        return feeds

    def _runs(self, model: ir.Model) -> int:
        error: RuntimeFailure | None = None
        with opened(model) as session:
            for attempt in range(ATTEMPTS):
                try:
                    outputs = run(session, self._make(self.fixed or 2, attempt))
                except RuntimeFailure as failure:
                    error = error or failure
                    continue
                if all(_finite(array) for array in outputs.values()):
                    return attempt
        reason = f" ({str(error).rstrip('.')})" if error is not None else ""
        raise RuntimeFailure(
            f"no made-up input runs this model{reason}: give real data, or sizes of open axes with `dims`."
        ) from error


def _finite(array: Any) -> bool:
    return not (isinstance(array, np.ndarray) and is_float(array.dtype)) or bool(
        np.isfinite(array.astype(np.float32)).all()
    )


def load_noise(model: ir.Model, *, samples: int | None, seed: int, dims: Mapping[str, int] | None) -> Calibration:
    """Noise N(0, 1) as in OBSPA's data-free mode; integers are random indices within their tables, masks are one.

    Raises: as `Maker`.
    """
    maker = Maker(model, seed, dims)
    feeds = maker.feeds(rounded(SAMPLES if samples is None else samples, maker.fixed))
    return assemble("noise", "noise", [feeds], None, maker.fixed, "N(0, 1); random indices; no data was used")


def rounded(samples: int, fixed: int | None) -> int:
    """`samples`, or the next multiple of the batch size that the graph fixes.

    Raises: UsageError if it is below 1.
    """
    if samples < 1:
        raise UsageError(f"samples must be 1 or more, not {samples}.")
    return samples if fixed is None else -(-samples // fixed) * fixed
