"""Fixtures of the server's tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from tests.small_models import cnn

if TYPE_CHECKING:
    from tests.server.running import Running

if importlib.util.find_spec("sqlalchemy") is None:  # the extra `server` is not installed
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lets everybody in."""
    from tests.server.running import Running

    running = Running(tmp_path_factory.mktemp("server")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants tokens."""
    from tests.server.running import Running

    running = Running(tmp_path_factory.mktemp("guarded"), auth="tokens").start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network."""
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(cnn(), path)
    return path
