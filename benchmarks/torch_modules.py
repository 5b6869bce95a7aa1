"""What the networks of the benchmarks are put together with. torch is imported when a network is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def lazy_torch() -> Any:
    """The module torch."""
    import torch

    return torch


def wired(forward: Callable[..., Any], **parts: Any) -> Any:
    """A module with these parts, whose forward pass is `forward(module, *inputs)`."""
    nn = lazy_torch().nn

    class Wired(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, *inputs: Any) -> Any:
            return forward(self, *inputs)

    return Wired()
