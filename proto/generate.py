"""Writes the Python code of the protos into server/spa_server: `make proto`.

The compiler is grpcio-tools 1.81.1, in a folder of its own (`.venv/proto`): its code runs with protobuf 6.33.5 and
newer, while that of later versions needs a protobuf that other packages do not accept yet. It must not be installed
beside the packages of the project, with whose protobuf it does not agree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
SERVER = PROTOS.parent / "server" / "spa_server"
TOOLS = PROTOS.parent / ".venv" / "proto"


@dataclass(frozen=True)
class Package:
    """Protos of one folder, and the Python package that they become."""

    folder: str
    """Below proto/."""
    name: str
    """Below spa_server."""
    outputs: tuple[str, ...]
    """What the compiler writes."""
    head: str
    """Contents of `__init__.py`."""
    replaced: Mapping[str, str]
    """What is changed in what it writes."""

    @property
    def target(self) -> Path:
        """Where the code goes."""
        return SERVER / self.name


SPA = Package(
    "spa/v1",
    "_generated",
    ("python", "pyi", "grpc_python"),
    '"""Generated from proto/spa/v1 by `make proto`."""\n',
    # The protos' package is spa.v1, but the Python package spa is another one.
    {"from spa.v1 import": "from spa_server._generated import"},
)
INFERENCE = Package(
    "inference",
    "_generated_inference",
    ("python", "pyi"),
    '''"""Generated from proto/inference by `make proto`, in a descriptor pool of its own."""

from google.protobuf import descriptor_pool

POOL = descriptor_pool.DescriptorPool()
''',
    # Other packages (tritonclient, kserve) bring the same message names in files of theirs, and protobuf's default pool
    # refuses the second one that is imported.
    {
        "from inference import": "from spa_server._generated_inference import",
        "from google.protobuf import descriptor_pool as _descriptor_pool\n": (
            "from spa_server._generated_inference import POOL as _POOL\n"
        ),
        "_descriptor_pool.Default()": "_POOL",
    },
)
PACKAGES = (SPA, INFERENCE)


def generated(package: Package, tools: Path = TOOLS) -> dict[str, str]:
    """Contents of the generated files by name. `tools` is a folder that holds `grpc_tools`, unless Python finds it."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / package.folder).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in package.outputs]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *sources]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tools)}, cwd=PROTOS)
        texts = {p.name: p.read_text(encoding="utf-8") for p in Path(folder, package.folder).iterdir()}
    for old, new in package.replaced.items():
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    bare = [name for name in texts if name.endswith("_grpc.py") and "Servicer" not in texts[name]]
    return {"__init__.py": package.head, **{name: text for name, text in texts.items() if name not in bare}}


def main() -> None:
    """Write them."""
    for package in PACKAGES:
        texts = generated(package)
        package.target.mkdir(parents=True, exist_ok=True)
        for path in package.target.glob("*.py*"):
            if path.name not in texts:
                path.unlink()
        for name, text in texts.items():
            (package.target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
