"""Measure a model's operators on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spa.errors import RuntimeFailure, UsageError
from spa.graph import Graph
from spa.groups import Analysis
from spa.latency import device
from spa.latency.design import MODELS, configurations
from spa.latency.kit import emit
from spa.latency.observe import observed
from spa.latency.table import Table
from spa.progress import Progress, silent


def profile(
    graph: Graph,
    analysis: Analysis,
    folder: Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: Path | None = None,
    models: int = MODELS,
    passes: int = device.PASSES,
    seconds: float = device.SECONDS,
    progress: Progress = silent,
) -> Table:
    """Measure a model at many widths, see `spa.latency.device`.

    Args:
        graph: the model.
        analysis: of it.
        folder: for the models that are run and the journal; a run that was stopped goes on there.
        provider: `cpu` or `cuda`.
        threads: inside one operator; 0 lets ONNX Runtime choose.
        batch: size of axis 0 of the inputs where it is open; by default 1.
        dims: sizes of symbolic axes.
        inputs: `.npz` file, instead of made-up inputs.
        models: how many with random widths.
        passes: over all models.
        seconds: of running one model in one pass.
        progress: told how many models are written (`kit`) and measured (`profile`).

    Raises:
        UsageError: an argument does not fit the model, or nothing in it can be pruned.
        RuntimeFailure: the model does not run here.
        OutputError: the folder cannot be written.
    """
    if not analysis.groups:
        raise UsageError("nothing in this model can be pruned, so that its operators have one size only")
    if models < 4 or passes < 1 or seconds <= 0:
        raise UsageError("profiling needs at least 4 models, 1 pass and some time for each")
    emit(
        folder,
        graph,
        analysis,
        configurations(analysis.groups, models),
        batch=batch,
        dims=dims,
        inputs=inputs,
        progress=progress,
    )
    try:
        result = device.measure(
            folder,
            provider=provider,
            threads=threads,
            passes=passes,
            seconds=seconds,
            journal=folder / "journal",
            progress=lambda done, total: progress("profile", done, total),
        )
    except device.KitError as error:
        raise RuntimeFailure(f"profiling: {error}") from error
    return observed(result, analysis, graph.sha256)


def imported(path: Path, graph: Graph, analysis: Analysis) -> Table:
    """What a kit's script wrote on another machine.

    Raises:
        UsageError: it cannot be read, or belongs to another model.
    """
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UsageError(f"{path} is not the result of a kit ({error}); give the file that measure.py wrote") from None
    if not isinstance(result, dict):
        raise UsageError(f"{path} is not the result of a kit; give the file that measure.py wrote")
    try:
        return observed(result, analysis, graph.sha256)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
