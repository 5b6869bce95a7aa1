"""Where a run stands: everything that goes on from there depends on, in one file that a killed run is resumed from."""

from __future__ import annotations

import os
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spa.errors import OutputError, UsageError

FILE = "checkpoint.pt"
VERSION = 2

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one pass over the samples did."""

    epoch: int
    """From 1 on; 0 is the model before training."""
    loss: float
    """Mean of the batches' losses while training; NaN for epoch 0."""
    parts: Mapping[str, float]
    """The means of what the loss is made of: `ce`, `kd`, `inner`; with a sparsity `shrunk`: the norm of the penalised
    units by what it was, mean."""
    accuracy: float | None
    """Of the held-out samples after the epoch, 0 to 1; None without labels or samples held out."""
    distance: float | None
    """Distillation loss of the held-out samples; None without teacher or samples held out."""
    lr: float
    """Learning rate of the last step."""
    seconds: float
    nll: float | None = None
    """Mean cross-entropy of the held-out samples' next tokens, in nats; of language models that are trained on them."""

    @property
    def metric(self) -> float | None:
        """Higher is better: the accuracy, minus the cross-entropy of next tokens, or minus the distance."""
        if self.accuracy is not None:
            return self.accuracy
        if self.nll is not None:
            return -self.nll
        return None if self.distance is None else -self.distance


@dataclass
class State:
    """A run between two epochs."""

    done: int = 0
    """Epochs."""
    step: int = 0
    """Steps of the optimiser."""
    network: Tensors = field(default_factory=dict)
    maps: Tensors = field(default_factory=dict)
    average: Tensors | None = None
    optimiser: dict[str, Any] = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    """Weights of the epoch with the best metric."""
    best_epoch: int = 0
    stopped: bool = False
    """Whether the metric has not improved for too long."""
    history: list[Epoch] = field(default_factory=list)
    chance: list[Tensor] = field(default_factory=list)
    """States of torch's generators: of the CPU, and of the GPU where one is used."""


def copied(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def save(folder: Path, key: str, state: State) -> None:
    """Write a checkpoint, whole or not at all.

    Raises: OutputError if it cannot be written.
    """
    path = folder / FILE
    temporary = folder / f".{FILE}.{secrets.token_hex(8)}.tmp"
    body = {**vars(state), "history": [asdict(e) for e in state.history], "version": VERSION, "key": key}
    try:
        with open(temporary, "xb") as file:
            torch.save(body, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path}: the checkpoint cannot be written ({error}); free some space.") from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Make the folder of checkpoints. Raises: OutputError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); name another checkpoint folder.") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: cannot be written; name another checkpoint folder.")


def read(folder: Path, key: str) -> State | None:
    """The checkpoint of this run, None if there is none yet.

    Args:
        folder: where it lies.
        key: of everything that the run depends on.

    Raises:
        UsageError: it is damaged, or of another run.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
        version, found = body.pop("version"), body.pop("key")
        if version == VERSION and found == key:
            history = [Epoch(**e) for e in body.pop("history")]
            return State(**body, history=history)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path}: is no checkpoint, or damaged ({type(error).__name__}); delete it.") from error
    raise UsageError(
        f"{path}: is of another run (other models, samples or options); use another checkpoint folder, or delete it."
    )
