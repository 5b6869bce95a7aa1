"""What a job is asked to do, as data that can be stored and sent: one record per kind.

Fields are the parameters of the function that does the work, with the same names and defaults (None and () stand for
"as the function has it"). Models and files are named by references, which a store turns into files: see
`spa.jobs.store`. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from spa.errors import UsageError
from spa.typed import nearest, read_record

__all__ = [
    "KINDS",
    "BenchmarkSpec",
    "FinetuneSpec",
    "FrontierSpec",
    "InspectSpec",
    "JobSpec",
    "ProfileSpec",
    "PruneSpec",
    "is_reference",
    "read",
    "references",
    "to_json",
]

Provider: TypeAlias = Literal["auto", "cpu", "cuda"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,199}")
_REFERENCE = re.compile(r"(models|datasets|jobs)/[A-Za-z0-9_-]{1,64}(/[^\0]{1,500})?")
_WORDS = ("none", "noise", "bn")
"""What samples may be besides a reference."""


def _given(*words: str) -> Any:
    """A field that names a model or file; `words` may stand there, too."""
    return field(default=None, metadata={"reference": words})


_NEEDED = {"reference": ()}


@dataclass(frozen=True)
class InspectSpec:
    """What can be pruned in a model, what is frozen and why."""

    kind: ClassVar[str] = "inspect"
    model: str = field(metadata=_NEEDED)
    """The model."""
    dims: Mapping[str, int] | None = None
    """Sizes of symbolic axes by name."""
    page: bool = False
    """Also draw what is coupled with what, as a page for a browser."""


@dataclass(frozen=True, kw_only=True)
class _Query:
    """How units are scored, chosen and compensated, on what."""

    method: str | None = None
    """Published method, or `auto`."""
    criterion: str | None = None
    """How units are scored."""
    aggregation: Literal["sum", "mean", "max"] | None = None
    """How the scores of a unit's members are joined."""
    normalisation: Literal["none", "sum", "mean", "max", "gaussian", "isomorphic"] | None = None
    """How scores of different groups are made comparable."""
    allocation: Literal["global", "uniform", "efficient", "knapsack"] | None = None
    """How widths are chosen."""
    compensate: Literal["none", "bias", "obs", "obs-dense", "stitch"] | None = None
    """What is done to the weights that stay."""
    recalibrate: Literal["none", "norm", "auto"] | None = None
    """Re-estimate norm statistics; auto keeps that if it helps."""
    calibration: str | None = _given(*_WORDS)
    """Samples: a dataset, or `none`, `noise` or `bn`, which make inputs up."""
    samples: int | None = None
    """Use only so many samples."""
    batch: int | None = None
    """Samples per run."""
    preprocess: str | None = _given("*")
    """How images become inputs: a preset, key=value pairs, or a dataset that is a JSON file."""
    tokenizer: str | None = _given()
    """Tokenizer for texts: a dataset that is a `tokenizer.json`."""
    max_length: int | None = None
    """Tokens per text."""
    loss: Literal["auto", "ce", "sampled", "gaussian", "lm"] | None = None
    """What gradients are taken of."""
    memory: str | None = None
    """What measurements may take, such as 4GB."""
    provider: Provider | None = None
    """Where samples are run, and latency is measured."""
    latency_table: str | None = _given()
    """Table of operators: a dataset, or the table of a profile job."""
    threads: int | None = None
    """Inside one operator, where latency is measured; 0 is ONNX Runtime's choice."""
    batch_size: int | None = None
    """Of the inputs, where latency is measured."""
    scope: Literal["exact", "all"] | None = None
    """Only units that leave exactly, or also those that meet a statistic."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of units; all if empty."""
    ignore: tuple[str, ...] = ()
    """Shell patterns: groups whose name, tensors or nodes match are left alone."""
    align: str | None = None
    """Units kept per group are a multiple of this; `auto` is what kernels like."""
    min_keep: str | None = None
    """Units kept per group at least: 4, 10%, head=2,channel=8, or auto."""
    seed: int | None = None
    """Of everything random."""
    dims: Mapping[str, int] | None = None
    """Sizes of symbolic axes by name."""
    inputs: str | None = _given()
    """Inputs for verification: a dataset that is an .npz file."""


