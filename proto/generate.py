"""Writes the Python code of the protos into server/spa_server/_generated: `make proto`.

The compiler is grpcio-tools 1.81.1, in a folder of its own (`.venv/proto`): its code runs with protobuf 6.33.5 and
newer, while that of later versions needs a protobuf that other packages do not accept yet. It must not be installed
beside the packages of the project, with whose protobuf it does not agree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
TARGET = PROTOS.parent / "server" / "spa_server" / "_generated"
TOOLS = PROTOS.parent / ".venv" / "proto"
_HEAD = '"""Generated from proto/spa/v1 by `make proto`."""\n'


def generated(tools: Path = TOOLS) -> dict[str, str]:
    """Contents of the generated files by name. `tools` is the folder that holds `grpc_tools`."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.glob("spa/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *sources]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tools)}, cwd=PROTOS)
        texts = {path.name: path.read_text(encoding="utf-8") for path in Path(folder, "spa", "v1").iterdir()}
    # The protos' package is spa.v1, but the Python package spa is another one.
    texts = {
        name: text.replace("from spa.v1 import", "from spa_server._generated import") for name, text in texts.items()
    }
    bare = [name for name in texts if name.endswith("_grpc.py") and "Servicer" not in texts[name]]
    return {"__init__.py": _HEAD, **{name: text for name, text in texts.items() if name not in bare}}


def main() -> None:
    """Write them."""
    texts = generated()
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in TARGET.glob("*.py*"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (TARGET / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
