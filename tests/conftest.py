"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Before numpy is imported: many small matrices, and as many workers as cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same commit gives the same result every time; `pytest --hypothesis-profile=search` looks for new counterexamples.
# How long it takes to make inputs says more about what else the machine does than about a test.
settings.register_profile("same", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", derandomize=False)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt with what is printed now")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the recorded models: `SPA_DATA`, or `shared` beside the repository."""
    root = Path(os.environ.get("SPA_DATA") or Path(__file__).parents[2] / "shared")
    if not (root / "zoo" / "manifest.json").is_file():
        pytest.skip(f"no recorded models in {root}; set SPA_DATA to their folder")
    return root