@dataclass(frozen=True)
class PruneSpec(_Query):
    """Prune a model until it meets its targets, prove that the surgery is exact, and compensate."""

    kind: ClassVar[str] = "prune"
    model: str = field(metadata=_NEEDED)
    """The model."""
    target: tuple[str, ...]
    """At most: macs=0.6 (of the original), params=50%, size=10MB, latency=5ms; all are met."""
    output_name: str = "model.onnx"
    """Name of the file that is written; external data are beside it as `{output_name}.data`."""
    steps: int | None = None
    """Prune in so many steps, and score again after each."""
    check: bool | None = None
    """Verify before anything is written; true if not set."""
    page: bool = False
    """Also write a page about the result, for a browser."""
    evaluate: str | None = _given(*_WORDS)
    """For a target on a metric: samples that nothing is fit on, a dataset; by default a fifth of the calibration's."""
    metric: str | None = None
    """What the target `metric-drop` is about."""
    minimise: Literal["macs", "params", "size", "latency"] | None = None
    """What the smallest model that a metric allows is smallest in."""
    allow_io: tuple[str, ...] = ()
    """Shell patterns: inputs and outputs of the graph whose shapes may change, as those of a KV cache."""


@dataclass(frozen=True)
class FrontierSpec(_Query):
    """A family of pruned models, from large to small, each measured on samples that nothing is fit on."""

    kind: ClassVar[str] = "frontier"
    model: str = field(metadata=_NEEDED)
    """The model."""
    shares: tuple[float, ...] = ()
    """Of the original's cost, one model each; 0.95 to 0.3 in steps of 0.05 if empty."""
    minimise: Literal["macs", "params", "size", "latency"] | None = None
    """What the shares are of."""
    metric: str | None = None
    """What is measured: a metric's name, by default top1 with labels, else divergence."""
    evaluate: str | None = _given(*_WORDS)
    """Samples that nothing is fit on: a dataset; by default a fifth of the calibration's."""
    refit: bool | None = None
    """Refit every model on the pruned prefix before it is measured, which takes minutes."""
    page: bool = False
    """Also write a page about the family, for a browser."""


@dataclass(frozen=True)
class FinetuneSpec:
    """Train what pruning left, alone or towards the model it was made of."""

    kind: ClassVar[str] = "finetune"
    model: str = field(metadata=_NEEDED)
    """The pruned model."""
    data: str = field(metadata={"reference": _WORDS})
    """Samples: a dataset, with labels where there are any."""
    output_name: str = "model.onnx"
    """Name of the file that is written; external data are beside it as `{output_name}.data`."""
    teacher: str | None = _given()
    """The model before pruning."""
    plan: str | None = _given()
    """The plan that made the pruned model: a dataset, or the plan of a prune job."""
    loss: Literal["auto", "ce", "kd", "inner"] | None = None
    """Labels, the teacher's outputs, also its inner activations, or what fits."""
    epochs: int | None = None
    """Passes over the samples."""
    batch: int | None = None
    """Samples per run."""
    lr: float | None = None
    """Learning rate after the warm-up."""
    optimiser: Literal["sgd", "adamw"] | None = None
    """sgd has Nesterov's momentum of 0.9."""
    schedule: Literal["cosine", "constant"] | None = None
    """Of the learning rate, after the warm-up."""
    warmup: float | None = None
    """Share of the steps in which the rate rises."""
    weight_decay: float | None = None
    """Of matrices and kernels."""
    accumulate: int | None = None
    """Batches whose gradients make one step."""
    amp: bool | None = None
    """Run in bfloat16 where that is safe."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is written; 0 for none."""
    held_out: float | None = None
    """Share of the samples to measure on."""
    patience: int | None = None
    """Stop after so many epochs without a better metric."""
    temperature: float | None = None
    """By which scores are divided in kd."""
    alpha: float | None = None
    """Share of kd where it is mixed with cross-entropy."""
    gamma: float | None = None
    """Weight of the inner distance."""
    distance: Literal["auto", "logits", "values"] | None = None
    """How outputs are compared."""
    augment: Literal["flip-crop"] | None = None
    """For images: mirrored and moved at random."""
    freeze: tuple[str, ...] = ()
    """Shell patterns: weights that stay as they are."""
    sparsity: Literal["group-lasso", "growing", "mask"] | None = None
    """Before pruning: shrink whole units."""
    strength: float | None = None
    """Of sparsity."""
    provider: Provider | None = None
    """Where it is trained."""
    seed: int | None = None
    """Of everything random."""
    samples: int | None = None
    """Use only so many samples."""
    preprocess: str | None = _given("*")
    """How images become inputs: a preset, key=value pairs, or a dataset that is a JSON file."""
    tokenizer: str | None = _given()
    """Tokenizer for texts: a dataset that is a `tokenizer.json`."""
    max_length: int | None = None
    """Tokens per text."""
    dims: Mapping[str, int] | None = None
    """Sizes of symbolic axes by name."""


