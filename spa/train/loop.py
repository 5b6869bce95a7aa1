"""The training loop: steps, schedule, average, held-out metric, and going on where a run was killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spa.calibration import Calibration
from spa.errors import RuntimeFailure
from spa.progress import Progress
from spa.train import state as states
from spa.train.objective import Objective, cross_entropy, hits, outputs_of, tensors
from spa.train.samples import batches, order, taken
from spa.train.settings import Settings
from spa.train.sparsity import Shrinkage
from spa.train.state import Epoch, State, copied


@dataclass
class Loop:
    """One run."""

    objective: Objective
    fit: Calibration
    test: Calibration | None
    """Samples held out."""
    checkpoint: Path | None
    key: str
    progress: Progress
    told: Callable[[Epoch], None]
    shrinkage: Shrinkage | None = None
    """Of units that should be small in the end."""

    def __post_init__(self) -> None:
        self.settings: Settings = self.objective.settings
        self.network = self.objective.student
        decayed = [p for p in self.network.parameters() if p.requires_grad and p.dim() > 1]
        free = [p for p in self.network.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": [*free, *self.objective.maps.parameters()], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self.optimiser: torch.optim.Optimizer
        if self.settings.optimiser == "sgd":
            self.optimiser = torch.optim.SGD(groups, self.settings.lr, momentum=0.9, nesterov=True)
        else:
            self.optimiser = torch.optim.AdamW(groups, self.settings.lr)
        self.per_epoch = -(-len(order(self.fit, self.settings, 1)) // self.settings.accumulate)
        self.total = self.per_epoch * self.settings.epochs
        self.factors = sum(factor(k, self.total, self.settings) for k in range(self.total))

    def run(self) -> State:
        """Train to the end (or early stop); the network then has the best weights, those of `State.best`."""
        self.progress("train", 0, self.total)
        state = self._resumed() or self._start()
        while state.done < self.settings.epochs and not state.stopped:
            self._epoch(state)
            if self.checkpoint is not None:
                self._keep(state)
        self.network.load_state_dict(state.best)
        self.network.eval()
        return state

    # -- where the run stands ----------------------------------------------------------------------------------------

    def _start(self) -> State:
        state = State()
        before = self._judged(0, math.nan, {}, 0.0, 0.0)
        state.history.append(before)
        state.best = copied(self.network.state_dict())
        if self.settings.ema:
            state.average = copied(self.network.state_dict())
        self.told(before)
        return state

    def _resumed(self) -> State | None:
        state = states.read(self.checkpoint, self.key) if self.checkpoint is not None else None
        if state is None:
            return None
        self.network.load_state_dict(state.network)
        self.objective.maps.load_state_dict(state.maps)
        self.optimiser.load_state_dict(state.optimiser)
        torch.set_rng_state(state.chance[0])
        if len(state.chance) > 1 and self.network.device.type == "cuda":
            torch.cuda.set_rng_state(state.chance[1], self.network.device)
        device = self.network.device
        state.best = {name: tensor.to(device) for name, tensor in state.best.items()}
        if state.average is not None:
            state.average = {name: tensor.to(device) for name, tensor in state.average.items()}
        for epoch in state.history:
            self.told(epoch)
        return state

    def _keep(self, state: State) -> None:
        assert self.checkpoint is not None
        state.network = self.network.state_dict()
        state.maps = self.objective.maps.state_dict()
        state.optimiser = self.optimiser.state_dict()
        state.chance = [torch.get_rng_state()]
        if self.network.device.type == "cuda":
            state.chance.append(torch.cuda.get_rng_state(self.network.device))
        states.save(self.checkpoint, self.key, state)

    # -- one epoch ---------------------------------------------------------------------------------------------------

    def _epoch(self, state: State) -> None:
        start = time.perf_counter()
        number = state.done + 1
        self.network.train()
        size = len(order(self.fit, self.settings, number))
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(taken(self.fit, self.settings, number)):
            together = min(self.settings.accumulate, size - k // self.settings.accumulate * self.settings.accumulate)
            parts = self.objective(batch)
            (parts["loss"] / together).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()
            if (k + 1) % self.settings.accumulate == 0 or k + 1 == size:
                self._step(state)
        means = {name: float(total) / size for name, total in sums.items()}
        sound = all(bool(tensor.isfinite().all()) for tensor in self.network.state_dict().values())
        if not (sound and math.isfinite(means["loss"])):
            raise RuntimeFailure(
                f"the loss or a weight is not finite in epoch {number}: choose a learning rate below "
                f"{self.settings.lr:g} (--lr)."
            )
        state.done = number
        held = copied(self.network.state_dict()) if state.average is not None else None
        if state.average is not None:
            self.network.load_state_dict(state.average)
        loss = means.pop("loss")
        if self.shrinkage is not None:
            means["shrunk"] = self.shrinkage.left()
        rate = float(self.optimiser.param_groups[0]["lr"])
        epoch = self._judged(number, loss, means, rate, time.perf_counter() - start)
        self._compare(state, epoch)
        if held is not None:
            self.network.load_state_dict(held)
        self.told(epoch)

    def _step(self, state: State) -> None:
        scale = factor(state.step, self.total, self.settings)
        rate = self.settings.lr * scale
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.shrinkage is not None:
            self.shrinkage(self.shrinkage.threshold(state.step, self.total, scale, self.factors))
        state.step += 1
        if state.average is not None:
            keep = min(self.settings.ema, (1 + state.step) / (10 + state.step))  # the start is soon forgotten
            with torch.no_grad():
                for name, tensor in self.network.state_dict().items():
                    state.average[name].lerp_(tensor, 1 - keep)
        self.progress("train", state.step, self.total)

    def _compare(self, state: State, epoch: Epoch) -> None:
        """Keep the weights if they are the best so far; without anything to compare the last ones are.

        So are they where units are shrunk: what has not been shrunk is always better.
        """
        best = state.history[state.best_epoch].metric
        last = self.shrinkage is not None or best is None or epoch.metric is None
        if last or (best is not None and epoch.metric is not None and epoch.metric >= best):
            state.best_epoch = epoch.epoch
            state.best = copied(self.network.state_dict())
        state.history.append(epoch)
        state.stopped = epoch.metric is not None and epoch.epoch - state.best_epoch >= self.settings.patience

    def _judged(self, number: int, loss: float, parts: dict[str, float], rate: float, seconds: float) -> Epoch:
        found = Measured() if self.test is None else measured(self.objective, self.test)
        return Epoch(number, loss, parts, found.accuracy, found.distance, rate, seconds, found.nll)


def factor(step: int, total: int, settings: Settings) -> float:
    """By which the learning rate is multiplied in a step: a linear warm-up, then half a cosine down to 0."""
    warm = round(settings.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


@dataclass(frozen=True)
class Measured:
    """How well a model does on samples."""

    accuracy: float | None = None
    distance: float | None = None
    nll: float | None = None
    """Mean cross-entropy of next tokens."""


@torch.no_grad()
def measured(objective: Objective, data: Calibration) -> Measured:
    """Accuracy where there are labels for the only output, cross-entropy of next tokens of a language model without
    labels, and distance to the teacher where there is one."""
    network, teacher = objective.student, objective.teacher
    names = objective.shared or outputs_of(network)
    was = network.training
    network.eval()
    right, far, said, count = 0, 0.0, 0.0, 0
    speaks = objective.language if data.labels is None else None
    for batch in batches(data, objective.settings.batch):
        feeds = tensors(batch, network.device)
        outputs = network(feeds, outputs=names)
        if objective.labelled and batch.labels is not None:
            if not count:
                cross_entropy(outputs, batch.labels)  # says what does not fit
            right += hits(outputs, batch.labels)
        if speaks is not None:
            said += float(speaks.loss(outputs, feeds).sum())
        if teacher is not None and objective.settings.loss != "ce":
            far += float(objective.distance(outputs, teacher(feeds, outputs=names)).sum())
        count += batch.size
    network.train(was)
    distant = teacher is not None and objective.settings.loss != "ce"
    return Measured(
        right / count if objective.labelled else None,
        far / count if distant else None,
        said / count if speaks is not None else None,
    )
