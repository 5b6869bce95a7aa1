"""Calling the command line in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spa.cli import main


class Ran:
    """One call of the command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        self.out, self.err = captured.out, captured.err

    def json(self) -> dict[str, Any]:
        body = json.loads(self.out)
        assert isinstance(body, dict)
        return body
