"""`finetune`: read, match, train, write back, verify, write."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from spa.calibration import Calibration, load_calibration
from spa.errors import UsageError
from spa.graph import Graph, Source, load, restore
from spa.interpreter import Interpreter, untie_if_merged
from spa.interpreter.outputs import is_scores
from spa.options import check_output
from spa.plan import Plan
from spa.plan import read as read_plan
from spa.progress import Progress, silent
from spa.train.loop import Loop, measured
from spa.train.matching import pairs
from spa.train.objective import Maps, Objective, comparable, language, outputs_of, shared_outputs, tensors
from spa.train.samples import batches, check_augment, held_out
from spa.train.settings import Settings, settled
from spa.train.sparsity import Shrinkage, penalised
from spa.train.state import Epoch, copied, prepare
from spa.train.writing import write_back, written
from spa.verify import Verification
from spa.version import __version__

_CHECKED = 8
"""Samples on which ONNX Runtime is compared with the torch executor."""
_PROBED = 64
"""Samples that maps start from, and that show which activations can be compared."""


@dataclass(frozen=True)
class Result:
    """A fine-tuned model and how it came about."""

    model: Any
    """The model, of the same kind as the source; None if it was written to a file."""
    output: Path | None
    """Where it was written."""
    settings: Settings
    """What was used, defaults filled in."""
    history: tuple[Epoch, ...]
    """One entry per epoch; the first is the model before training."""
    best_epoch: int
    """The epoch whose weights were written: the one with the best metric, the last one where nothing was held out."""
    metric: str | None
    """What was measured on the held-out samples: `accuracy`, `nll` (cross-entropy of next tokens), `distance` (to the
    teacher), or None."""
    before: float | None
    """That metric of the model as it was given."""
    after: float | None
    """That of the model that was written."""
    teacher: float | None
    """The teacher's accuracy on the same samples; None without teacher or labels."""
    matched: tuple[str, ...]
    """Activations that were compared with the teacher's."""
    gone: int | None
    """Units that `sparsity` shrank to nothing; None without it."""
    penalised: int | None
    """Units that it shrank."""
    samples: int
    """Trained on."""
    held_out: int
    """Measured on."""
    verify: Verification
    """ONNX Runtime's outputs of the written model against those of the torch executor."""

    def to_json(self) -> dict[str, Any]:
        """As `spa finetune --json` prints it."""
        body = {k: v for k, v in vars(self).items() if k not in ("model", "output", "settings", "history", "verify")}
        history = [asdict(epoch) for epoch in self.history]
        return {
            **body,
            "settings": asdict(self.settings),
            "history": history,
            "verify": asdict(self.verify),
            "output": None if self.output is None else str(self.output),
        }


