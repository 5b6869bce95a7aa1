"""From a model source to loaded versions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa.errors import UsageError
from spa_server.serving.errors import NotLoadable
from spa_server.serving.opening import Opened, open_version
from spa_server.serving.options import ModelOptions, parse_options
from spa_server.serving.source import ModelSource, in_order
from spa_server.serving.trial import Trial, try_opening
from spa_server.serving.version import LoadedVersion

__all__ = ["Held", "Plan", "hold", "survey"]


@dataclass(frozen=True)
class Plan:
    """What is to be loaded of a model."""

    options: ModelOptions
    """How."""
    marks: Mapping[str, str]
    """Version -> the mark of its files."""


@dataclass(frozen=True)
class Held:
    """A loaded version, and its files."""

    loaded: LoadedVersion
    """Answers requests."""
    mark: str
    """Of the files that it was loaded from."""
    files: contextlib.ExitStack
    """Keeps the files in place: external data stays mapped."""

    async def close(self) -> None:
        """Wait until all requests are answered, and let go of the files."""
        await self.loaded.close()
        await asyncio.to_thread(self.files.close)


def survey(source: ModelSource, model: str, given: Mapping[Any, Any] | None) -> Plan:
    """What `given` options, or else the source's, ask to be loaded. Blocks.

    Raises: NotFound; NotLoadable if options are wrong or name a version that is not there.
    """
    there = source.versions(model)
    try:
        content = source.options(model) if given is None else given
        options = parse_options(content, f"the options of model {model!r}")
    except UsageError as error:
        raise NotLoadable(str(error)) from error
    return Plan(options, {version: there[version] for version in _wanted(options, list(there), model)})


def _wanted(options: ModelOptions, there: list[str], model: str) -> list[str]:
    ordered = in_order(there)
    named = [*options.weights]
    if options.versions == "all":
        named += ordered
    elif options.versions != "latest":
        named += options.versions
    elif not named:
        named += ordered[-1:]
    for version in named:
        if version not in there:
            raise NotLoadable(f"model {model!r} has no version {version!r}; it has {', '.join(ordered)}.")
    return in_order(list(dict.fromkeys(named)))


async def hold(
    source: ModelSource, model: str, version: str, mark: str, options: ModelOptions, trial: Trial | None
) -> Held:
    """Open one version, first within the limits of `trial`; its files stay in place until it is closed.

    Raises: NotFound, NotLoadable, ModelError.
    """
    opened, files = await asyncio.to_thread(_open, source.open(model, version), options, trial)
    return Held(LoadedVersion(model, version, opened, options), mark, files)


def _open(
    place: AbstractContextManager[Path], options: ModelOptions, trial: Trial | None
) -> tuple[Opened, contextlib.ExitStack]:
    files = contextlib.ExitStack()
    try:
        path = files.enter_context(place)
        if trial is not None:
            try_opening(path, trial)
        return open_version(path, options), files
    except BaseException:
        files.close()
        raise
