"""What a run is told, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spa.errors import UsageError

Loss = Literal["auto", "ce", "kd", "inner"]
Optimiser = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "constant"]
Distance = Literal["auto", "logits", "values"]
Provider = Literal["auto", "cpu", "cuda"]
Sparsity = Literal["group-lasso", "growing", "mask"]

_RATE = {"sgd": 5e-3, "adamw": 5e-4}
_STRENGTH = {"group-lasso": 1.0, "growing": 1.5, "mask": 1.5}
"""Half more than takes a unit to nothing that no gradient holds; `group-lasso` decides which units go by itself."""
_DECAY = {"sgd": 5e-4, "adamw": 0.01}


@dataclass(frozen=True)
class Settings:
    """Everything that the trained weights depend on, besides models and samples."""

    loss: Literal["ce", "kd", "inner"]
    epochs: int
    batch: int
    lr: float
    optimiser: Optimiser
    schedule: Schedule
    warmup: float
    weight_decay: float
    accumulate: int
    amp: bool
    ema: float
    held_out: float
    patience: int
    temperature: float
    alpha: float
    gamma: float
    distance: Distance
    augment: Literal["flip-crop"] | None
    freeze: tuple[str, ...]
    seed: int
    sparsity: Sparsity | None = None
    strength: float = 0.0


def settled(
    *,
    loss: str,
    teacher: bool,
    optimiser: str,
    schedule: str,
    distance: str,
    augment: str | None,
    lr: float | None,
    weight_decay: float | None,
    freeze: str | Sequence[str],
    sparsity: str | None = None,
    strength: float | None = None,
    plan: bool = False,
    **numbers: Any,
) -> Settings:
    """Settings of a run, with the defaults that depend on other settings.

    Raises:
        UsageError: an option is wrong; the message names it.
    """
    _one_of("loss", loss, ("auto", "ce", "kd", "inner"))
    _one_of("optimiser", optimiser, ("sgd", "adamw"))
    _one_of("schedule", schedule, ("cosine", "constant"))
    _one_of("distance", distance, ("auto", "logits", "values"))
    if augment is not None:
        _one_of("augment", augment, ("flip-crop",))
    if sparsity is not None:
        _one_of("sparsity", sparsity, tuple(_STRENGTH))
        if sparsity != "group-lasso" and not plan:
            raise UsageError(
                f"--sparsity {sparsity} shrinks what will be pruned: give the plan of that as --plan PLAN.json "
                "(spa prune MODEL --plan writes one), or use --sparsity group-lasso."
            )
        strength = _STRENGTH[sparsity] if strength is None else strength
        _require("strength", strength, 0 < strength < float("inf"), "above 0")
    elif strength is not None:
        raise UsageError("--strength is that of --sparsity: give that, too, or leave it out.")
    if loss == "auto":
        loss = "inner" if teacher else "ce"
    if loss != "ce" and not teacher:
        raise UsageError(f"--loss {loss} needs the model that was pruned: give it as --teacher MODEL.")
    rate = _RATE[optimiser] if lr is None else lr
    decay = _DECAY[optimiser] if weight_decay is None else weight_decay
    for name, least in (("epochs", 1), ("batch", 1), ("accumulate", 1), ("patience", 1), ("seed", 0)):
        _require(name, numbers[name], numbers[name] >= least, f"{least} or more")
    _require("lr", rate, 0 < rate < float("inf"), "above 0")
    _require("weight-decay", decay, 0 <= decay < float("inf"), "0 or more")
    _require("temperature", numbers["temperature"], 0 < numbers["temperature"] < float("inf"), "above 0")
    _require("gamma", numbers["gamma"], 0 <= numbers["gamma"] < float("inf"), "0 or more")
    _require("alpha", numbers["alpha"], 0 <= numbers["alpha"] <= 1, "between 0 and 1")
    for name in ("warmup", "ema", "held_out"):
        _require(name.replace("_", "-"), numbers[name], 0 <= numbers[name] < 1, "at least 0 and below 1")
    patterns = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    return Settings(
        loss=loss,  # type: ignore[arg-type]  # checked above, as those below
        optimiser=optimiser,  # type: ignore[arg-type]  # checked above
        schedule=schedule,  # type: ignore[arg-type]  # checked above
        distance=distance,  # type: ignore[arg-type]  # checked above
        augment=augment,  # type: ignore[arg-type]  # checked above
        lr=float(rate),
        weight_decay=float(decay),
        freeze=patterns,
        sparsity=sparsity,  # type: ignore[arg-type]  # checked above
        strength=strength or 0.0,
        **numbers,
    )


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"--{name}: unknown choice {value!r}; choose one of {', '.join(choices)}.")


def _require(name: str, value: float, good: bool, wanted: str) -> None:
    if not good:
        raise UsageError(f"--{name} must be {wanted}, not {value}.")
