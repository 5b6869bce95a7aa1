"""spa finetune: train what pruning left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spa.cli import output
from spa.cli.options import (
    Dims,
    Json,
    MaxLength,
    Output,
    Preprocess,
    Samples,
    Seed,
    Tokenizer,
    Verbose,
    check_output,
    read_dims,
    read_list,
)

if TYPE_CHECKING:
    from spa.progress import Progress
    from spa.train import Epoch, Result

_SHOWN = 20
"""Epochs without --verbose."""


def finetune(
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="ONNX file to train.", show_default=False)],
    out: Output,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="Samples: .npz (with `labels`), folder of images, .jsonl or .txt.", show_default=False
        ),
    ],
    teacher: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The model before pruning, for kd and inner.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN.json",
            help="Plan that made PRUNED of the teacher: matches layers, and is checked; of --sparsity: will prune it.",
        ),
    ] = None,
    loss: Annotated[
        Literal["auto", "ce", "kd", "inner"],
        typer.Option(
            help="Labels (ce), the teacher's outputs (kd), also its inner activations (inner); auto: inner with a "
            "teacher, ce without."
        ),
    ] = "auto",
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the samples.", min=1)] = 10,
    batch: Annotated[int, typer.Option(metavar="N", help="Samples per run.", min=1)] = 64,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="Learning rate.", show_default="0.005 sgd, 0.0005 adamw")
    ] = None,
    optimiser: Annotated[Literal["sgd", "adamw"], typer.Option(help="sgd has Nesterov's momentum of 0.9.")] = "sgd",
    schedule: Annotated[
        Literal["cosine", "constant"], typer.Option(help="Of the learning rate, after the warm-up.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(metavar="SHARE", help="Share of the steps in which the rate rises.")] = 0.05,
    weight_decay: Annotated[
        float | None,
        typer.Option(metavar="X", help="Of matrices and kernels.", show_default="0.0005 sgd, 0.01 adamw"),
    ] = None,
    accumulate: Annotated[int, typer.Option(metavar="N", help="Batches whose gradients make one step.", min=1)] = 1,
    amp: Annotated[bool, typer.Option("--amp", help="Run in bfloat16 where that is safe.")] = False,
    ema: Annotated[
        float, typer.Option(metavar="DECAY", help="Write a moving average of the weights, e.g. 0.999.")
    ] = 0.0,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the samples to measure on; the best epoch is written.")
    ] = 0.1,
    patience: Annotated[
        int, typer.Option(metavar="N", help="Stop after so many epochs without a better metric.", min=1)
    ] = 10,
    temperature: Annotated[float, typer.Option(metavar="T", help="By which scores are divided in kd.")] = 4.0,
    alpha: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of kd where it is mixed with cross-entropy.")
    ] = 0.9,
    gamma: Annotated[float, typer.Option(metavar="X", help="Weight of the inner distance.")] = 1.0,
    distance: Annotated[
        Literal["auto", "logits", "values"],
        typer.Option(help="How outputs are compared: KL divergence of logits, or squared error of values."),
    ] = "auto",
    augment: Annotated[
        Literal["flip-crop"] | None, typer.Option(help="For images: mirrored and moved at random.", show_default=False)
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Weights that stay as they are; repeatable.")
    ] = None,
    sparsity: Annotated[
        Literal["group-lasso", "growing", "mask"] | None,
        typer.Option(
            help="Before pruning: shrink whole units; all (group-lasso), or those that --plan removes (growing, mask).",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Of --sparsity; at 1 units that nothing holds vanish.", show_default="1.5, group-lasso 1"
        ),
    ] = None,
    provider: Annotated[Literal["cpu", "cuda", "auto"], typer.Option(help="Where it is trained.")] = "cpu",
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state of the run there; after a kill the same command goes on."),
    ] = None,
    samples: Samples = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a pruned model, alone or towards the model it was made of, and write the weights into the same graph."""
    from spa.train import finetune as run

    check_output(pruned, out, teacher, plan, Path(data) if Path(data).is_file() else None)
    shown = _Shown(epochs)
    with output.stages(quiet=json) as progress:
        result = run(
            pruned,
            data=data,
            output=out,
            teacher=teacher,
            plan=plan,
            loss=loss,
            epochs=epochs,
            batch=batch,
            lr=lr,
            optimiser=optimiser,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            accumulate=accumulate,
            amp=amp,
            ema=ema,
            held_out=held_out,
            patience=patience,
            temperature=temperature,
            alpha=alpha,
            gamma=gamma,
            distance=distance,
            augment=augment,
            freeze=read_list(freeze),
            sparsity=sparsity,
            strength=strength,
            provider=provider,
            checkpoint=checkpoint,
            seed=seed,
            samples=samples,
            preprocess=preprocess,
            tokenizer=tokenizer,
            max_length=max_length,
            dims=read_dims(dim),
            progress=shown.over(progress),
            told=shown.epoch,
        )
    if json:
        output.emit(result.to_json())
    else:
        _show(result, verbose)