@dataclass(frozen=True)
class ProfileSpec:
    """Measure a model's operators at many widths, on the machine where the job runs."""

    kind: ClassVar[str] = "profile"
    model: str = field(metadata=_NEEDED)
    """The model."""
    provider: Literal["cpu", "cuda"] | None = None
    """Where to run."""
    threads: int | None = None
    """Inside one operator; 0 is ONNX Runtime's choice."""
    batch: int | None = None
    """Size of axis 0 of the inputs, where it is open."""
    models: int | None = None
    """Models with random widths that are measured."""
    passes: int | None = None
    """How often each is measured."""
    seconds: float | None = None
    """Of running each of them in one pass."""
    dims: Mapping[str, int] | None = None
    """Sizes of symbolic axes by name."""
    inputs: str | None = _given()
    """Inputs: a dataset that is an .npz file."""


@dataclass(frozen=True)
class BenchmarkSpec:
    """Latency, throughput and memory of models in ONNX Runtime, each against the first, on the machine of the job."""

    kind: ClassVar[str] = "benchmark"
    models: tuple[str, ...] = field(metadata=_NEEDED)
    """The models; the first is what others are compared with."""
    provider: Provider | None = None
    """Where to run; auto takes CUDA if it works."""
    threads: int | None = None
    """Inside one operator; 0 is ONNX Runtime's choice."""
    batch: int | None = None
    """Size of axis 0 of the inputs, where it is open."""
    repeats: int | None = None
    """Rounds at most."""
    warmup: int | None = None
    """Untimed runs of each model."""
    seconds: float | None = None
    """Stop after about this time."""
    seed: int | None = None
    """Of everything random."""
    memory: bool | None = None
    """Also measure memory, each model in its own process; true if not set."""
    dims: Mapping[str, int] | None = None
    """Sizes of symbolic axes by name."""
    inputs: str | None = _given()
    """Inputs: a dataset that is an .npz file."""


JobSpec: TypeAlias = InspectSpec | PruneSpec | FrontierSpec | FinetuneSpec | ProfileSpec | BenchmarkSpec
KINDS: Mapping[str, type[JobSpec]] = {
    kind.kind: kind for kind in (InspectSpec, PruneSpec, FrontierSpec, FinetuneSpec, ProfileSpec, BenchmarkSpec)
}


def read(given: object) -> JobSpec:
    """A spec from JSON: `kind`, and the fields of that kind.

    Raises:
        UsageError: an unknown kind or field, a value of another type, or one that is no reference where one must be.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise UsageError(f"a job needs `kind`: one of {', '.join(KINDS)}")
    if given["kind"] not in KINDS:
        raise UsageError(f"kind: {given['kind']!r} is unknown{nearest(given['kind'], KINDS)}")
    spec = read_record(KINDS[given["kind"]], {k: v for k, v in given.items() if k != "kind"}, given["kind"])
    _check(spec)
    return spec


def to_json(spec: JobSpec) -> dict[str, Any]:
    """What `read` reads: `kind`, and the fields that differ from their defaults."""
    out: dict[str, Any] = {"kind": spec.kind}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if value != item.default:
            out[item.name] = list(value) if isinstance(value, tuple) else value
    return out


def is_reference(text: str) -> bool:
    """Whether a text names a model, a dataset or a file of a job."""
    return _REFERENCE.fullmatch(text) is not None


def references(spec: JobSpec, *, local: bool = False) -> Iterator[tuple[str, str]]:
    """Fields that name models or files, and what they name: (field, reference).

    Args:
        spec: what to look at.
        local: what is named may be local files, so that also texts count that are no references.
    """
    for item in dataclasses.fields(spec):
        if "reference" in item.metadata and (value := getattr(spec, item.name)) is not None:
            words = item.metadata["reference"]
            for one in value if isinstance(value, tuple) else (value,):
                if one not in words and (local or "*" not in words or is_reference(one)):
                    yield item.name, one


def _check(spec: JobSpec) -> None:
    for name, reference in references(spec):
        if not is_reference(reference):
            raise UsageError(f"{name}: {reference!r} is no reference; name models/ID, datasets/ID or jobs/ID/FILE")
    preprocess = getattr(spec, "preprocess", None)
    if preprocess is not None and not is_reference(preprocess) and re.search(r"[/\\]|\.json$", preprocess):
        raise UsageError(f"preprocess: {preprocess!r} looks like a file; name a dataset, a preset or key=value pairs")
    name = getattr(spec, "output_name", "model.onnx")
    if not _NAME.fullmatch(name) or name in ("plan.json", "report.json", "page.html"):
        raise UsageError(f"output_name: {name!r} must be a plain file name such as small.onnx")
    if isinstance(spec, PruneSpec) and not spec.target:
        raise UsageError("target: name one at least, such as macs=0.6")
    align = getattr(spec, "align", None) or "auto"
    if align != "auto" and not align.isdecimal():
        raise UsageError(f"align: cannot read {align!r}; write auto or a number such as 8")
    if isinstance(spec, BenchmarkSpec) and not spec.models:
        raise UsageError("models: name one at least")
