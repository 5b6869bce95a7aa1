"""Models that are loaded, requests that they answer, and loading and unloading while they do. Knows no grpc.

An engine belongs to one event loop. Only opening models and running them happens in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from spa.errors import SpaError, UsageError
from spa_server.serving.codec import Array
from spa_server.serving.errors import InvalidRequest, LimitReached, NotFound, NotLoadable, Overloaded, ShuttingDown
from spa_server.serving.loading import Held, Plan, hold, survey
from spa_server.serving.options import parse_options
from spa_server.serving.repository import IndexEntry, ServedModel, index_of
from spa_server.serving.signature import TensorSpec
from spa_server.serving.source import ModelSource
from spa_server.serving.trial import Trial
from spa_server.serving.version import LoadedVersion

__all__ = ["Answer", "Engine", "Limits"]

_LOADS_AT_ONCE = 2
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one engine takes on."""

    max_versions: int = 64
    """Versions of models that are loaded at the same time."""
    max_bytes: int = 1 << 30
    """Inputs of all requests without answer, in bytes."""
    trial: Trial | None = None
    """What opening a model may take in a process of its own, before it is opened here; None trusts all models."""


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    version: str
    """The version that answered."""
    outputs: tuple[tuple[TensorSpec, Array], ...]
    """The outputs, in the order that was asked for."""