class _Shown:
    """Progress with the loss and the metric of the last epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.text = "training"

    def epoch(self, epoch: Epoch) -> None:
        """Remember what an epoch did."""
        parts = [f"loss {epoch.loss:.4g}"] if epoch.epoch else []
        self.text = f"training (epoch {epoch.epoch} of {self.epochs}: {', '.join([*parts, *_metrics(epoch)])})"

    def over(self, progress: Progress) -> Progress:
        """A callback that says so."""

        def tell(stage: str, done: int, total: int) -> None:
            words = {"train": self.text, "match": "matching layers", "verify": "verifying against the torch executor"}
            progress(words.get(stage, stage), done, total)

        return tell


def _metrics(epoch: Epoch) -> list[str]:
    out = [] if epoch.accuracy is None else [f"accuracy {100 * epoch.accuracy:.1f} %"]
    out += [] if epoch.nll is None else [f"next-token loss {epoch.nll:.4g}"]
    return out if epoch.distance is None else [*out, f"distance {epoch.distance:.4g}"]


def _show(result: Result, verbose: bool) -> None:
    screen = output.console()
    names = [n for n in ("ce", "kd", "inner", "shrunk") if n in result.history[-1].parts]
    metric = "nll" if result.metric == "nll" else "accuracy"
    columns = ("epoch", "loss", *(names if len(names) > 1 else ()), metric, "distance", "seconds")
    rows = [_row(e, names if len(names) > 1 else []) for e in result.history]
    shown = rows if verbose else [rows[0], *rows[1:][-_SHOWN:]]
    screen.print(output.table(columns, shown, right=columns))
    if len(shown) < len(rows):
        screen.print(f"the last {_SHOWN} epochs; --verbose lists all")
    samples = f"{result.samples} samples trained on, {result.held_out} held out"
    screen.print(samples + (f"; {len(result.matched)} blocks matched" if result.matched else ""))
    if result.metric is not None:
        screen.print(_told(result))
    if result.penalised is not None:
        screen.print(f"{result.gone} of {result.penalised} penalised units are gone: pruning those changes nothing")
    screen.print(
        f"proof: ONNX Runtime computes what was trained: max relative error {result.verify.max_rel_error:.1e} "
        f"(accepted: {result.verify.tolerance:.0e})"
    )
    screen.print(f"wrote {result.output}, the weights of epoch {result.best_epoch}", soft_wrap=True)


def _told(result: Result) -> str:
    assert result.before is not None
    assert result.after is not None
    if result.metric == "nll":
        return f"cross-entropy of next tokens, held out: {result.before:.4g} -> {result.after:.4g} nats"
    if result.metric == "distance":
        return f"distance to the teacher, held out: {result.before:.4g} -> {result.after:.4g}"
    teacher = "" if result.teacher is None else f" (teacher: {100 * result.teacher:.1f} %)"
    return f"accuracy, held out: {100 * result.before:.1f} % -> {100 * result.after:.1f} %{teacher}"


def _row(epoch: Epoch, names: list[str]) -> tuple[str, ...]:
    parts = [f"{epoch.parts[n]:.4g}" if n in epoch.parts else "-" for n in names]
    accuracy = "-" if epoch.accuracy is None else f"{100 * epoch.accuracy:.1f} %"
    accuracy = accuracy if epoch.nll is None else f"{epoch.nll:.4g}"
    distance = "-" if epoch.distance is None else f"{epoch.distance:.4g}"
    loss = f"{epoch.loss:.4g}" if epoch.epoch else "-"
    return (str(epoch.epoch), loss, *parts, accuracy, distance, f"{epoch.seconds:.1f}")
