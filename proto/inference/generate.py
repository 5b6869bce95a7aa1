"""Writes the Python code of this folder's protos: `python proto/inference/generate.py`.

The compiler is that of proto/generate.py. What it writes is changed in two ways: imports name the package, and
descriptors go to a pool of their own. Other packages (tritonclient, kserve) bring the same message names in files of
theirs, and protobuf's default pool refuses the second one that is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[1]
PACKAGE = "spa_server._generated_inference"
TARGET = PROTOS.parent / "server" / "spa_server" / "_generated_inference"
TOOLS = PROTOS.parent / ".venv" / "proto"
_REPLACED = {
    "from inference import": f"from {PACKAGE} import",
    "from google.protobuf import descriptor_pool as _descriptor_pool\n": f"from {PACKAGE} import POOL as _POOL\n",
    "_descriptor_pool.Default()": "_POOL",
}


def generated(tools: Path = TOOLS) -> dict[str, str]:
    """Contents of the generated files by name. `tools` is a folder that holds `grpc_tools`, unless Python finds it."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi")]
        sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("inference/*.proto"))
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *sources]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tools)}, cwd=PROTOS)
        texts = {path.name: path.read_text(encoding="utf-8") for path in Path(folder, "inference").iterdir()}
    for old, new in _REPLACED.items():
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    return texts


if __name__ == "__main__":
    for name, text in generated().items():
        (TARGET / name).write_text(text, encoding="utf-8")