class Engine:
    """Serves the models of a source."""

    def __init__(self, source: ModelSource, limits: Limits | None = None) -> None:
        self._source = source
        self._limits = limits or Limits()
        self._models: dict[str, ServedModel] = {}
        self._states: dict[tuple[str, str], tuple[str, str]] = {}
        """(model, version) -> state and reason, of versions that are on their way or failed."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._bytes = 0
        self._closing = False

    # ---- requests ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are taken at all."""
        return not self._closing

    def model(self, name: str) -> ServedModel:
        """What is loaded of a model. Raises: NotFound if nothing is."""
        found = self._models.get(name)
        if found is None:
            raise NotFound(f"model {name!r} is not loaded: check the name, or load it first.")
        return found

    def loaded(self) -> list[LoadedVersion]:
        """All loaded versions of all models."""
        return [version for name in sorted(self._models) for version in self._models[name].in_order()]

    async def infer(
        self,
        name: str,
        feeds: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline: float | None = None,
    ) -> Answer:
        """Run a model once.

        Args:
            name: of the model.
            feeds: all its inputs; arrays of str for texts.
            version: empty leaves the choice to the model's weights, or takes the latest.
            outputs: those that are wanted; none for all.
            deadline: when the request need not run any more, on the event loop's clock.

        Raises: NotFound, InvalidRequest, Overloaded, LimitReached, TooLate, ShuttingDown, RunFailed.
        """
        if self._closing:
            raise ShuttingDown("the server shuts down: ask another one.")
        chosen = self.model(name).choose(version)
        chosen.signature.check(feeds)
        specs = chosen.signature.chosen(outputs)
        size = _bytes_of(feeds)
        if size > self._limits.max_bytes:
            raise LimitReached(f"the inputs have {size} bytes, more than the {self._limits.max_bytes} of all requests.")
        if self._bytes + size > self._limits.max_bytes:
            raise Overloaded(
                f"requests of {self._bytes} bytes are being answered, and {size} more would exceed "
                f"{self._limits.max_bytes}: try again later."
            )
        # from here to the queue nothing is awaited: what is unloaded meanwhile still answers this request
        answer = chosen.submit(dict(feeds), [spec.name for spec in specs], deadline)
        self._bytes += size
        try:
            arrays = await answer
        finally:
            self._bytes -= size
        return Answer(chosen.version, tuple((spec, arrays[spec.name]) for spec in specs))

    # ---- the repository ---------------------------------------------------------------------------------------------

    async def index(self) -> list[IndexEntry]:
        """All versions of all models of the source, and of what is loaded, by name and age."""
        listed = await asyncio.to_thread(_listing, self._source)
        return index_of(listed, self._models, self._states)

    async def load(self, name: str, options: Mapping[Any, Any] | None = None) -> None:
        """Load the versions that the model's options ask for, or load anew those whose files or options have changed.

        All of them or none: until the last one is open, and if one fails, the model is served as before. Requests are
        answered by the version that accepted them.

        Args:
            name: of the model.
            options: instead of those that the source gives.

        Raises: NotFound, NotLoadable, InvalidRequest for `options` that are wrong, LimitReached, ShuttingDown.
        """
        await self._finish(self._load(name, options))

    async def unload(self, name: str) -> None:
        """Take no more requests for a model; returns when those it had accepted are answered. Raises: NotFound."""
        await self._finish(self._unload(name))

    async def close(self) -> None:
        """Take no more requests, answer those that were accepted, and let go of everything."""
        self._closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in list(self._models):
            await self._unload(name)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Bring work to its end even if the one who asked for it goes away."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, SpaError):  # maybe nobody waits for it
            _LOG.error("loading or unloading failed for a reason that was not foreseen", exc_info=error)

    def _lock(self, name: str) -> asyncio.Lock:
        """Held while a model is loaded or unloaded; forgotten when nobody holds it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    async def _load(self, name: str, given: Mapping[Any, Any] | None) -> None:
        if self._closing:
            raise ShuttingDown("the server shuts down: nothing is loaded any more.")
        async with self._lock(name), self._loads:
            if given is not None:
                try:
                    parse_options(given, "the given options")
                except UsageError as error:
                    raise InvalidRequest(str(error)) from error
            plan = await asyncio.to_thread(survey, self._source, name, given)
            before = self._models.get(name)
            kept = {} if before is None else before.unchanged(plan)
            fresh = [version for version in plan.marks if version not in kept]
            others = sum(len(model.held) for other, model in self._models.items() if other != name)
            others += sum(state == "LOADING" for (other, _), (state, _) in self._states.items() if other != name)
            if others + len(plan.marks) > self._limits.max_versions:
                raise LimitReached(
                    f"{others} versions of other models are loaded, and {len(plan.marks)} more would exceed "
                    f"{self._limits.max_versions}: unload a model first."
                )
            held = kept | await self._open_all(name, fresh, plan)
            self._models[name] = ServedModel(name, plan, held)
            for version, old in (before.held if before else {}).items():
                if held.get(version) is not old:
                    self._spawn(self._drain(name, version, old))

    async def _open_all(self, name: str, versions: Sequence[str], plan: Plan) -> dict[str, Held]:
        opened: dict[str, Held] = {}
        for version in versions:
            self._states[name, version] = ("LOADING", "")
        try:
            for version in versions:
                try:
                    opened[version] = await hold(
                        self._source, name, version, plan.marks[version], plan.options, self._limits.trial
                    )
                except SpaError as error:
                    self._states[name, version] = ("UNAVAILABLE", str(error))
                    raise NotLoadable(f"version {version!r} of model {name!r} cannot be loaded: {error}") from error
        except BaseException:
            for held in opened.values():
                await held.close()
            raise
        finally:
            for version in versions:
                if self._states.get((name, version), ("", ""))[0] == "LOADING":
                    del self._states[name, version]
        return opened

    async def _unload(self, name: str) -> None:
        async with self._lock(name):
            model = self._models.pop(name, None)
            if model is None:
                raise NotFound(f"model {name!r} is not loaded.")
            await asyncio.gather(*(self._drain(name, version, held) for version, held in model.held.items()))

    async def _drain(self, name: str, version: str, held: Held) -> None:
        key = (name, version)
        if name not in self._models:
            self._states[key] = ("UNLOADING", "")
        try:
            await held.close()
        finally:
            if self._states.get(key, ("", ""))[0] == "UNLOADING":
                del self._states[key]


def _listing(source: ModelSource) -> dict[str, Sequence[str]]:
    listed: dict[str, Sequence[str]] = {}
    for name in source.models():
        try:
            listed[name] = list(source.versions(name))
        except NotFound:  # deleted just now
            continue
    return listed


def _bytes_of(feeds: Mapping[str, Array]) -> int:
    return sum(
        array.nbytes if array.dtype != object else sum(map(len, array.reshape(-1).tolist())) for array in feeds.values()
    )
