"""Descriptors of all services of a process for grpc's reflection, which looks in one pool only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pool  # type: ignore[import-untyped]  # no types are shipped

from spa_server._generated_inference import POOL

__all__ = ["Descriptors"]


class Descriptors:
    """The lookups of a descriptor pool that reflection needs, in protobuf's default pool and in this service's."""

    def __init__(self) -> None:
        self._pools = (descriptor_pool.Default(), POOL)

    def FindFileByName(self, name: str) -> Any:
        """Raises: KeyError."""
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """Raises: KeyError."""
        return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))

    def FindMessageTypeByName(self, name: str) -> Any:
        """Raises: KeyError."""
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        """Raises: KeyError."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:
        """Extensions of a message."""
        return message.file.pool.FindAllExtensions(message)

    def _first(self, find: Callable[[Any], Any]) -> Any:
        try:
            return find(self._pools[0])
        except KeyError:
            return find(self._pools[1])
