"""What is to be loaded of a model, what is, and which version answers a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spa_server.serving.errors import NotFound
from spa_server.serving.loading import Held, Plan
from spa_server.serving.options import ModelOptions
from spa_server.serving.source import in_order
from spa_server.serving.splitting import Splitter
from spa_server.serving.version import LoadedVersion

__all__ = ["IndexEntry", "ServedModel", "index_of"]


@dataclass(frozen=True)
class IndexEntry:
    """One version of a model."""

    model: str
    """Name of the model."""
    version: str
    """Its version."""
    state: str
    """READY, LOADING, UNLOADING, UNAVAILABLE, or empty if it was never loaded."""
    reason: str
    """Why it is unavailable."""


class ServedModel:
    """The versions of a model that are loaded together."""

    def __init__(self, name: str, plan: Plan, held: Mapping[str, Held]) -> None:
        self.name, self.plan, self.held = name, plan, held
        self._splitter = Splitter(plan.options.weights) if plan.options.weights else None
        self._latest = in_order(list(held))[-1]

    def in_order(self) -> list[LoadedVersion]:
        """All of them, oldest first."""
        return [self.held[version].loaded for version in in_order(list(self.held))]

    def choose(self, version: str) -> LoadedVersion:
        """The version that answers the next request. Raises: NotFound if the one named is not loaded."""
        if not version:
            version = self._splitter.turn() if self._splitter else self._latest
        return self.get(version)

    def get(self, version: str) -> LoadedVersion:
        """A version by name, the latest without one. Raises: NotFound if it is not loaded."""
        held = self.held.get(version or self._latest)
        if held is None:
            raise NotFound(
                f"version {version!r} of model {self.name!r} is not loaded; "
                f"loaded: {', '.join(in_order(list(self.held)))}."
            )
        return held.loaded

    def unchanged(self, plan: Plan) -> dict[str, Held]:
        """The loaded versions that `plan` wants just as they are."""
        if _of_sessions(plan.options) != _of_sessions(self.plan.options):
            return {}
        return {version: held for version, held in self.held.items() if plan.marks.get(version) == held.mark}


def _of_sessions(options: ModelOptions) -> ModelOptions:
    """The options without those that say only which version answers."""
    return replace(options, versions="latest", weights={})


def index_of(
    listed: Mapping[str, Sequence[str]],
    models: Mapping[str, ServedModel],
    states: Mapping[tuple[str, str], tuple[str, str]],
) -> list[IndexEntry]:
    """All versions that are in the source or loaded."""
    entries = []
    for name in sorted({*listed, *models}):
        held = models[name].held if name in models else {}
        for version in in_order(list({*listed.get(name, ()), *held})):
            state, reason = ("READY", "") if version in held else states.get((name, version), ("", ""))
            entries.append(IndexEntry(name, version, state, reason))
    return entries
