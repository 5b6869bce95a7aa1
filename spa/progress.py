"""How a long operation says what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage and how much of it is done: (name, done, total). A stage begins with 0 done and never goes back,
but may begin anew. Other stages may run inside it."""


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""
