"""Run a recipe: stages make their files in a staging folder; only a run that reached all gates writes its output."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spa.cache import default_folder
from spa.edge import stages
from spa.edge.base import Step, bytes_of, files_of, release, staging
from spa.edge.convert import CONVERSIONS, Data, check_suffix
from spa.edge.fidelity import Metric, Samples, compare_files
from spa.edge.ort_format import operators_of
from spa.edge.recipe import Recipe, Stage, read_recipe
from spa.errors import OutputError, SpaError, UsageError
from spa.options import check_output
from spa.progress import Progress, silent
from spa.runtime import runtime_version
from spa.version import __version__

__all__ = ["Outcome", "run"]


@dataclass(frozen=True)
class Outcome:
    """What a recipe did."""

    recipe: Path
    recipe_sha256: str
    model: Path
    model_sha256: str
    """Of the main file."""
    model_bytes: int
    output: Path | None
    """The file; None if a gate was missed, as nothing was written then."""
    steps: tuple[Step, ...]
    """Stages that ran; the last one missed its gate if `passed` is false."""
    compared_on: str
    """What the outputs were compared on."""
    versions: Mapping[str, str]
    date: str
    """When it ended, UTC."""

    @property
    def passed(self) -> bool:
        """Whether every stage reached its gates."""
        return all(step.passed for step in self.steps)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(step.seconds for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """As `spa run --json` prints it."""
        body = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        steps = [step.to_json() for step in self.steps]
        return {**body, "versions": dict(self.versions), "steps": steps, "passed": self.passed}


def run(
    recipe: Recipe | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    told: Callable[[Step], None] = lambda step: None,
) -> Outcome:
    """Run all stages of a recipe, up to the first that misses a gate.

    Args:
        recipe: what `read_recipe` gave, or the file.
        output: write there instead of where the recipe says.
        work: keep intermediate files there, instead of where the recipe says.
        progress: called with (stage, done, total).
        told: called after each stage.

    Returns:
        what was measured; look at `passed`. The output is written only if every gate was reached.

    Raises:
        UsageError: the recipe is wrong, or samples do not fit.
        SpaError: what a stage raises; its message begins with the stage.
        OutputError: output or intermediate files cannot be written.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    changed = {k: Path(v) for k, v in (("output", output), ("work", work)) if v is not None}
    recipe = replace(recipe, settings={**recipe.settings, **changed})
    check_output(recipe.output)
    check_suffix(recipe.output, next(stage.kind for stage in reversed(recipe.stages) if stage.makes))
    if os.path.realpath(recipe.output) == os.path.realpath(recipe.model):
        raise UsageError(f"{recipe.output}: is the input; write to another file, the input is never overwritten")
    with staging(recipe.output) as folder:
        runner = _Runner(recipe, folder, progress)
        for number, stage in enumerate(recipe.stages, 1):
            with _about(stage):
                step = runner.run(number, stage)
            told(step)
            if not step.passed:
                return runner.outcome(None)
        runner.publish()
        return runner.outcome(recipe.output)


@contextlib.contextmanager
def _about(stage: Stage) -> Iterator[None]:
    """Say which stage a failure is about."""
    try:
        yield
    except SpaError as error:
        text = str(error)
        begins = f"stage {stage.name}"
        raise type(error)(text if text.startswith(begins) else f"{begins}: {text}") from error


