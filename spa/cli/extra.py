"""Commands that need packages which pruning does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spa.errors import UsageError


@contextmanager
def server_extra() -> Iterator[None]:
    """Imports inside need the packages of the server.

    Raises:
        UsageError: one is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this needs packages that are not installed ({error.name}): pip install 'spa-prune[server]'"
        ) from error
