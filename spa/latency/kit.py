"""A folder with all that measuring a model needs but the model's weights: it can be taken to another machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spa.bench import batch_dims
from spa.cost import default_dims
from spa.errors import OutputError, UsageError
from spa.feeds import load_feeds, runnable_feeds
from spa.graph import Graph
from spa.groups import Analysis
from spa.latency import device
from spa.latency.design import Configuration
from spa.progress import Progress, silent
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.runtime import Array, open_session
from spa.signature import inputs_of
from spa.store import outline

SCRIPT = "measure.py"
_FILES = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "DOUBLE": "float64",
    "INT8": "bytes",
    "UINT8": "bytes",
    "INT4": "bytes",
    "UINT4": "bytes",
}
"""Types whose numbers make no difference to time -> what is made up for them."""


def emit(
    folder: Path,
    graph: Graph,
    analysis: Analysis,
    configurations: Sequence[Configuration],
    *,
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Write a kit: one light model per configuration, inputs, and the script that measures them.

    Args:
        folder: made if it is not there.
        graph: the model.
        analysis: of it.
        configurations: the first is the dense model.
        batch: size of axis 0 of the inputs, where it is open; by default 1.
        dims: sizes of symbolic axes.
        inputs: `.npz` file with inputs, instead of made-up ones.
        progress: told how many models are written (`kit`).

    Raises:
        UsageError: batch, dims or inputs do not fit the model.
        OutputError: the folder cannot be written.
        RuntimeFailure: the model does not run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(device.__file__, folder / SCRIPT)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); check the folder's permissions") from error
    weights: dict[str, int] = {}
    for k, configuration in enumerate(configurations):
        progress("kit", k, len(configurations))
        removed = [
            (g, range(configuration.widths[g.name], g.units)) for g in analysis.groups if g.name in configuration.widths
        ]
        model = rewritten(analysis, kept_without(analysis, removed)).model if removed else graph.model
        for file, size in outline(model, folder / f"{configuration.name}.onnx", _shared).items():
            weights[file] = max(size, weights.get(file, 0))
    progress("kit", len(configurations), len(configurations))
    kinds = {f"{kind}.bin": kind for kind in _FILES.values()}
    needed = {file: device.Weights(kind=kinds[file], bytes=size) for file, size in weights.items()}
    device.prepare(folder, needed)
    feeds = feeds_for(graph, folder / f"{device.DENSE}.onnx", batch, dims or {}, inputs)
    first = next(iter(feeds.values()))
    about = {
        "sha256": graph.sha256,
        "name": graph.path.name if graph.path is not None else "model",
        "configurations": [asdict(c) for c in configurations],
    }
    body: dict[str, Any] = {
        "format": device.FORMAT,
        "models": [c.name for c in configurations],
        "inputs": list(feeds),
        "weights": needed,
        "batch": int(first.shape[0]) if first.ndim else 1,
        "dtype": str(first.dtype),
        "about": about,
    }
    try:
        np.savez(folder / "inputs.npz", **feeds)  # type: ignore[arg-type]  # numpy types its own option
        (folder / "kit.json").write_text(json.dumps(body) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); check the folder's free space") from error


def _shared(dtype: str) -> str | None:
    kind = _FILES.get(dtype)
    return None if kind is None else f"{kind}.bin"


def feeds_for(
    graph: Graph, dense: Path, batch: int | None, dims: Mapping[str, int], inputs: Path | None
) -> dict[str, Array]:
    """Inputs for a model: given, or made up with the sizes that costs assume; `dense` is a file of it that runs.

    Raises:
        UsageError: batch, dims or inputs do not fit the model.
        RuntimeFailure: the model does not run.
    """
    specs = inputs_of(graph.model)
    if inputs is not None:
        if batch is not None:
            raise UsageError("--batch is for made-up inputs: leave it out where --inputs are given")
        return load_feeds(inputs, specs)
    sizes = {**default_dims(graph.model, dims), **batch_dims(specs, batch, "the model")}
    return runnable_feeds(graph.model, open_session(dense, provider="cpu"), 0, sizes)
