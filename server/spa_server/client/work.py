"""Local files in, remote work, local files out: what `spa prune --server` and `spa remote` do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from spa.bench import BenchReport
from spa.errors import OutputError, SpaError, UsageError
from spa.finish import Report, Result
from spa.jobs import KINDS, BenchmarkSpec, JobSpec, PruneSpec, references
from spa.jobs.spec import is_reference
from spa.plan import read as read_plan
from spa.progress import Progress, silent
from spa.store import publish
from spa.typed import read_record
from spa_server.client.client import Client

__all__ = ["bench", "prune", "pushed", "read_spec", "specified"]

Spec = TypeVar("Spec", bound=JobSpec)
Record = TypeVar("Record")

_LOCAL = ("output", "cache", "progress")
"""Options of local pruning that a server has its own of."""


def prune(
    client: Client,
    model: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    progress: Progress = silent,
    told: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> Result:
    """As `spa.prune` with an output, but done by a server.

    Args:
        client: of the server.
        model: ONNX file, or the name of a model there.
        output: file to write.
        progress: told what is sent, the stages there, and what is fetched.
        told: told the name of the job when there is one.
        options: as `spa.prune` has them.

    Raises:
        SpaError: as `spa.prune`, and if the server refuses.
    """
    target = Path(output)
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {str(target.parent)!r} does not exist; create it first")
    spec = pushed(client, specified(model, target.name, options), progress)
    job = client.submit(spec)
    told(job.name)
    try:
        client.wait(job.name, progress=progress)
    except KeyboardInterrupt:
        client.cancel(job.name)
        raise
    folder = Path(tempfile.mkdtemp(prefix=".spa-", dir=target.parent))
    try:
        files = client.pull(job.name, folder, progress=progress)
        plan = read_plan(folder / "plan.json")
        report = _report((folder / "report.json").read_text(encoding="utf-8"))
        written = [file for file in files if file.name not in ("plan.json", "report.json")]
        publish({target.with_name(file.name): file for file in reversed(written)})
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); check the folder and its space") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(None, target, plan, report)


def bench(
    client: Client,
    models: Sequence[str | os.PathLike[str]],
    names: Sequence[str],
    *,
    progress: Callable[[int, int], None],
    **options: Any,
) -> BenchReport:
    """As `spa.bench`, but measured by a server, on its machine.

    Args:
        client: of the server.
        models: ONNX files, or names of models there.
        names: one for each, to be used in the report.
        progress: called with (rounds done, rounds at most).
        options: as `spa.bench` has them.

    Raises:
        SpaError: as `spa.bench`, and if the server refuses.
    """
    given = {key: value for key, value in options.items() if value not in (None, {})}
    inputs = {"inputs": os.fspath(given.pop("inputs"))} if "inputs" in given else {}
    body = {"models": [os.fspath(model) for model in models], **given, **inputs}
    job = client.submit(pushed(client, read_record(BenchmarkSpec, body, "bench")))
    client.wait(job.name, progress=lambda stage, done, total: progress(done, total) if stage == "bench" else None)
    with tempfile.TemporaryDirectory() as folder:
        (path,) = client.pull(job.name, folder)
        report = _read(BenchReport, json.loads(path.read_text(encoding="utf-8")))
    rows = zip(report.models, names, strict=True)
    return dataclasses.replace(report, models=tuple(dataclasses.replace(row, name=name) for row, name in rows))


def read_spec(path: Path) -> JobSpec:
    """A spec that names local files, relative to its own folder.

    Raises:
        UsageError: it cannot be read, or says something that is not known.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML or JSON ({error})") from error
    if not isinstance(given, dict) or given.get("kind") not in KINDS:
        raise UsageError(f"{path}: needs `kind`: one of {', '.join(KINDS)}")
    kind = KINDS[given.pop("kind")]
    spec = read_record(kind, given, str(path))
    placed: dict[str, Any] = {}
    for field, text in references(spec, local=True):
        found = str(path.parent / text) if (path.parent / text).exists() else text
        placed[field] = (*placed.get(field, ()), found) if isinstance(getattr(spec, field), tuple) else found
    return dataclasses.replace(spec, **placed)


def specified(model: str | os.PathLike[str], name: str, options: Mapping[str, Any]) -> PruneSpec:
    """Options of local pruning as a spec that names local files; what has its default is left out.

    Raises:
        UsageError: an option cannot be sent.
    """
    fields = {field.name for field in dataclasses.fields(PruneSpec)}
    given: dict[str, Any] = {"model": os.fspath(model), "output_name": name}
    for key, value in options.items():
        if key in _LOCAL or value in (None, (), [], {}):
            continue
        if key not in fields:
            raise UsageError(f"--{key.replace('_', '-')} is not known to servers; leave it out with --server")
        texts = key in ("align", "min_keep", "memory")
        given[key] = str(value) if texts or isinstance(value, os.PathLike) else value
    given["target"] = (given["target"],) if isinstance(given["target"], str) else tuple(given["target"])
    return read_record(PruneSpec, given, "prune")


def pushed(client: Client, spec: Spec, progress: Progress = silent) -> Spec:
    """The same spec, with local files sent, and named as the server names them.

    Raises:
        SpaError: a file cannot be read, or the server refuses.
    """
    named: dict[str, Any] = {}
    for field, text in references(spec, local=True):
        if is_reference(text) and not Path(text).exists():
            found = text
        elif field in ("model", "models", "teacher"):
            found = client.push_model(text, progress=progress).name
        elif field != "preprocess" or Path(text).is_file():
            found = client.push_dataset(text, progress=progress).name
        else:
            continue
        named[field] = (*named.get(field, ()), found) if isinstance(getattr(spec, field), tuple) else found
    return dataclasses.replace(spec, **named)


def _report(text: str) -> Report:
    body = json.loads(text)
    if isinstance(body.get("latency"), dict):
        body["latency"].pop("share", None)  # is worked out
    return _read(Report, body)


def _read(kind: type[Record], body: Mapping[str, Any]) -> Record:
    """A record that the server wrote, without what is there besides."""
    wanted = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    try:
        return read_record(kind, {key: value for key, value in body.items() if key in wanted}, "report.json")
    except UsageError as error:
        raise SpaError(f"the server's report cannot be read ({error}); is it of another version?") from error
