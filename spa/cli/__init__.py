"""The command line: thin, every operation is a function of the library."""

from __future__ import annotations

from spa.cli.guard import main

__all__ = ["main"]
