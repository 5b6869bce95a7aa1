"""One job: from a spec to files. The command line could call it, and a server's worker does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from spa.jobs.events import Cancelled, Emit, JobCancelled, MetricEvent, StageEvent
from spa.jobs.spec import (
    BenchmarkSpec,
    FinetuneSpec,
    FrontierSpec,
    InspectSpec,
    JobSpec,
    ProfileSpec,
    PruneSpec,
    references,
)
from spa.jobs.store import Store
from spa.plain import plain
from spa.progress import Progress

if TYPE_CHECKING:
    from spa.pipeline import Result
    from spa.train import Epoch

__all__ = ["run"]


def run(spec: JobSpec, store: Store, emit: Emit, cancelled: Cancelled) -> None:
    """Do what a spec says, and leave the results in `store.output`.

    Each kind leaves `report.json`, which holds what the command line prints with `--json`; a prune job also its model
    and `plan.json`, a frontier job what `spa frontier` leaves in its folder, a finetune job its model, a profile job
    `table.json`; with `page` there is a page for a browser.

    Args:
        spec: what to do.
        store: its files.
        emit: told what happens.
        cancelled: asked at every step of progress.

    Raises:
        JobCancelled: `cancelled` said so.
        SpaError: as the functions that do the work.
    """

    def progress(stage: str, done: int, total: int) -> None:
        if cancelled():
            raise JobCancelled
        emit(StageEvent(stage, done, total))

    progress("load", 0, 1)
    match spec:
        case InspectSpec():
            report = _inspect(spec, store, progress)
        case PruneSpec():
            report = _prune(spec, store, progress)
        case FrontierSpec():
            report = _frontier(spec, store, progress)
        case FinetuneSpec():
            report = _finetune(spec, store, progress, emit)
        case ProfileSpec():
            report = _profile(spec, store, progress)
        case BenchmarkSpec():
            report = _benchmark(spec, store, progress)
    (store.output / "report.json").write_text(_text(report), encoding="utf-8")


def _options(spec: JobSpec, store: Store, *own: str) -> dict[str, Any]:
    """The fields that were set, except for `own`, as arguments: references are the files they stand for."""
    named = dict(references(spec))
    out: dict[str, Any] = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.name not in own and value not in (None, ()):
            out[item.name] = store.path(value) if item.name in named else value
    if out.get("align", "auto") != "auto":
        out["align"] = int(out["align"])
    return out


def _inspect(spec: InspectSpec, store: Store, progress: Progress) -> dict[str, Any]:
    from spa.explain import inspection
    from spa.pipeline import analyze

    progress("analyze", 0, 1)
    path = store.path(spec.model)
    analysis = analyze(path, dims=spec.dims)
    if spec.page:
        from spa.report import chart

        (store.output / "page.html").write_text(chart(analysis, path.name), encoding="utf-8")
    return inspection(analysis)


def _prune(spec: PruneSpec, store: Store, progress: Progress) -> dict[str, Any]:
    from spa.pipeline import prune

    options = _options(spec, store, "model", "target", "output_name", "page")
    result = prune(
        store.path(spec.model),
        target=spec.target,
        output=store.output / spec.output_name,
        cache=store.cache,
        progress=progress,
        **options,
    )
    (store.output / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    if spec.page:
        (store.output / "page.html").write_text(_page(spec, store, result, progress), encoding="utf-8")
    return {**result.report.to_json(), "output": spec.output_name, "plan": "plan.json"}


def _page(spec: PruneSpec, store: Store, result: Result, progress: Progress) -> str:
    from spa.errors import SpaError
    from spa.report import gather, render
    from spa.report.speed import measure

    path, speed, reason = store.path(spec.model), None, ""
    try:
        speed = measure(
            path,
            store.output / spec.output_name,
            known=result.report.latency,
            provider=spec.provider or "cpu",
            dims=dict(spec.dims or {}),
            inputs=None if spec.inputs is None else store.path(spec.inputs),
            seed=spec.seed or 0,
            progress=lambda done, total: progress("latency", done, total),
        )
    except SpaError as error:
        reason = str(error).rstrip(".")
    return render(gather(result, model=path.name, command="", speed=speed, unmeasured=reason))


def _frontier(spec: FrontierSpec, store: Store, progress: Progress) -> dict[str, Any]:
    """Made in the work folder, where a second attempt goes on, and copied from there."""
    from spa.frontier.index import PAGE
    from spa.frontier.run import frontier
    from spa.report.family import render

    folder = store.work / "family"
    folder.mkdir(exist_ok=True)
    options = _options(spec, store, "model", "page")
    family = frontier(store.path(spec.model), output=folder, cache=store.cache, progress=progress, **options)
    shutil.copytree(folder, store.output, dirs_exist_ok=True)
    if spec.page:
        (store.output / PAGE).write_text(render(family, ""), encoding="utf-8")
    return {**family.to_json(), "folder": "."}


def _finetune(spec: FinetuneSpec, store: Store, progress: Progress, emit: Emit) -> dict[str, Any]:
    from spa.train import finetune

    def told(epoch: Epoch) -> None:
        numbers: Mapping[str, float | None] = {
            "loss": epoch.loss if epoch.epoch else None,
            "accuracy": epoch.accuracy,
            "nll": epoch.nll,
            "distance": epoch.distance,
        }
        emit(MetricEvent(epoch.epoch, {name: value for name, value in numbers.items() if value is not None}))

    options = _options(spec, store, "model", "data", "output_name")
    samples = spec.data if spec.data not in store.files else store.path(spec.data)
    result = finetune(
        store.path(spec.model),
        data=samples,
        output=store.output / spec.output_name,
        checkpoint=store.work,
        progress=progress,
        told=told,
        **options,
    )
    return {**result.to_json(), "output": spec.output_name}


def _profile(spec: ProfileSpec, store: Store, progress: Progress) -> dict[str, Any]:
    from spa.graph import load
    from spa.latency.predict import predicted
    from spa.latency.profile import profile
    from spa.pipeline import analyze

    graph = load(store.path(spec.model))
    analysis = analyze(graph, dims=spec.dims)
    table = profile(graph, analysis, store.work, progress=progress, **_options(spec, store, "model"))
    table.write(store.output / "table.json")
    fitness = predicted(table, graph.sha256, analysis).fitness
    found = table.models[graph.sha256]
    return {
        "output": "table.json",
        "latency_ms": found.milliseconds[0],
        "operators": len(table.operators),
        "models": len(found.configurations),
        "error": fitness.error,
        "worst": fitness.worst,
    }


def _benchmark(spec: BenchmarkSpec, store: Store, progress: Progress) -> dict[str, Any]:
    from spa.bench import bench

    paths = [store.path(name) for name in spec.models]
    names = [
        f"{number}: {path.name} ({name})" for number, (path, name) in enumerate(zip(paths, spec.models, strict=True))
    ]
    tell: Callable[[int, int], None] = lambda done, total: progress("bench", done, total)  # noqa: E731  # a callback
    return bench(paths, names, progress=tell, **_options(spec, store, "models")).to_json()


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(plain(body), indent=2, allow_nan=False) + "\n"
