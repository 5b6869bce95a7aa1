"""What pruning asks about latency: a table for a model, and measurements of what was made of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from spa.bench import Comparison, bench
from spa.errors import RuntimeFailure, UsageError
from spa.graph import Graph
from spa.groups import Analysis
from spa.latency import device
from spa.latency.kit import feeds_for
from spa.latency.loop import Attempt
from spa.latency.predict import Fitness
from spa.latency.profile import profile
from spa.latency.table import Table, read
from spa.progress import Progress, silent
from spa.runtime import Array
from spa.store import save
from spa.version import __version__

SECONDS = 1.0
"""Of running each model in one measurement of the loop."""
_ROUNDS = 40
_FINAL = 6.0


@dataclass(frozen=True)
class Setting:
    """How latency is measured."""

    provider: str = "cpu"
    threads: int = 0
    """Inside one operator; 0: ONNX Runtime's choice."""
    batch: int | None = None
    """Of the inputs, where it is open; None: 1."""
    table: Path | None = None
    """Measured before; None: measured now."""


@dataclass(frozen=True)
class LatencyReport:
    """Latency before and after, as it was measured (or, where it could not be, as the table predicts)."""

    measured: bool
    """False if the table is of another device or runtime than this one: then everything here is predicted."""
    before_ms: float
    after_ms: float
    asked: float | None
    """Target as a share of the original's latency; None if there was none."""
    predicted: float
    """Share that the table predicts for what was written."""
    versus_original: Comparison | None
    """How much faster, with its interval, in rounds that time both models; None if nothing was measured."""
    attempts: tuple[Attempt, ...]
    """How the loop came there."""
    table: Fitness
    device: str
    runtime: str
    provider: str
    threads: int
    batch: int

    @property
    def share(self) -> float:
        """Of the original's latency."""
        return self.after_ms / self.before_ms


def table_for(
    graph: Graph,
    analysis: Analysis,
    setting: Setting,
    *,
    dims: Mapping[str, int] | None = None,
    inputs: Path | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Table:
    """The table that was named, or that of an earlier run, or one that is measured now.

    Raises:
        UsageError: the table that was named cannot be read, or does not know this model.
        RuntimeFailure: the model cannot be measured.
    """
    if setting.table is not None:
        table = read(setting.table)
        if graph.sha256 not in table.models:
            raise UsageError(
                f"{setting.table}: the latency table has no measurements of this model; add them with "
                f"`spa profile MODEL -o {setting.table}`"
            )
        return table
    here = device.machine(setting.provider, setting.threads)
    request = [__version__, graph.sha256, here, setting.batch, sorted((dims or {}).items()), str(inputs or "")]
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:40]
    with _workplace(cache, name) as folder:
        path = folder / f"latency-{name}.json"
        if path.is_file():
            try:
                return read(path)
            except UsageError:
                path.unlink()  # damaged
        work = folder / f"latency-{name}"
        table = profile(
            graph,
            analysis,
            work,
            provider=setting.provider,
            threads=setting.threads,
            batch=setting.batch,
            dims=dims,
            inputs=inputs,
            progress=progress,
        )
        table.write(path)
        shutil.rmtree(work, ignore_errors=True)
        return table


@contextmanager
def _workplace(cache: Path | None, name: str) -> Iterator[Path]:
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--cache: {cache} cannot be written ({error.strerror}); name another folder") from error
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="spa-latency-") as folder:
        yield Path(folder)


class Stopwatch:
    """Times models against the original, on this machine.

    Args:
        graph: the original.
        setting: how.
        folder: for models that are timed.
        dims: sizes of symbolic axes.
        inputs: `.npz` file, instead of made-up inputs.
    """

    def __init__(
        self,
        graph: Graph,
        setting: Setting,
        folder: Path,
        dims: Mapping[str, int] | None = None,
        inputs: Path | None = None,
    ) -> None:
        self.setting, self.folder, self.external = setting, folder, graph.external
        self.original = graph.path or folder / "original.onnx"
        if graph.path is None:
            save(graph.model, self.original, external=graph.external)
        self.feeds: dict[str, Array] = feeds_for(graph, self.original, setting.batch, dims or {}, inputs)
        self._dense: device.Subject | None = None

    def ratio(self, model: ir.Model) -> tuple[float, float]:
        """Milliseconds of the original and of a model, which has its inputs."""
        path = self.folder / "candidate.onnx"
        save(model, path, external=self.external)
        return self.times(path)

    def times(self, path: Path) -> tuple[float, float]:
        """Milliseconds of the original and of a file.

        Raises:
            RuntimeFailure: one of them does not run.
        """
        provider, threads = self.setting.provider, self.setting.threads
        try:
            if self._dense is None:
                self._dense = device.Subject(self.original, self.feeds, provider, threads)
            return device.compare(self._dense, device.Subject(path, self.feeds, provider, threads), SECONDS)
        except device.KitError as error:
            raise RuntimeFailure(f"measuring latency: {error}") from error

    def comparison(self, path: Path) -> Comparison:
        """The speed of a file against the original, with its interval, see `spa.bench`."""
        report = bench(
            [self.original, path],
            ["the original", "the pruned model"],
            provider="cuda" if self.setting.provider == "cuda" else "cpu",
            threads=self.setting.threads,
            inputs=self.feeds,
            repeats=_ROUNDS,
            seconds=_FINAL,
            memory=False,
        )
        found = report.models[1].versus_first
        assert found is not None  # there are two models
        return found


def is_here(table: Table) -> bool:
    """Whether a table was measured on a machine and runtime like this one."""
    here = device.machine(table.key.provider, table.key.threads)
    return all(getattr(table.key, name) == value for name, value in here.items())


def as_measured(setting: Setting, table: Table) -> Setting:
    """What a table was measured with, for measurements that are to be compared with it."""
    return replace(setting, provider=table.key.provider, threads=table.key.threads, batch=table.key.batch)