def finetune(
    pruned: Source,
    *,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    teacher: Source | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    loss: str = "auto",
    epochs: int = 10,
    batch: int = 64,
    lr: float | None = None,
    optimiser: str = "sgd",
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float | None = None,
    accumulate: int = 1,
    amp: bool = False,
    ema: float = 0.0,
    held_out: float = 0.1,
    patience: int = 10,
    temperature: float = 4.0,
    alpha: float = 0.9,
    gamma: float = 1.0,
    distance: str = "auto",
    augment: str | None = None,
    freeze: str | Sequence[str] = (),
    sparsity: str | None = None,
    strength: float | None = None,
    provider: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    samples: int | None = None,
    preprocess: Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress = silent,
    told: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train a (pruned) model's weights and statistics, and write them back into the same graph.

    Args:
        pruned: path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`; it is not changed.
        data: samples, see `spa.load_calibration`; with `labels` where there are any.
        output: file to write; without it `Result.model` holds the model, of the same kind as `pruned`.
        teacher: the model before pruning.
        plan: the plan that made `pruned` of `teacher`; which layers belong together is then known and checked, and
            otherwise told by names.
        loss: `ce` cross-entropy with the labels; `kd` distance to the teacher's outputs, mixed with `ce` where there
            are labels; `inner` the same and the distance of inner activations; `auto` is `inner` with a teacher and
            `ce` without.
        epochs: passes over the samples.
        batch: samples per pass through the network; the graph's own batch size where it fixes one.
        lr: learning rate after the warm-up; 5e-3 for sgd and 5e-4 for adamw by default.
        optimiser: `sgd` (momentum 0.9, Nesterov) or `adamw`.
        schedule: `cosine` down to 0, or `constant`.
        warmup: share of all steps in which the rate rises linearly.
        weight_decay: of weights with two axes or more; 5e-4 for sgd and 0.01 for adamw by default.
        accumulate: batches whose gradients are averaged in one step.
        amp: run in bfloat16 where torch's autocast does; weights stay as they are.
        ema: decay of a moving average of the weights per step, which then is measured and written; 0 for none.
        held_out: share of the samples that is not trained on but measured after each epoch; 0 for none.
        patience: stop after so many epochs without a better metric.
        temperature: by which scores are divided in `kd`.
        alpha: share of the distance in its mix with cross-entropy.
        gamma: weight of the inner distance.
        distance: whether outputs are `logits` (KL divergence) or `values` (squared error); `auto`: logits if named
            so, or if it is the only output, a matrix or of three axes, and not called an embedding.
        augment: `flip-crop` for images: mirrored or not, and moved by up to an eighth of their size.
        freeze: shell patterns; weights of these names stay as they are.
        sparsity: shrink coupled slices of units before they are pruned: `group-lasso` of all units, `mask` or `growing`
            of those that `plan` (which then is that of the model itself) will remove; see `spa.train.sparsity`.
        strength: of that; from 1 on a unit of `mask` or `growing` that no gradient holds is gone at the end. 1.5 for
            these by default, 1 for `group-lasso`.
        provider: where it is trained: `cpu`, `cuda`, or `auto`.
        checkpoint: folder that keeps the state after each epoch; a run that was killed goes on from there, and ends as
            if it had not been (bit for bit on the CPU with as many threads).
        seed: of order, augmentation, dropout and the choice of samples.
        samples, preprocess, tokenizer, max_length, dims: how data become samples, see `spa.load_calibration`.
        progress: called with (stage, done, total), see `spa.progress`; stages `load`, `calibrate`, `match`, `train`
            (in steps), `verify`, `save`.
        told: called after each epoch, for epoch 0 with the metric before training.

    Raises:
        UsageError: an option is wrong, samples do not fit the model, the teacher is of another task, the checkpoint of
            another run, or torch is missing.
        ModelError, UnsupportedModelError: a model cannot be read, or not be differentiated.
        PlanError: the plan belongs to other models.
        RuntimeFailure: the loss becomes infinite, or a model does not run.
        VerifyError: ONNX Runtime computes something else from the written weights; nothing is written.
        OutputError: model or checkpoint cannot be written.
    """
    settings = settled(
        loss=loss,
        teacher=teacher is not None,
        optimiser=optimiser,
        schedule=schedule,
        distance=distance,
        augment=augment,
        lr=lr,
        weight_decay=weight_decay,
        freeze=freeze,
        sparsity=sparsity,
        strength=strength,
        plan=plan is not None,
        epochs=epochs,
        batch=batch,
        warmup=warmup,
        accumulate=accumulate,
        amp=amp,
        ema=ema,
        held_out=held_out,
        patience=patience,
        temperature=temperature,
        alpha=alpha,
        gamma=gamma,
        seed=seed,
    )
    if plan is not None and teacher is None and sparsity is None:
        raise UsageError("--plan says how the model was made of another one: give that as --teacher MODEL.")
    device = _device(provider)
    check_output(output)
    if checkpoint is not None:
        prepare(Path(checkpoint))
    progress("load", 0, 1)
    graph = load(pruned)
    dense = load(teacher) if teacher is not None else None
    progress("calibrate", 0, 1)
    read = load_calibration(
        data,
        graph.model,
        samples=samples,
        seed=seed,
        preprocess=preprocess,
        tokenizer=tokenizer,
        max_length=max_length,
        dims=dims,
    )
    check_augment(read, settings)
    job = _Job(graph, dense, read, settings, device)
    made, label = (plan, "the plan") if isinstance(plan, Plan) or plan is None else (read_plan(Path(plan)), str(plan))
    key = job.key(made)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        progress("match", 0, 1)
        shrunk = penalised(graph, made, label, settings.sparsity) if settings.sparsity is not None else None
        objective, fit, test = job.objective(None if shrunk is not None else made, label)
        folder = None if checkpoint is None else Path(checkpoint)
        shrinkage = Shrinkage(objective.student, *shrunk, settings) if shrunk is not None else None
        loop = Loop(objective, fit, test, folder, key, progress, told, shrinkage)
        state = loop.run()
        best = None
        if test is not None and objective.teacher is not None and objective.labelled:
            twin = replace(objective, student=objective.teacher, settings=replace(settings, loss="ce"))
            best = measured(twin, test).accuracy
        gone = None if shrinkage is None else shrinkage.gone()
    write_back(graph.model, objective.student)
    path = None if output is None else Path(output)
    some = next(iter(batches(read, _CHECKED))).feeds
    verification = written(graph, objective.student, lambda _: some, path, progress)
    first, last = state.history[0], state.history[state.best_epoch]
    name = next((n for n in ("accuracy", "nll", "distance") if getattr(last, n) is not None), None)
    return Result(
        model=restore(graph, graph.model) if path is None else None,
        output=path,
        settings=settings,
        history=tuple(state.history),
        best_epoch=state.best_epoch,
        metric=name,
        before=None if name is None else getattr(first, name),
        after=None if name is None else getattr(last, name),
        teacher=best,
        matched=tuple(i.mine for i in objective.inner),
        gone=None if gone is None else gone[0],
        penalised=None if gone is None else gone[1],
        samples=fit.samples,
        held_out=0 if test is None else test.samples,
        verify=verification,
    )


def _device(provider: str) -> torch.device:
    if provider not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--provider: unknown choice {provider!r}; choose one of auto, cpu, cuda.")
    works = provider != "cpu" and torch.cuda.is_available()
    if provider == "cuda" and not works:
        raise UsageError("--provider cuda: torch finds no GPU here; use cpu or auto, or install torch for CUDA.")
    return torch.device("cuda", torch.cuda.current_device()) if works else torch.device("cpu")


# -- setting up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    graph: Graph
    dense: Graph | None
    data: Calibration
    settings: Settings
    device: torch.device

    def key(self, plan: Plan | None) -> str:
        """sha256 of everything that the trained weights depend on."""
        parts = [
            __version__,
            self.graph.sha256,
            None if self.dense is None else self.dense.sha256,
            None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest(),
            self.data.digest,
            asdict(self.settings),
            self.device.type,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def objective(self, plan: Plan | None, label: str) -> tuple[Objective, Calibration, Calibration | None]:
        """What is minimised, the samples to train on and those held out."""
        fit, test = held_out(self.data, self.settings.held_out)
        matched = []
        if self.dense is not None and self.settings.loss == "inner":
            matched = pairs(self.graph, self.dense, plan, label)  # before vectors are untied, which the plan knows not
        untie_if_merged(self.graph.model)
        student = self._network(self.graph.model)
        for name, weight in student.weights.items():
            weight.requires_grad_(not any(fnmatch.fnmatchcase(name, p) for p in self.settings.freeze))
        if not any(p.requires_grad for p in student.parameters()):
            why = "--freeze leaves none of its weights" if student.weights else "it has no floating-point weights"
            raise UsageError(f"there is nothing to train in this model: {why}.")
        teacher = None if self.dense is None else self._network(self.dense.model).requires_grad_(False)
        probe = next(iter(batches(fit, _PROBED)))
        feeds = tensors(probe, self.device)
        with torch.no_grad():
            mine = student(feeds, outputs=[*outputs_of(student), *dict.fromkeys(m for m, _ in matched)])
        outputs = {n: mine[n] for n in outputs_of(student)}
        if not outputs:
            raise UsageError("the model has no floating-point output to train.")
        labelled = self.data.labels is not None and self._are_scores(outputs)
        speaks = None if self.data.labels is not None else language(student, feeds, outputs)
        if self.settings.loss == "ce" and self.data.labels is None and speaks is None:
            raise UsageError(
                f"--loss ce needs labels with the samples ({self.data.name} has none): an array `labels` in the .npz "
                "file; or train towards a teacher with --teacher MODEL (next tokens are labels of causal models only)."
            )
        objective = Objective(student, teacher, self.settings, labelled, language=speaks)
        if teacher is None:
            return objective, fit, test
        _same_inputs(student, teacher)
        with torch.no_grad():
            theirs = teacher(feeds, outputs=[*outputs_of(teacher), *dict.fromkeys(t for _, t in matched)])
        shared = shared_outputs(outputs, {n: theirs[n] for n in outputs_of(teacher)})
        inner = comparable(matched, mine, theirs)
        if self.settings.loss == "inner" and not inner:
            raise UsageError("--loss inner finds no block whose output exists in both models: use --loss kd.")
        maps = Maps(inner).to(self.device)
        if any(item.axis is not None for item in inner):
            seen = _as_trained(student, feeds, [item.mine for item in inner])
            for item in inner:
                maps.fit(item, seen[item.mine].float(), theirs[item.theirs].float())
        return replace(objective, inner=inner, maps=maps, shared=shared), fit, test

    def _are_scores(self, outputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether labels can be labels of the outputs."""
        name, y = next(iter(outputs.items()))
        chosen = self.settings.loss == "ce" or is_scores(name, y, 1, self.settings.distance)
        return len(outputs) == 1 and y.dim() == 2 and chosen

    def _network(self, model: ir.Model) -> Interpreter:
        network = Interpreter(model).eval().to(self.device)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
            network = network.to(torch.float32)  # steps of training are below what halves can hold
        return network


@torch.no_grad()
def _as_trained(network: Interpreter, feeds: Mapping[str, torch.Tensor], names: Sequence[str]) -> Mapping[str, Any]:
    """Values in train mode, with the statistics of this batch; the network is left as it was."""
    kept = copied(network.state_dict())
    found: Mapping[str, Any] = network.train()(feeds, outputs=names)
    network.eval().load_state_dict(kept)
    return found


def _same_inputs(student: Interpreter, teacher: Interpreter) -> None:
    if set(student.inputs) != set(teacher.inputs):
        raise UsageError(
            f"the teacher has the inputs {', '.join(teacher.inputs)} and the model {', '.join(student.inputs)}: "
            "give the model that was pruned as --teacher."
        )
