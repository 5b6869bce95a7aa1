"""Calibration data from whatever the user has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from spa.calibration.data import Calibration, fixed_batch
from spa.calibration.images import SUFFIXES, load_images
from spa.calibration.matching import load_matched, matchable
from spa.calibration.noise import load_noise
from spa.calibration.npz import load_npz
from spa.calibration.preprocess import Preprocessing
from spa.calibration.stream import load_stream
from spa.calibration.text import load_text
from spa.errors import ExternalDataError, UsageError
from spa.signature import index_bounds, inputs_of

__all__ = ["FORMS", "load_calibration"]

FORMS = "an .npz file, a folder of images, a .jsonl or .txt file of texts, `none`, `noise` or `bn`"
"""What a path or word may be."""


def load_calibration(
    source: object,
    model: ir.Model,
    *,
    samples: int | None = None,
    seed: int = 0,
    preprocess: str | os.PathLike[str] | Preprocessing | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    dims: Mapping[str, int] | None = None,
) -> Calibration:
    """Calibration samples of `model`, checked against its inputs.

    Args:
        source: an `.npz` file with one array per input; a folder of images; a `.txt` or `.jsonl` file of texts; a
            mapping from input name to array; an iterable of batches (arrays, mappings, or pairs of either and labels);
            without data `noise`, `bn` (images that match the model's batch normalisation) or `none` (`bn` where there
            is any, `noise` otherwise). A `Calibration` is handed through.
        model: the model; only its inputs, tables and (without data) statistics are read.
        samples: at most so many real samples, evenly spread and chosen by `seed` (all by default); without data
            exactly so many (256 by default), rounded up to whole batches where the graph fixes the batch size.
        seed: of every random choice.
        preprocess: for images: a preset, `key=value` pairs, a JSON file, or a `Preprocessing`.
        tokenizer: for text: the path of a `tokenizer.json`.
        max_length: for text: tokens per text at most.
        dims: sizes of open axes, by symbol or as `input:axis`, for images and made-up samples.

    Raises:
        UsageError: the source cannot be read, does not fit the model, or is worthless; an option does not fit.
        RuntimeFailure: without data, the model does not run on made-up inputs.
        ModelError: an input of the model is no tensor, or (without data) its weights cannot be read.
    """
    if isinstance(source, Calibration):
        return _checked(source, model)
    kind = _kind(source)
    if preprocess is not None and kind not in ("npz", "images"):
        raise UsageError(f"preprocess is for images, not for {_called(source, kind)}: leave it out.")
    if (tokenizer is not None or max_length is not None) and kind != "text":
        what = "tokenizer is" if tokenizer is not None else "max_length is"
        raise UsageError(f"{what} for text, not for {_called(source, kind)}: leave it out.")
    if kind in ("noise", "bn", "none"):
        try:
            if kind != "noise" and (kind == "bn" or matchable(model)):
                return load_matched(model, samples=samples, seed=seed, dims=dims)
            return load_noise(model, samples=samples, seed=seed, dims=dims)
        except OSError as error:  # weights are read only now
            what = f"{error.filename or error}: the model's weights cannot be read"
            raise ExternalDataError(f"{what}; put the file where it was, or export the model again.") from error
    specs, bounds, sizes = inputs_of(model), index_bounds(model), dims or {}
    if not specs:
        raise UsageError("the model has no inputs, so that there is nothing to calibrate.")
    fixed_batch(specs)  # says so at once if there are no samples
    if kind == "stream":
        return load_stream(source, specs, bounds, samples=samples, seed=seed)
    path = Path(str(source) if isinstance(source, str) else os.fspath(source))  # type: ignore[call-overload]  # `_kind` knows it
    if kind == "npz":
        return load_npz(path, specs, bounds, samples=samples, seed=seed, description=preprocess, sizes=sizes)
    if kind == "images":
        return load_images(path, specs, samples=samples, seed=seed, description=preprocess, sizes=sizes)
    return load_text(path, specs, bounds, samples=samples, seed=seed, tokenizer=tokenizer, max_length=max_length)


def _kind(source: object) -> str:
    if not isinstance(source, str | os.PathLike):
        return "stream"
    if source in ("none", "noise", "bn"):
        return str(source)
    if not os.fspath(source):
        raise UsageError(f"calibration data have an empty name: give {FORMS}.")
    path = Path(source)
    if path.is_dir():
        return "images"
    if not path.exists():
        raise UsageError(f"calibration data {os.fspath(path)} do not exist: give {FORMS}.")
    suffix = path.suffix.lower()
    kinds = {".npz": "npz", ".jsonl": "text", ".txt": "text"}
    if suffix in SUFFIXES:
        raise UsageError(f"calibration data {path} is one image: give the folder.")
    if suffix not in kinds:
        raise UsageError(f"calibration data {path} is of no known kind: give {FORMS}.")
    return kinds[suffix]


def _checked(source: Calibration, model: ir.Model) -> Calibration:
    given, wanted = sorted(source.feeds[0]), sorted(spec.name for spec in inputs_of(model))
    if given != wanted:
        names = [", ".join(repr(name) for name in part) for part in (given, wanted)]
        raise UsageError(f"this calibration is for a model with inputs {names[0]}, but this one has {names[1]}.")
    return source


def _called(source: object, kind: str) -> str:
    return "Python data" if kind == "stream" else str(source)
