"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra `server`")

from tests.server.running import Running
from tests.small_models import cnn


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lets everybody in."""
    running = Running(tmp_path_factory.mktemp("server")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants tokens."""
    running = Running(tmp_path_factory.mktemp("guarded"), auth="tokens").start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network."""
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(cnn(), path)
    return path
