"""The protocol's usual client, from a folder of its own where it is not installed.

It asks for protobuf below 7 and ml_dtypes below 0.6, and runs with those that this project is tested with all the same:
`make test` puts it there without its dependencies.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_CLIENT = Path(__file__).parents[2] / ".venv" / "triton"

if importlib.util.find_spec("tritonclient") is None and _CLIENT.is_dir():
    sys.path.append(str(_CLIENT))
