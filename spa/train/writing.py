"""Trained weights back in their graph, proved by ONNX Runtime before a file appears."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from spa.coupling import weights_of
from spa.errors import OutputError
from spa.graph import Graph
from spa.interpreter import Interpreter
from spa.interpreter.types import to_tensor
from spa.progress import Progress
from spa.runtime import Session, open_session, run
from spa.sites import constant_of, exchange
from spa.store import publish, save
from spa.verify import HALF_TOLERANCE, TOLERANCE, Verification, half_precision, measure, require

Feeds = Mapping[str, NDArray[Any]]


def write_back(model: ir.Model, network: Interpreter) -> None:
    """Put a network's weights and statistics into its graph."""
    values = {value.name or "": value for value, _ in weights_of(model.graph)}
    for name, array in network.trained().items():
        old = constant_of(values[name])
        assert old is not None
        if not np.array_equal(array, old.numpy()):
            exchange(values[name], array)


def written(
    graph: Graph, network: Interpreter, feeds: Callable[[Session], Feeds], path: Path | None, progress: Progress
) -> Verification:
    """Write a model to a staging folder, compare ONNX Runtime's outputs with the network's, and move it to its place.

    Args:
        graph: the model with its new weights.
        network: what was trained.
        feeds: inputs to compare on, given a session of the written model.
        path: where it goes; None only verifies.
        progress: stages `save` and `verify`.

    Raises:
        VerifyError: the outputs differ; nothing is written.
        RuntimeFailure: ONNX Runtime cannot run the model.
        OutputError: it cannot be written.
    """
    name = "finetuned.onnx" if path is None else path.name
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".spa-", dir=None if path is None else path.parent))
        progress("save", 0, 1)
        save(graph.model, folder / name, external=graph.external, shard=graph.shard)
        progress("verify", 0, 1)
        verification = _verified(graph.model, network, feeds, folder / name)
        require(verification, str(path or "the trained model"))
        if path is not None:
            publish({path.with_name(f.name): f for f in sorted(folder.iterdir(), reverse=True)})
    except OSError as error:
        where = tempfile.gettempdir() if path is None else str(path)
        raise OutputError(
            f"{where}: cannot be written ({error.strerror}); check the folder's permissions and free space"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return verification


def _verified(model: ir.Model, network: Interpreter, feeds: Callable[[Session], Feeds], path: Path) -> Verification:
    half = half_precision(model)
    # halves were trained in float32: what was written is the rounded network
    judge = Interpreter(model).eval() if half else network.cpu().eval()  # a GPU may round to TF32
    session = open_session(path, provider="cpu", optimize=False)
    inputs = feeds(session)
    with torch.no_grad():
        mine = judge({n: to_tensor(a) for n, a in inputs.items()})
    wanted = {n: y.float().cpu().numpy() for n, y in mine.items() if isinstance(y, torch.Tensor)}
    found = {n: np.asarray(y, dtype=np.float32) for n, y in run(session, inputs, list(wanted)).items()}
    return measure(wanted, found, True, HALF_TOLERANCE if half else TOLERANCE)
