"""Load, choose, split, prove, write: `spa.implant`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.budget.queues import Align
from spa.cache import Cache
from spa.calibration import Calibration, load_calibration
from spa.criteria import CRITERIA, Aggregation, Normalisation, normalise
from spa.errors import PlanError, TargetError, UsageError
from spa.evidence import Evidence, Vector
from spa.executors.collect import Setup
from spa.gradients import Gradients
from spa.graph import Graph, Source, load
from spa.groups import Analysis
from spa.implant.candidates import Candidate, candidates
from spa.implant.job import Job
from spa.implant.make import Implanted, Report, finish
from spa.implant.proof import kernels_in, proof
from spa.implant.record import Place, Record, read
from spa.implant.select import choose_units
from spa.implant.weights import WEIGHTS, Weights
from spa.measured import Measured
from spa.methods import Method, resolve
from spa.options import check_output, choose, parse_memory
from spa.pipeline import analyze
from spa.plan import Plan
from spa.plan import read as read_plan
from spa.progress import Progress, silent
from spa.removal import kept_by, removals
from spa.runtime import Provider
from spa.verify import Verification
from spa.version import __version__

__all__ = ["Implanted", "Report", "apply", "implant", "verify"]


def implant(
    source: Source,
    *,
    share: float,
    output: str | os.PathLike[str] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    method: str | None = None,
    criterion: str | None = None,
    aggregation: Aggregation | None = None,
    normalisation: Normalisation | None = None,
    weights: Weights = "auto",
    calibration: Any = None,
    samples: int | None = None,
    batch: int = 32,
    preprocess: Any = None,
    loss: Any = "auto",
    memory: str | int = "4GB",
    provider: Provider = "cpu",
    cache: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    align: Align = "auto",
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> Implanted:
    """Let channels of k x k convolutions be computed by 1 x 1 convolutions, prove that the surgery is exact, write it.

    Source: the neural implant of HAP (arXiv 2101.08940, section 3.3).

    Args:
        source: path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`; it is not changed.
        share: how many channels, of those that can: of all (the least important), or, with a plan, of those that it
            removes (the most important, which then stay as implants; the others leave).
        output: file to write; without it `Implanted.model` holds the model, of the same kind as `source`.
        plan: what `spa.prune` of the same model decided.
        method: name in `spa.METHODS`, for its criterion; by default the plan's, else l2 norms.
        criterion: name in `spa.CRITERIA`; this and the next two override a part of the method.
        aggregation: how the scores of a unit's members are joined.
        normalisation: how scores of different groups are made comparable.
        weights: of the implants: `fit` to the outputs on samples, the `sum` of the taps, the `centre` of the kernel,
            `zero`; `auto` is `fit` with samples, else `sum`.
        calibration: samples: see `spa.load_calibration`.
        samples: use only so many of them.
        batch: samples per run.
        preprocess: how images become inputs, see `spa.load_calibration`.
        loss: for criteria that need gradients.
        memory: what measurements and activations may take, such as `4GB`.
        provider: where samples are run: `cpu`, `cuda`, or `auto`.
        cache: folder in which measurements are kept; None keeps nothing.
        ignore: shell patterns; groups whose name, tensors or nodes match are left alone.
        align: implants per group are a multiple of this.
        seed: of random scores, of the choice of samples and of the inputs used for verification.
        dims: sizes of symbolic axes by name, for costs and verification.
        inputs: `.npz` with one array per graph input, for verification instead of synthetic inputs.
        check: verify before anything is written.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an option is wrong, or samples do not fit the model.
        ModelError: the model cannot be read.
        PlanError: the plan is malformed or belongs to another model.
        TargetError: no convolution can hold implants, or the share is too small.
        VerifyError: the result differs from its reference; nothing is written.
        RuntimeFailure: the model does not run, so that it cannot be verified or measured.
        OutputError: the result cannot be written.
    """
    if not 0 < share <= 1:
        raise UsageError(f"--share: {share:g} is no share; write a number above 0 and at most 1, such as 0.1")
    if weights not in WEIGHTS:
        raise UsageError(f"--weights: unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}")
    given, label = (plan, "the plan") if plan is None or isinstance(plan, Plan) else (read_plan(Path(plan)), str(plan))
    chosen = _method(given, method, criterion, aggregation, normalisation)
    needs = chosen.criterion if CRITERIA[chosen.criterion].needs != "weights" else "--weights fit"
    if calibration is None and (weights == "fit" or needs != "--weights fit"):
        raise UsageError(
            f"{needs} needs samples of the inputs: give --calibration PATH, or --calibration none to make them up"
        )
    check_output(output)
    setup = Setup(batch, parse_memory(memory), provider)
    progress("load", 0, 1)
    graph = load(source)
    progress("analyze", 0, 1)
    analysis = analyze(graph, dims=dims)
    kept = None
    if given is not None:
        _belongs(graph, given.sha256, label)
        kept = kept_by(analysis, given, label)
    data = None
    if calibration is not None:
        data = load_calibration(calibration, graph.model, samples=samples, seed=seed, preprocess=preprocess, dims=dims)
    found, refused = candidates(analysis, choose(analysis, "exact", (), ignore))
    leaving = None
    if kept is not None:
        leaving = {c.group.name: np.asarray(~kept[c.group.positions].any(axis=1)) for c in found}
        found = [c for c in found if leaving[c.group.name].any()]
    if not found:
        raise TargetError(_nothing(refused, given is not None))
    progress("score", 0, 1)
    store = Cache(None if cache is None else Path(cache), graph.sha256)
    scores = _scores(analysis, found, chosen, data, setup, store, seed, loss, progress)
    picked = choose_units(found, scores, share, align, leaving)
    places = tuple(
        Place(holder.name, tuple(np.sort(c.channels[units]).tolist())) for c, units in picked for holder in c.holders
    )
    if kept is not None:
        for c, units in picked:
            kept[c.group.positions[units].reshape(-1)] = True
    used: Weights = ("fit" if data is not None else "sum") if weights == "auto" else weights
    settings = {
        "share": share,
        "method": chosen.name,
        "criterion": chosen.criterion,
        "weights": used,
        "calibration": None if data is None else {"name": data.name, "samples": data.samples, "sha256": data.digest},
        "ignore": list(ignore),
        "align": align,
        "seed": seed,
    }
    left = () if kept is None else removals(analysis, kept)
    record = Record(graph.sha256, places, left, settings, f"spa {__version__}")
    job = Job(graph, analysis, kept, record, dims, inputs, seed, progress)
    return finish(job, used, data, setup, check=check, output=output, refused=refused)


def apply(
    source: Source,
    record: Record | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> Implanted:
    """Make the same implants again; weights that were fit to samples are the sums of the taps instead.

    Raises:
        PlanError: the record is malformed or belongs to another model.
        ModelError, OutputError, VerifyError, RuntimeFailure: as `implant`.
    """
    record, label = (record, "the record") if isinstance(record, Record) else (read(record), str(record))
    check_output(output)
    graph = load(source)
    _belongs(graph, record.sha256, label)
    analysis = analyze(graph, dims=dims)
    kept = kept_by(analysis, record.plan, label) if record.removed else None
    how = record.settings.get("weights")
    used: Weights = how if how in ("centre", "zero") else "sum"
    job = Job(graph, analysis, kept, record, dims, inputs, 0, progress, label)
    return finish(job, used, None, Setup(), check=check, output=output, refused={})


def verify(
    source: Source,
    implanted: Source,
    record: Record | str | os.PathLike[str],
    *,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare a model with implants with the original whose kernels are zero around the implants' own weights.

    The implants' weights are read from the file; all others must be the original's.

    Raises:
        PlanError: the record is malformed or belongs to another model, or the model has not these implants.
        ModelError: one of the models cannot be read.
        RuntimeFailure: one of the models does not run.
    """
    record, label = (record, "the record") if isinstance(record, Record) else (read(record), str(record))
    graph = load(source)
    _belongs(graph, record.sha256, label)
    analysis = analyze(graph, dims=dims)
    kept = kept_by(analysis, record.plan, label) if record.removed else None
    model = load(implanted).model
    job = Job(graph, analysis, kept, record, dims, inputs, seed, silent, label)
    return proof(job, kernels_in(job, model), model)


# -- parts -------------------------------------------------------------------------------------------------------------


def _method(plan: Plan | None, name: str | None, *parts: str | None) -> Method:
    keys = ("criterion", "aggregation", "normalisation")
    given = dict(zip(keys, parts, strict=True))
    if plan is not None and name is None and given["criterion"] is None:
        known = {k: plan.settings.get(k) for k in keys}
        given = {k: v if v is not None else known[k] for k, v in given.items()}
    found = resolve(name, **given)
    if len(found) > 1:
        raise UsageError("--method auto is about whole methods; name one, or a --criterion")
    return found[0]


def _belongs(graph: Graph, sha256: str, label: str) -> None:
    if sha256 != graph.sha256:
        raise PlanError(
            f"{label} belongs to another model (sha256 {sha256[:12]}..., this one is {graph.sha256[:12]}...); "
            "use the model it was made for, or make it anew"
        )


def _nothing(refused: Mapping[str, str], planned: bool) -> str:
    if planned:
        return "the plan removes no channel that a 1 x 1 convolution could compute: prune channels of convolutions"
    if not refused:
        return "this model has no convolution with a kernel larger than 1 x 1: there is nothing to implant"
    name, why = next(iter(refused.items()))
    return f"none of the {len(refused)} convolutions with larger kernels can hold implants: of {name!r} {why}"


def _scores(
    analysis: Analysis,
    found: Sequence[Candidate],
    method: Method,
    data: Calibration | None,
    setup: Setup,
    cache: Cache,
    seed: int,
    loss: Any,
    progress: Progress,
) -> dict[str, Vector]:
    groups = [c.group for c in found]
    measured = derivatives = None
    if data is not None:
        measured = Measured(analysis, groups, data, setup, cache, progress)
        derivatives = Gradients(analysis, groups, data, loss, setup, seed, cache, progress)
    evidence = Evidence(analysis, seed, measured, derivatives)
    criterion = CRITERIA[method.criterion]
    raw = {g.name: criterion.score(g, evidence, method.aggregation) for g in groups}
    return normalise(raw, groups, method.normalisation)
