"""Sharing requests among versions by weights."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Splitter"]


class Splitter:
    """Smooth weighted round robin: at any time the versions had turns in proportion to their weights, or nearly so.

    The version that is furthest behind its share is next, as in nginx; no random numbers, so that a comparison of two
    versions sees the same split every time.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self._shares = {name: share / total for name, share in weights.items() if share > 0}
        self._due = dict.fromkeys(self._shares, 0.0)

    def turn(self) -> str:
        """The version that answers the next request."""
        for name, share in self._shares.items():
            self._due[name] += share
        chosen = max(self._due, key=self._due.__getitem__)
        self._due[chosen] -= 1.0
        return chosen