class _Runner:
    """The state of one run."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.made: dict[str, Path] = {"model": recipe.model}
        self.plans: dict[str, Path] = {}
        self.current = recipe.model
        self.steps: list[Step] = []
        self.samples: dict[str, Samples] = {}
        shared = recipe.settings
        common = {k: shared[k] for k in ("preprocess", "tokenizer", "max_length", "dims", "seed") if k in shared}
        runs = {k: shared[k] for k in ("batch", "provider") if k in shared}
        metric = _metric(shared.get("metric"))
        source = shared.get("evaluation", shared.get("calibration", "noise"))
        some = {"samples": shared["samples"]} if "evaluation" not in shared and "samples" in shared else {}
        if isinstance(source, str):  # made up: there is nothing to prepare
            common = {k: v for k, v in common.items() if k in ("dims", "seed")}
        self.on = Data(source, **common, **runs, **some).read(recipe.model, metric)

    def run(self, number: int, stage: Stage) -> Step:
        """Run one stage, remember what it made, and keep it if asked to."""
        last = max(k for k, s in enumerate(self.recipe.stages, 1) if s.makes)
        suffix = ".ort" if stage.kind == "ort" else ".onnx"
        name = self.recipe.output.name if number == last else f"{number:02d}-{stage.name}{suffix}"
        job = stages.Job(stage.name, self.current, self.folder / name, self.on, stage.gates, self.progress)
        step = _RUN.get(stage.kind, _Runner._convert)(self, job, stage)
        if stage.makes:
            self.current = self.made[stage.name] = job.target
        self.steps.append(step)
        self._keep(stage)
        return step

    # -- kinds of stages ------------------------------------------------------------------------------------------

    def _convert(self, job: stages.Job, stage: Stage) -> Step:
        options = dict(stage.options)
        if stage.kind == "quantize":
            options["calibration"] = self._calibration(options)
        return CONVERSIONS[stage.kind](job, **options)

    def _calibration(self, options: dict[str, Any]) -> Samples | None:
        """Takes the options about samples away."""
        keys = ("calibration", "samples", "preprocess", "tokenizer", "max_length", "dims", "seed")
        mine = {key: options.pop(key) for key in keys if key in options}
        source = mine.pop("calibration", None)
        if source is None:
            return None
        runs = {k: self.recipe.settings[k] for k in ("batch", "provider") if k in self.recipe.settings}
        return Data(source, **mine, **runs).read(self.recipe.model)

    def _prune(self, job: stages.Job, stage: Stage) -> Step:
        from spa.pipeline import prune

        def make(source: Path, target: Path) -> dict[str, Any]:
            options = {"cache": default_folder(), **stage.options}
            result = prune(source, output=target, progress=self.progress, **options)
            plan = self.folder / f"{target.stem}.plan.json"
            plan.write_text(result.plan.to_json(), encoding="utf-8")
            self.plans[stage.name] = plan
            body = result.report.to_json()
            return {key: body[key] for key in ("macs", "parameters", "removed_units", "verify", "method", "fit")}

        return stages.judged(job, job.gates, make)

    def _finetune(self, job: stages.Job, stage: Stage) -> Step:
        from spa.train import finetune

        def make(source: Path, target: Path) -> dict[str, Any]:
            options = dict(stage.options)
            if isinstance(options.get("teacher"), str):
                options["teacher"] = self.made[options["teacher"]]
            if isinstance(options.get("plan"), str):
                options["plan"] = self._plan(options["plan"])
            result = finetune(source, output=target, progress=self.progress, **options)
            body = result.to_json()
            return {key: body[key] for key in ("metric", "before", "after", "best_epoch", "samples", "held_out")}

        return stages.judged(job, job.gates, make)

    def _plan(self, name: str) -> Path:
        if name not in self.plans:
            raise UsageError(f"plan: stage {name!r} makes no plan; name a prune stage or a file")
        return self.plans[name]

    def _bench(self, job: stages.Job, stage: Stage) -> Step:
        from spa.bench import bench

        options = dict(stage.options)
        first = self.made[str(options.pop("against", "model"))]
        start = time.perf_counter()
        report = bench([first, job.source], ["before", "after"], **{"memory": False, **options})
        seconds = time.perf_counter() - start
        before, after = report.models
        found = {"latency": after.latency.median_ms}
        if after.versus_first is not None:
            found["speedup"] = after.versus_first.speedup
        sizes = bytes_of(first), bytes_of(job.source)
        checks = stages.checks(job.stage, job.gates, None, *sizes, found)
        body = report.to_json()
        for row in body["models"]:
            row["latency"].pop("rounds_ms", None)
        detail = {
            "before_ms": before.latency.median_ms,
            "after_ms": after.latency.median_ms,
            "verdict": "" if after.versus_first is None else after.versus_first.verdict,
            **found,
            "bench": body,
        }
        return Step(job.stage, None, *sizes, seconds, None, checks, detail)

    def _verify(self, job: stages.Job, stage: Stage) -> Step:
        first = self.made[str(stage.options.get("against", "model"))]
        start = time.perf_counter()
        fidelity = compare_files(first, job.source, self.on, self.progress)
        sizes = bytes_of(first), bytes_of(job.source)
        checks = stages.checks(job.stage, job.gates, fidelity, *sizes)
        return Step(job.stage, None, *sizes, time.perf_counter() - start, fidelity, checks, dict(stage.options))

    # -- files ----------------------------------------------------------------------------------------------------

    def _files(self, name: str) -> list[Path]:
        file = self.made[name]
        more = [self.plans[name]] if name in self.plans else []
        return [*files_of(file), *more, *([operators_of(file)] if file.suffix == ".ort" else [])]

    def _keep(self, stage: Stage) -> None:
        """Copy what a stage made to the work folder, whole or not at all."""
        work = self.recipe.settings.get("work")
        if work is None or not stage.makes:
            return
        try:
            Path(work).mkdir(parents=True, exist_ok=True)
            with staging(Path(work) / "any") as folder:
                files = self._files(stage.name)
                for file in files:
                    shutil.copyfile(file, folder / file.name)
                release([folder / file.name for file in files], Path(work), Path(work))
        except OSError as error:
            raise OutputError(f"work: {work} cannot be written ({error.strerror}); choose another folder") from error

    def publish(self) -> None:
        """Rename what the last stage made into place."""
        name = next(reversed(self.made))
        files = [file for file in self._files(name) if file not in self.plans.values()]
        release(files, self.recipe.output.parent, self.recipe.output)

    def outcome(self, output: Path | None) -> Outcome:
        """What has been measured so far; names of files are those that stay."""
        work = self.recipe.settings.get("work")
        steps = []
        for step in self.steps:
            file = None
            if step.output is not None:
                final = output is not None and step.output.name == output.name
                file = output if final else None if work is None else Path(work) / step.output.name
            steps.append(replace(step, output=file))
        with open(self.recipe.model, "rb") as model:
            digest = hashlib.file_digest(model, "sha256").hexdigest()
        return Outcome(
            self.recipe.path,
            self.recipe.sha256,
            self.recipe.model,
            digest,
            bytes_of(self.recipe.model),
            output,
            tuple(steps),
            f"{self.on.data.samples} samples of {self.on.data.name}",
            {"spa": __version__, "onnxruntime": runtime_version()},
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


_RUN: Mapping[str, Callable[[_Runner, stages.Job, Stage], Step]] = {
    "prune": _Runner._prune,
    "finetune": _Runner._finetune,
    "bench": _Runner._bench,
    "verify": _Runner._verify,
}


def _metric(path: Path | None) -> Metric | None:
    """The user's function.

    Raises:
        UsageError: the file cannot be run, or has no such function.
    """
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("_spa_metric", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"metric: {path} is no Python file; give one with a function metric(outputs, labels)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"metric: {path} fails with {type(error).__name__}: {error}") from error
    found = getattr(module, "metric", None)
    if not callable(found):
        raise UsageError(f"metric: {path} has no function `metric`; define metric(outputs, labels)")
    function: Metric = found
    return function
